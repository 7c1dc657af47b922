"""Wrapped networks, and numbers that are not float32: converted, or refused with a remedy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, load_model
from holdfast.models.wrappers import unwrapped

X = torch.rand(3, 1, 8, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5))


class Middle(nn.Module):
    """A network with a wrapped part, like the convolutions of AlexNet in PyTorch's ImageNet example."""

    def __init__(self, wrap):
        super().__init__()
        self.features = wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)))
        self.out = nn.Linear(8, 5)

    def forward(self, x):
        return self.out(self.features(x))


def compiled(inner):
    return torch.compile(inner, backend="eager")


class TestWrappers:
    @pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, AveragedModel])
    @pytest.mark.parametrize("by", ["of", "named"])
    def test_the_network_inside_is_taken(self, benign, wrap, by):
        wrapped = wrap(network())
        prefix = "_orig_mod" if wrap is compiled else "module"
        named = SplitModel(wrapped, f"{prefix}.3")
        model = SplitModel.of(wrapped, benign) if by == "of" else named.unwrapped()
        assert list(model.network.state_dict()) == ["1.weight", "1.bias", "3.weight", "3.bias"]
        assert model.head_name == "3"
        assert torch.equal(model(X), network()(X))
        assert "was wrapped in" in model.notes[0]

    def test_two_wrappers_and_parts_inside(self, benign):
        twice = SplitModel.of(nn.DataParallel(compiled(network())), benign)
        assert next(iter(twice.network.state_dict())) == "1.weight"
        inside = Middle(lambda part: nn.DataParallel(nn.DataParallel(part)))
        before = list(inside.state_dict())
        model = SplitModel.of(inside, benign)
        assert list(model.network.state_dict()) == ["features.1.weight", "features.1.bias", "out.weight", "out.bias"]
        assert torch.equal(model(X), inside.features.module.module(X) @ inside.out.weight.T + inside.out.bias)
        assert list(inside.state_dict()) == before  # left as it was

    def test_a_module_that_was_compiled_in_place(self, benign):
        inner = network()
        inner.compile(backend="eager")
        model = SplitModel.of(inner, benign)
        assert model.network._compiled_call_impl is None
        assert inner._compiled_call_impl is not None
        assert "was compiled" in model.notes[0]

    def test_a_factory_that_wraps(self, benign):
        model = SplitModel.of(nn.DataParallel(network()), benign, factory=lambda: nn.DataParallel(network()))
        assert model.fresh().head_name == "3"
        assert list(model.fresh().network.state_dict()) == list(model.network.state_dict())

    def test_a_class_that_only_calls_itself_so_is_nothing_published(self, benign):
        class DataParallel(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = network()

            def forward(self, x):
                return self.module(x) * 2

        model = SplitModel.of(DataParallel(), benign)
        assert (model.head_name, model.notes) == ("module.3", ())
        assert torch.equal(model(X), network()(X) * 2)

    def test_a_plain_one_is_the_very_same(self, trained, benign):
        assert trained.unwrapped() is trained
        inner = network()
        assert SplitModel.of(inner, benign).network is inner


class TestPrecision:
    @pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
    def test_half_becomes_float32(self, benign, kind):
        half = network().to(kind)
        model = SplitModel.of(half, benign)
        assert {p.dtype for p in model.network.parameters()} == {torch.float32}
        assert torch.equal(model.network[3].weight, half[3].weight.float())
        assert half[3].weight.dtype == kind
        assert str(kind)[6:] in model.notes[0]

    def test_mixed_tied_and_hidden_tensors(self, benign):
        mixed = network()
        mixed[1].half()
        mixed[3].bias = nn.Parameter(mixed[3].bias.to(torch.bfloat16))
        mixed.register_buffer("counter", torch.tensor(3))
        mixed.register_parameter("again", mixed[1].weight)
        mixed.aside = [torch.ones(2, dtype=torch.float16)]
        made = unwrapped(mixed, "mine").network
        assert made.again is made[1].weight
        assert made[1].weight.dtype == made[3].bias.dtype == made.aside[0].dtype == torch.float32
        assert made.counter.dtype == torch.int64

    def test_float64_stays(self, benign):
        assert SplitModel.of(network().double(), benign).dtype == torch.float64

    def test_an_extractor_in_float64_stays(self, trained):
        model = trained.clone()
        model.insert_extractor(torch.eye(64, dtype=torch.float64) * 2)
        assert model.unwrapped() is model

    @pytest.mark.trains
    def test_the_attack_is_that_on_the_same_weights_in_float32(self, benign, restricted, run):
        from holdfast.adversaries import FineTuning
        from holdfast.training import Strategy

        half = network().half()
        attack = FineTuning(Strategy("head", "all", "adam", 1e-2, 50))
        models = [SplitModel(half, "3").unwrapped(), SplitModel(copy.deepcopy(half).float(), "3")]
        curves = [attack.attack(m, restricted, budgets=(0, 5), run=run) for m in models]
        assert curves[0].scores == curves[1].scores
        assert curves[0].finite

    def test_saved_weights_give_the_same_outputs(self, benign, tmp_path):
        model = load_model("cnn", benign)
        model.network.half()
        model = model.unwrapped().eval()
        model.save(str(tmp_path / "deep" / "m.safetensors"))
        again = load_model(str(tmp_path / "deep" / "m.safetensors"), benign).eval()
        assert again.dtype == torch.float32
        assert torch.equal(again(X), model(X))

    def test_the_verbs_take_it_in_python(self, benign, restricted, tmp_path):
        import holdfast

        half = SplitModel(network().half(), "3", name="mine")
        holdfast.feasibility(benign, restricted, model=half, folder=tmp_path, device="cpu")
        facts = holdfast.read_result(tmp_path).provenance.models["original"]
        assert facts.notes == ["mine is stored in float16; it is attacked and written in float32."]
        assert facts.notes[0] in (tmp_path / "report.html").read_text()
        assert half.network[3].weight.dtype == torch.float16


class TestAdapters:
    def lora(self, inner, **more):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["1"], init_lora_weights=False, **more)
        return get_peft_model(inner, config).eval()

    def test_it_is_merged(self, benign):
        adapted = self.lora(network(), modules_to_save=["3"])
        with torch.no_grad():
            adapted.base_model.model[3].modules_to_save["default"].weight.mul_(3)
        wanted = adapted(X)
        assert not torch.allclose(wanted, network()(X), atol=1e-2)
        for model in (
            SplitModel.of(adapted, benign),
            SplitModel(adapted, "base_model.model.3.modules_to_save.default").unwrapped(),
        ):
            assert list(model.network.state_dict()) == list(network().state_dict())
            assert model.head_name == "3"
            assert torch.allclose(model(X), wanted, atol=1e-5)
            assert all(p.requires_grad for p in model.parameters())
            assert "it was merged" in model.notes[0]
        assert any("lora_A" in name for name in adapted.state_dict())

    def test_one_that_was_injected(self, benign):
        from peft import LoraConfig, inject_adapter_in_model

        adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["1"], init_lora_weights=False), network())
        wanted = adapted.eval()(X)
        model = SplitModel.of(adapted, benign)
        assert list(model.network.state_dict()) == list(network().state_dict())
        assert torch.allclose(model(X), wanted, atol=1e-5)


