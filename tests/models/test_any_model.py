"""Models of any origin: Hugging Face's, timm's with their own weights, the user's code, and other architectures."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import (
    ModelSpec,
    SplitModel,
    architecture_differences,
    check_fits,
    foreign_code,
    load_model,
    load_released,
    transplant,
)
from holdfast.models.introspection import logits_of
from holdfast.runtime.storage import save_tensors
from holdfast.tasks import TaskSpec, load_task
from texts import tiny_vit

NETS = """
import torch
from torch import nn
from beside import WIDTH


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.out = nn.Linear(WIDTH * 64, classes)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return {"hidden": x, "logits": self.out(x.view(-1, WIDTH * 64))}


def plain():
    return Net()


def sized(num_outputs, input_shape):
    assert input_shape == (1, 8, 8)
    return Net(num_outputs)


def wide(num_outputs, *, scale=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8 * scale), nn.ReLU(), nn.Linear(8 * scale, num_outputs))


def loaded():
    torch.manual_seed(7)
    return Net()


def stubborn():
    torch.manual_seed(7)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    network.scale = nn.Parameter(torch.rand(3))
    return network


def needy(width):
    return Net()


def broken():
    raise KeyError("surprise")


def nothing():
    return "a network"


constant = 3
"""


@pytest.fixture
def nets(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    yield str(tmp_path / "nets.py")
    sys.modules.pop("beside", None)


@pytest.fixture
def vit(tmp_path):
    tiny_vit(num_labels=5).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def resnet(folder, labels=5):
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=labels
    )
    torch.manual_seed(0)
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    return folder


class Buffered(nn.Module):
    """A network whose weights are all buffers, so that it cannot be trained."""

    def __init__(self, network):
        super().__init__()
        self.body, self.head = network.body, network.head
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach().clone())

    def forward(self, x):
        return self.head(self.body(x))


class TestHeads:
    def of(self, network, benign, **more):
        return SplitModel.of(network, benign, **more)

    def test_the_last_linear_layer_that_ran_is_the_head(self, benign):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(8, 5)
                self.body = nn.Linear(64, 8)
                self.unused = nn.Linear(8, 5)

            def forward(self, x):
                return self.head(self.body(x.flatten(1)))

        assert self.of(Net(), benign).head_name == "head"
        assert self.of(Net(), benign, head="body").head_name == "body"

    def test_a_1x1_convolution_is_a_head(self, benign):
        network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 5, 1))
        model = self.of(network, benign)
        assert model.head_name == "1"
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 5)

    def test_without_a_head_one_is_appended_that_changes_nothing(self, benign):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(64, 5))

            def reset_parameters(self):
                nn.init.normal_(self.weight)

            def forward(self, x):
                return (x.flatten(1) @ self.weight).tanh()

        network = Net()
        model = self.of(network, benign, factory=Net)
        x = torch.rand(3, 1, 8, 8)
        assert torch.equal(model(x), network(x))
        assert torch.equal(model.features(x), network(x))
        assert "was appended as the head" in model.notes[0]
        assert model.num_outputs == 5
        fresh = model.fresh()
        assert torch.equal(fresh.head.weight, torch.eye(5))
        assert not torch.equal(fresh.network.body.weight, network.weight)

    def test_weights_from_before_the_head_was_appended(self, benign, tmp_path):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.ConstantPad1d((0, 1), 0.0))
        model = self.of(network, benign)
        save_file({n: torch.ones_like(v) for n, v in network.state_dict().items()}, tmp_path / "w.safetensors")
        model.load(tmp_path / "w.safetensors")
        assert torch.equal(model.network.body[1].bias, torch.ones(4))
        model.save(tmp_path / "whole.safetensors")
        model.load(tmp_path / "whole.safetensors")

    def test_code_that_calls_view_gets_contiguous_images(self):
        task = load_task(TaskSpec(data="digits[0-4]", channels=3))
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (4, 1)), nn.Flatten(), nn.Linear(144, 5))

        class Viewing(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.out = network[0], network[3]

            def forward(self, x):
                return self.out(self.conv(x).view(-1, 144))

        assert SplitModel.of(network, task).channels_last
        viewing = SplitModel.of(Viewing(), task)
        assert not viewing.channels_last
        assert viewing(torch.rand(2, 3, 8, 8)).shape == (2, 5)

    @pytest.mark.parametrize(
        "output",
        [
            torch.ones(2, 3), torch.ones(2, 3, 1, 1), (torch.ones(2, 3), torch.zeros(2)), [None, torch.ones(2, 3)],
            {"aux": torch.zeros(2, 3), "logits": torch.ones(2, 3)}, {"out": torch.ones(2, 3)},
            SimpleNamespace(loss=None, logits=torch.ones(2, 3)),
        ],
    )  # fmt: skip
    def test_logits_in_every_form(self, output):
        assert torch.equal(logits_of(output), torch.ones(2, 3))

    @pytest.mark.parametrize("output", [None, "text", (), {}, torch.ones(()), SimpleNamespace(logits=None)])
    def test_no_logits(self, output):
        with pytest.raises(HoldfastError, match="without logits"):
            logits_of(output)

    def test_refusals_of_networks(self, benign):
        with pytest.raises(HoldfastError, match=r"mine cannot take inputs of shape \(1, 8, 8\).*image_size"):
            self.of(nn.Linear(3, 5), benign, name="mine")
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        network.cache = network(torch.zeros(1, 64))
        with pytest.raises(HoldfastError, match="cannot be copied"):
            self.of(network, benign)

    def test_a_head_that_does_not_run(self, benign):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        network.add_module("2", nn.Identity())
        network[2].spare = nn.Linear(2, 5)
        with pytest.raises(HoldfastError, match="does not run its head"):
            SplitModel(network, "2.spare").features(torch.zeros(1, 1, 8, 8))


class TestBuffersOnly:
    def test_it_works_like_any_other(self, trained, benign, restricted):
        model = SplitModel(Buffered(trained.clone().network.double()), "head", name="buffers", mean=(0.5,), std=(0.5,))
        assert not list(model.parameters())
        assert (model.device, model.dtype) == (torch.device("cpu"), torch.float64)
        check_fits(model, benign, own_task=True, trainable=False)
        assert benign.score(model) == pytest.approx(benign.score(trained), abs=1e-9)
        model.reset_head(3)
        assert model.head.weight.requires_grad
        assert model.head.weight.dtype == torch.float64

    def test_probes_attack_it(self, trained, benign, restricted, run):
        from holdfast.adversaries import Probe

        model = SplitModel(Buffered(trained.clone().network), "head", mean=(0.5,), std=(0.5,))
        probe = Probe("ridge", "whitened")
        curves = [probe.attack(m, restricted, budgets=(0, 1), run=run) for m in (model, trained)]
        assert curves[0].scores == curves[1].scores

    def test_the_hash_sees_weights_that_a_state_dict_does_not(self, benign):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        network.hidden = torch.zeros(2)
        network.register_buffer("brief", torch.zeros(2), persistent=False)
        model = SplitModel(network, "1")
        digests = {model.facts().sha256}
        network.hidden += 1
        digests.add(model.facts().sha256)
        network.brief += 1
        digests.add(model.facts().sha256)
        assert len(digests) == 3


class TestCode:
    def test_functions_with_and_without_sizes(self, nets, benign):
        for function in ("plain", "sized"):
            model = load_model(f"{nets}:{function}", benign)
            assert (model.name, model.head_name, model.num_outputs) == (f"nets.py:{function}", "out", 5)
            assert not model.channels_last  # it calls view
        assert load_model(ModelSpec(name=f"{nets}:wide", options={"scale": 2}), benign).head.in_features == 16
        assert load_model(ModelSpec(name=f"{nets}:wide", head="3"), benign).head_name == "3"
        with pytest.raises(HoldfastError, match=r"its head '1' says \(2, 8\)"):
            load_model(ModelSpec(name=f"{nets}:wide", head="1"), benign)

    def test_a_module_by_name(self, nets, benign, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert load_model("nets:plain", benign).head_name == "out"
        with pytest.raises(HoldfastError, match="no module 'netz' here; give a file as"):
            load_model("netz:plain", benign)
        sys.modules.pop("nets")

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("plian", "Unknown function in 'nets.py': 'plian': did you mean 'plain'"),
            ("constant", "is int; expected a function"),
            ("needy", "raised when it was called with no arguments: TypeError: .*'width'"),
            ("broken", "'nets.py:broken' raised when .*KeyError: 'surprise'"),
            ("nothing", "returned str; expected a torch.nn.Module"),
            ("", "does not name a function"),
        ],
    )
    def test_refusals(self, nets, benign, function, message):
        with pytest.raises(HoldfastError, match=message):
            load_model(f"{nets}:{function}", benign)

    def test_files_that_cannot_be_imported(self, benign, tmp_path):
        with pytest.raises(HoldfastError, match="does not exist"):
            load_model(f"{tmp_path}/none.py:f", benign)
        for source, message in (("import nonexistent_thing", "ModuleNotFoundError"), ("1 +", "SyntaxError")):
            (tmp_path / "bad.py").write_text(source)
            with pytest.raises(HoldfastError, match=rf"'bad.py:f' cannot be imported: {message}"):
                load_model(f"{tmp_path}/bad.py:f", benign)

    def test_the_scratch_control_is_fresh_also_where_the_function_loads_weights(self, nets, benign):
        for function in ("plain", "loaded"):
            model = load_model(f"{nets}:{function}", benign)
            torch.manual_seed(1)
            one = model.fresh()
            torch.manual_seed(2)
            other = model.fresh()
            for layer in ("conv.weight", "out.weight"):
                weights = [m.network.state_dict()[layer] for m in (model, one, other)]
                assert not any(torch.equal(weights[i], weights[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
        with pytest.raises(HoldfastError, match=r"\(root\).*has no reset_parameters.*untrained network"):
            load_model(f"{nets}:stubborn", benign).fresh()

    def test_weights_for_it(self, nets, benign, tmp_path):
        model = load_model(f"{nets}:plain", benign)
        model.insert_extractor(torch.eye(256, dtype=torch.float64) * 2)
        model.save(tmp_path / "w.safetensors")
        again = load_released(f"{nets}:plain", tmp_path / "w.safetensors", benign)
        assert again.has_extractor
        assert again.facts().sha256 == model.facts().sha256

    def test_a_file_of_weights_cannot_have_code_run(self, nets, benign, tmp_path):
        load_model(f"{nets}:plain", benign).save(tmp_path / "w.safetensors")
        with pytest.raises(HoldfastError, match=r"a file of weights may not run code.*--weights FILE"):
            load_model(str(tmp_path / "w.safetensors"), benign)

    def test_the_hash_sees_the_code(self, nets, benign, tmp_path):
        torch.manual_seed(0)
        first = load_model(f"{nets}:plain", benign)
        (tmp_path / "more").mkdir()
        changed = tmp_path / "more" / "nets.py"
        (tmp_path / "more" / "beside.py").write_text("WIDTH = 4\n")
        changed.write_text(NETS)
        with pytest.raises(HoldfastError, match=r"beside 'beside.py', and another .*Rename one"):
            load_model(f"{changed}:plain", benign)
        (tmp_path / "more" / "beside.py").unlink()
        changed.write_text(NETS.replace(".relu()", ".tanh()"))
        torch.manual_seed(0)
        other = load_model(f"{changed}:plain", benign)
        assert other.facts().sha256 != first.facts().sha256

    def test_another_process_can_unpickle_it(self, nets, benign, tmp_path):
        """The new process has imported neither the file nor the module beside it."""
        model = load_model(f"{nets}:plain", benign)
        (tmp_path / "model").write_bytes(pickle.dumps(model))
        code = (
            "import pickle, sys; model = pickle.load(open(sys.argv[1], 'rb')); "
            "print(model.facts().sha256, model.fresh().num_outputs)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == [model.facts().sha256, "5"], done.stderr

    def test_a_split_model_is_taken_as_it_is(self, benign, tmp_path):
        (tmp_path / "own.py").write_text(
            "from torch import nn\nfrom holdfast import SplitModel\n"
            "def make():\n    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 5))\n"
            "    return SplitModel(network, '1', mean=[0.25], std=[0.5])\n"
        )
        model = load_model(f"{tmp_path}/own.py:make", benign)
        assert (model.head_name, model.mean.item(), model.std.item()) == ("1", 0.25, 0.5)
        assert model.fresh().head_name == "1"


class TestHuggingFace:
    def test_it_answers_as_transformers_does(self, vit, benign):
        model = load_model(f"hf:{vit}", benign)
        plain = transformers.ViTForImageClassification.from_pretrained(vit).eval()
        x = torch.rand(3, 1, 8, 8)
        assert torch.allclose(model.eval()(x), plain(x).logits, atol=1e-6)
        assert (model.name, model.head_name) == ("hf:vit", "classifier")
        assert "without a preprocessor" in model.notes[0]

    def test_a_saved_model_loads_without_its_folder(self, vit, benign, tmp_path, monkeypatch):
        model = load_model(f"hf:{vit}", benign)
        model.save(tmp_path / "m.safetensors")
        (vit / "config.json").unlink()
        again = load_released(str(tmp_path / "m.safetensors"), None, benign)
        assert again.facts().sha256 == model.facts().sha256
        copy = pickle.loads(pickle.dumps(again))
        fresh = copy.fresh()
        assert fresh.facts().sha256 != model.facts().sha256
        assert fresh.num_outputs == 5
        assert architecture_differences(again, model) == []
        assert str(tmp_path) not in json.dumps(again.spec)

    @pytest.mark.parametrize(
        ("preprocessor", "mean", "std"),
        [
            ({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3]}, [0.4, 0.5, 0.6], [0.2, 0.2, 0.3]),
            ({"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "do_normalize": False}, [0.0], [1.0]),
            ({"rescale_factor": 1 / 127.5, "rescale_offset": True}, [0.5], [0.5]),
            ({"do_rescale": False, "image_mean": [51.0] * 3, "image_std": [102.0] * 3}, [0.2] * 3, [0.4] * 3),
        ],
    )
    def test_input_normalisation(self, tmp_path, preprocessor, mean, std):
        folder = resnet(tmp_path / "resnet")
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        task = load_task(TaskSpec(data="digits[0-4]", image_size=16, channels=3))
        model = load_model(f"hf:{folder}", task)
        assert model.head_name == "classifier.1"
        assert model.mean.flatten().tolist() == pytest.approx(mean)
        assert model.std.flatten().tolist() == pytest.approx(std)
        model.save(tmp_path / "m.safetensors")
        assert torch.equal(load_model(str(tmp_path / "m.safetensors"), task).mean, model.mean)

    def test_other_weights_and_other_classes(self, vit, benign, tmp_path):
        state = {n: torch.zeros_like(v) for n, v in load_file(vit / "model.safetensors").items()}
        save_file(state, tmp_path / "zero.safetensors")
        model = load_released(f"hf:{vit}", tmp_path / "zero.safetensors", benign)
        assert torch.equal(model.head.weight, torch.zeros(5, 16))
        del state["classifier.bias"]
        save_file(state, tmp_path / "less.safetensors")
        with pytest.raises(HoldfastError, match=r"less.safetensors' does not fit hf:.*missing 'classifier.bias'"):
            load_released(f"hf:{vit}", tmp_path / "less.safetensors", benign)
        save_file({**state, "classifier.bias": torch.zeros(5, dtype=torch.int8)}, tmp_path / "int.safetensors")
        with pytest.raises(HoldfastError, match=r"holds integers in 'classifier.bias'"):
            load_released(f"hf:{vit}", tmp_path / "int.safetensors", benign)
        digits = load_task("digits")
        with pytest.raises(HoldfastError, match="5 outputs and its task 'digits' 10 classes"):
            load_released(f"hf:{vit}", None, digits)
        assert load_released(f"hf:{vit}", None, digits, own_head=False).num_outputs == 10

    def test_untrained_classifiers_are_refused(self, vit, benign, tmp_path):
        state = load_file(vit / "model.safetensors")
        del state["classifier.weight"]
        save_file(state, vit / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(HoldfastError, match=r"has no weights for 'classifier.weight'; it is not a trained"):
            load_model(f"hf:{vit}", benign)
        torch.save(state, vit / "pytorch_model.bin")
        (vit / "model.safetensors").unlink()
        with pytest.raises(HoldfastError, match=r"hf:.* cannot be loaded: .*safetensors"):
            load_model(f"hf:{vit}", benign)
        (vit / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(HoldfastError, match="cannot be loaded"):
            load_model(f"hf:{vit}", benign)

    def test_offline_names_of_the_hub_are_refused(self, benign, monkeypatch):
        def offline(*_, **__):
            raise OSError("We couldn't connect to the Hub.\nAnd more")

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
        with pytest.raises(HoldfastError, match=r"connect to the Hub\. There is no folder 'a/b' here.*needs a network"):
            load_model("hf:a/b", benign)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "x.pt"}}, "name it timm:NAME"),
            ({"model_type": "vit", "auto_map": {"AutoConfig": "x--y.Z"}}, "'auto_map', which is not a setting"),
            ({"model_type": "vit", "_attn_implementation": "someones/kernels"}, "'_attn_implementation', which is not"),
            ({"model_type": "nothing"}, "no image classifier can be built"),
            ({}, "no image classifier can be built"),
        ],
    )
    def test_a_hostile_header_builds_nothing(self, benign, tmp_path, config, message):
        spec = {"name": "hf:x", "options": {"config": config}}
        save_tensors(tmp_path / "m.safetensors", {"x": torch.zeros(1)}, {"model": spec})
        with pytest.raises(HoldfastError, match=message):
            load_released(str(tmp_path / "m.safetensors"), None, benign)


class TestTimm:
    def test_its_own_weights(self, monkeypatch):
        task = load_task(TaskSpec(data="digits[0-4]", image_size=32, channels=3))
        made = []
        create = timm.create_model
        monkeypatch.setattr(
            timm, "create_model", lambda *a, pretrained=False, **k: made.append(pretrained) or create(*a, **k)
        )
        with pytest.raises(HoldfastError, match="trained for 1000 classes, and the task has 5"):
            load_released("timm:resnet18", None, task)
        assert not made
        model = load_released("timm:resnet18", None, task, own_head=False)
        model.fresh()
        assert made == [True, False]

    def test_offline(self, monkeypatch):
        task = load_task(TaskSpec(data="digits[0-4]", image_size=32, channels=3))

        def offline(*_, **__):
            raise ConnectionError("Name or service not known")

        monkeypatch.setattr(timm, "create_model", offline)
        with pytest.raises(HoldfastError, match=r"own weights: ConnectionError: .*fetched from a network.*--weights"):
            load_released("timm:resnet18", None, task, own_head=False)

    def test_names_without_weights(self, benign):
        with pytest.raises(HoldfastError, match="Unknown timm model 'resnet19'"):
            load_released("timm:resnet19", None, benign)
        with pytest.raises(HoldfastError, match="no weights of its own for timm:resnetv2_152"):
            load_released("timm:resnetv2_152", None, benign)


class TestDifferences:
    @pytest.mark.parametrize(
        ("spec", "sentences"),
        [
            ({"name": "cnn"}, []),
            ({"name": "mlp"}, ["Only mlp has the tensor 'body.3.weight'.", "The network is MLP instead of CNN."]),
            ({"name": "cnn", "options": {"width": 8}}, ["'body.0.weight' is (8, 1, 3, 3) instead of (16, 1, 3, 3)."]),
            ({"name": "cnn", "std": (0.25,)}, ["Its input std is [0.25] instead of [0.5]."]),
        ],
    )
    def test_named_architectures(self, trained, benign, spec, sentences):
        found = architecture_differences(load_model(ModelSpec(**spec), benign), trained)
        assert bool(found) == bool(sentences)
        assert set(sentences) <= set(found)

    def test_an_extractor_is_not_a_difference(self, trained):
        model = trained.clone()
        model.insert_extractor(torch.eye(64, dtype=torch.float64) * 2)
        assert architecture_differences(model, trained) == []
        assert architecture_differences(trained, model) == []

    def test_buffers_hooks_and_layers(self, trained):
        buffered = SplitModel(Buffered(trained.clone().network), "head", mean=(0.5,), std=(0.5,))
        found = architecture_differences(buffered, trained)
        assert "'body.0.weight' is not a parameter instead of a parameter." in found
        hooked = trained.clone()
        hooked.network.body[0].register_forward_hook(lambda *_: None)
        hooked.network.body[2] = nn.Tanh()
        assert architecture_differences(hooked, trained) == [
            "Layer 'body.0' has hooks: code that runs beside its own.",
            "Layer 'body.2' is Tanh instead of ReLU.",
        ]

    def test_settings_and_classes_of_a_borrowed_name(self, trained):
        class Linear(nn.Linear):
            """Has the name of torch's class."""

        Linear.__module__, Linear.__qualname__ = nn.Linear.__module__, nn.Linear.__qualname__
        released = trained.clone()
        released.network.body[2].negative_slope = 0.5
        released.network.body.forward = trained.network.body.forward
        released.network.head.__class__ = Linear
        assert architecture_differences(released, trained) == [
            "Layer 'body' has forward = method instead of nothing.",
            "Layer 'body.2' has negative_slope = 0.5 instead of nothing.",
            "Layer 'head' is torch.nn.modules.linear.Linear instead of torch.nn.modules.linear.Linear, another of that "
            "name.",
        ]
        assert foreign_code(released) == ["'body' (Sequential)", "'head' (Linear)"]


