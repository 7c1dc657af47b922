"""QLoRA: adapters beside linear layers whose weights have 4 bits, as bitsandbytes and peft make them."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from holdfast.adversaries import FineTuning
from holdfast.api import audit
from holdfast.auditing import language_models
from holdfast.models import load_model, load_task_for
from holdfast.runtime.run import Run
from holdfast.tasks import load_task
from holdfast.training import Strategy, finetune, not_applicable, prepare
from texts import GPT2, save_causal, save_model, write_text

CPU = torch.device("cpu")
QLORA = Strategy("direct", "qlora", "adamw", 1e-2, 8, rank=4)
needed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason='needs bitsandbytes: pip install "holdfast[qlora]"'
)


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch):
    """What audited models write is short."""
    monkeypatch.setattr(language_models, "TOKENS", 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("four-bits")


@pytest.fixture(scope="module")
def name(place):
    return save_causal(place / "llama", hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def task(place, name):
    return text(place, name)


def text(place, name, seed=0):
    path = write_text(place / f"text{seed}.txt", 60, seed)
    return load_task_for(f"{path}@kind=next-token,length=8,test_limit=20", name)


@pytest.fixture
def model(name, task):
    return load_model(name, task)


def prepared(model, task):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return prepare(model, QLORA, task)


NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302, 0.2461123,
     0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)  # fmt: skip
"""The values of the paper's appendix E."""


def nf4(weight):
    """A slow twin of NF4 with blocks of 64, without the second rounding."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    return (NF4[((blocks / scale)[..., None] - NF4).abs().argmin(-1)] * scale).reshape(weight.shape)


class TestRefusals:
    @pytest.fixture(autouse=True)
    def absent(self, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))

    def test_without_the_package_it_says_what_to_install(self, model, task):
        assert not_applicable(QLORA, model, task) == (
            'weights of 4 bits need the package bitsandbytes: pip install "holdfast[qlora]"'
        )

    def test_an_audit_goes_on_without_it_and_says_why(self, place, name, model, task):
        attacks = [FineTuning(QLORA), FineTuning(Strategy("direct", "lora", "adamw", 1e-2, 8))]
        result = audit(
            model, original=model, benign=text(place, name, 1), restricted=task, budgets=(0, 1), seeds=1, threads=1,
            battery=attacks, side_effects=False,
        )  # fmt: skip
        assert {c.adversary for c in result.curves} == {attacks[1].name}
        assert list(result.not_applicable) == [attacks[0].name]
        assert "holdfast[qlora]" in result.not_applicable[attacks[0].name]

    def test_narrow_layers_have_no_place_for_a_scale(self, place):
        name = save_causal(place / "narrow")
        assert "multiple" in not_applicable(QLORA, load_model(name, text(place, name)), text(place, name))

    def test_it_is_for_causal_models(self):
        digits = load_task("digits[0-4]")
        assert "use scope 'lora'" in not_applicable(Strategy("head", "qlora"), load_model("mlp", digits), digits)


@needed
class TestQLoRA:
    def test_only_adapters_move_and_the_weights_keep_four_bits(self, model, task):
        moved = prepared(model, task)
        parameters = dict(model.network.named_parameters())
        before = {n: p.detach().clone() for n, p in parameters.items()}
        frozen = {n for n in parameters if n.endswith("proj.base_layer.weight")}
        assert len(frozen) == 3 * 7
        packed = {n for n in frozen if parameters[n].dtype == torch.uint8}
        assert frozen - packed == {n for n in frozen if "down_proj" in n}  # 96 inputs are no multiple of 64
        assert sum(parameters[n].numel() for n in packed) == 3 * (4 * 64 * 64 + 2 * 64 * 96) // 2  # two to a byte
        assert len(moved) == 2 * 3 * 7
        losses = finetune(model, task, QLORA, generator=torch.Generator().manual_seed(0), device=CPU)
        values = [float(loss) for _, loss in zip(range(40), losses, strict=False)]
        assert sum(values[-5:]) < 0.95 * sum(values[:5])
        changed = {n for n, p in model.network.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in parameters if "lora_" in n}
        assert model.head.weight is model.network.get_input_embeddings().weight

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_its_weights_are_those_of_the_paper(self, place, name, kind):
        if kind == "gpt2":
            save_model(place / "gpt2", {**GPT2, "n_embd": 64}, "AutoModelForCausalLM")
            name = f"hf:{place / 'gpt2'}"
        task = text(place, name)
        model, twin = load_model(name, task).eval(), load_model(name, task).eval()
        released = model.clone()
        prepared(model, task)
        packed = [n for n, p in model.network.named_parameters() if p.dtype == torch.uint8]
        assert packed
        for layer in packed:
            weight = twin.network.get_submodule(layer.removesuffix(".base_layer.weight")).weight
            weight.data = nf4(weight.data.T).T if kind == "gpt2" else nf4(weight.data)
        x = next(task.sweep("test", 8, device=CPU)).x
        with torch.no_grad():
            whole, ours, theirs = released(x), model.eval()(x), twin(x)
        rounding = float((theirs - whole).norm() / whole.norm())
        assert float((ours - theirs).norm() / whole.norm()) < 0.1 * rounding  # the scales are rounded, too

    def test_a_score_in_between_changes_no_gradient(self, model, task):
        """On processors with AVX512-BF16 a score would pack the weights, and cut off earlier adapters."""
        prepared(model, task)
        batch = next(task.batches("train", 8, generator=torch.Generator().manual_seed(0), device=CPU))
        gradients = []
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # that a product has no gradient
            for _ in range(2):
                model.train().zero_grad()
                task.loss(model, batch).backward()
                gradients.append({n: p.grad.clone() for n, p in model.network.named_parameters() if p.grad is not None})
                task.score(model)
        assert gradients[0].keys() == gradients[1].keys()
        assert len(gradients[0]) == 2 * 3 * 7
        assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())

    def test_the_seed_alone_decides(self, model, task):
        attack = FineTuning(QLORA)
        curves = [attack.attack(model, task, budgets=[0, 2, 10], run=Run(0, CPU)) for _ in range(2)]
        assert curves[0] == curves[1]
        assert curves[0].scores[2] > curves[0].scores[0]

    def test_its_operations_are_counted(self, model, task):
        """Forward, and backward to the inputs, but not to the weights: as with adapters in full precision."""
        counts = [
            FineTuning(Strategy("direct", scope, "adamw", 1e-2, 8, rank=4)).flops_per_step(model, task, run=Run(0, CPU))
            for scope in ("lora", "qlora")
        ]
        assert counts[1] == pytest.approx(counts[0], rel=0.02)

    def test_an_audit_runs_it_on_every_model_and_shows_what_they_write(self, place, name, model, task):
        attack = FineTuning(QLORA)
        result = audit(
            model, original=model, benign=text(place, name, 1), restricted=task, budgets=(0, 2), seeds=1, threads=1,
            battery=[attack], side_effects=False,
        )  # fmt: skip
        assert {c.role for c in result.curves} == {"immunized", "original", "scratch"}
        assert all(c.finite for c in result.curves)
        assert all(c.benign_after is not None for c in result.curves if c.role != "scratch")
        assert {t.adversary for t in result.texts} == {None, attack.name}
        assert not result.not_applicable