class TestNorms:
    def test_a_head_that_is_computed_becomes_plain(self, benign):
        inner = network()
        inner[3] = parametrizations.weight_norm(inner[3])
        model = SplitModel(inner, "3").unwrapped()
        assert torch.allclose(model(X), inner(X))
        model.insert_extractor(torch.eye(8, dtype=torch.float64) * 4)
        assert torch.allclose(model(X), inner(X), atol=1e-5)

    def test_hooks_that_compute_weights_are_refused(self, benign):
        inner = network()
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(inner[1])
        with pytest.raises(HoldfastError, match=r"'?1'? is Linear with torch.nn.utils.weight_norm.*parametrizations"):
            SplitModel.of(inner, benign)


def inferred():
    with torch.inference_mode():
        return network()


def test_inference_tensors_are_copied(benign):
    model = SplitModel.of(inferred(), benign)
    loss = benign.loss(model, next(benign.sweep("test", 4, device=torch.device("cpu"))))
    loss.backward()
    assert model.head.weight.grad is not None
    assert "inference_mode" in model.notes[0]


def quantised():
    made = network()
    made[1].weight = nn.Parameter(made[1].weight.to(torch.int8), requires_grad=False)
    return made


def dynamic():
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    return torch.ao.quantization.quantize_dynamic(network(), {nn.Linear})


def sparse():
    made = network()
    made[1].weight = nn.Parameter(made[1].weight.detach().to_sparse())
    return made


def complex_():
    made = network()
    made.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    return made


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(5))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: torch.jit.script(network()), "TorchScript.*Give the nn.Module"),
        (lambda: torch.jit.trace(network(), X), "TorchScript"),
        (lambda: Middle(torch.jit.script), "'?features'? is RecursiveScriptModule, TorchScript"),
        (quantised, "'1.weight' holds int8: it is quantised"),
        (dynamic, "is quantised: fine-tuning needs floating-point"),
        (sparse, r"'1.weight' is sparse.*to_dense"),
        (complex_, "'phase' is complex"),
        (lazy, "'1.weight' has no shape yet.*run the network once"),
        (lambda: network().to("meta"), "'1.weight' has no values.*meta device"),
    ],
)
def test_networks_that_cannot_be_unwrapped(benign, build, message):
    made = build()
    with pytest.raises(HoldfastError, match=f"mine: .*{message}"):
        SplitModel.of(made, benign, name="mine")