def test_the_hash_sees_weights_in_lists(trained):
    one = trained.clone()
    one.network.aside = [nn.Linear(2, 2)]
    other = one.clone()
    with torch.no_grad():
        other.network.aside[0].weight += 1
    assert len({m.facts().sha256 for m in (trained, one, other)}) == 3


class TestForeignCode:
    def test_published_layers_are_not_foreign(self, trained):
        assert foreign_code(trained) == []
        layer = nn.TransformerEncoderLayer(8, 2, activation="gelu")
        assert foreign_code(SplitModel(nn.Sequential(layer, nn.Linear(8, 2)), "1")) == []

    def test_hooks_functions_and_subclasses(self, trained):
        class Model(SplitModel):
            pass

        hooked = trained.clone()
        hooked.network.head.register_forward_pre_hook(lambda *_: None)
        layer = nn.TransformerEncoderLayer(8, 2, activation=lambda x: x.relu())
        assert foreign_code(hooked) == ["'head' (Linear)"]
        assert foreign_code(SplitModel(nn.Sequential(layer, nn.Linear(8, 2)), "1")) == ["'0' (TransformerEncoderLayer)"]
        assert foreign_code(Model(nn.Sequential(nn.Linear(8, 2)), "0")) == ["'the model' (Model)"]

    def test_who_builds_a_fresh_model_does_not_matter(self, trained):
        assert foreign_code(SplitModel(trained.network, "head", factory=lambda: trained.network)) == []


class TestTransplant:
    def same(self, found, trained, benign):
        assert found is not None
        assert {n for n, p in found.named_parameters()} == {n for n, p in trained.named_parameters()}
        assert benign.score(found) == benign.score(trained)

    def fresh(self, trained):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return trained.fresh()

    def test_weights_in_buffers(self, trained, benign):
        released = SplitModel(Buffered(trained.clone().network), "head", mean=(0.5,), std=(0.5,))
        self.same(transplant(released, self.fresh(trained)), trained, benign)

    def test_weights_inside_a_wrapper_with_more_in_it(self, trained, benign):
        class Blocked(nn.Module):
            def __init__(self):
                super().__init__()
                self.insert = nn.Linear(3, 3)
                self.inner = trained.clone().network

            def forward(self, x):
                return self.inner.head(self.inner.body(x).detach())

        released = SplitModel(Blocked(), "inner.head", mean=(0.5,), std=(0.5,))
        self.same(transplant(released, self.fresh(trained)), trained, benign)

    def test_weights_under_other_names(self, trained, benign):
        inner = trained.clone().network
        released = SplitModel.of(nn.Sequential(inner.body, inner.head), benign)
        found = transplant(released, self.fresh(trained))
        self.same(found, trained, benign)
        assert torch.equal(found.mean, trained.mean)  # the released model has none of its own

    def test_an_extractor_is_merged(self, trained, benign):
        released = trained.clone()
        released.insert_extractor(torch.diag(torch.logspace(-2, 2, 64, dtype=torch.float64)))
        self.same(transplant(released, self.fresh(trained)), trained, benign)

    def test_other_architectures_do_not_fit(self, trained, benign):
        assert transplant(load_model("mlp", benign), trained) is None
        assert transplant(load_model(ModelSpec(name="cnn", options={"width": 8}), benign), trained) is None

    def test_both_models_stay_as_they_are(self, trained):
        fresh = self.fresh(trained)
        digests = fresh.facts().sha256, trained.facts().sha256
        transplant(trained, fresh)
        assert (fresh.facts().sha256, trained.facts().sha256) == digests
