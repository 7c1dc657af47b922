"""Outputs and classes, matched by name if both have names, else by index; and folders of transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, SplitModel, load_model, load_released
from holdfast.models.labels import match_outputs
from holdfast.tasks import ArrayTask
from texts import tiny_vit

X = torch.rand(4, 1, 8, 8)


def task_of(names, name="animals"):
    rng = np.random.default_rng(0)
    y = np.arange(6 * len(names)) % len(names)
    x = rng.integers(0, 256, (len(y), 8, 8), dtype=np.uint8)
    return ArrayTask(name, x, y, x, y, names)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A classifier of three animals, and its outputs on X."""
    folder = tmp_path_factory.mktemp("hf") / "vit"
    network = tiny_vit(id2label={0: "Cat", 1: "dog", 2: "sea lion"})
    torch.manual_seed(0)
    nn.init.normal_(network.classifier.weight)
    network.save_pretrained(folder)
    return folder, network(X).logits.detach()


class TestByName:
    def test_another_order_is_put_right(self, vit, tmp_path):
        folder, outputs = vit
        task = task_of(["sea_lion", "cat", "Dog"])
        model = load_released(f"hf:{folder}", None, task).eval()
        assert torch.allclose(model(X), outputs[:, [2, 0, 1]], atol=1e-6)
        assert "were in another order; they were matched with animals by name" in " ".join(model.notes)
        # The saved file records its order.
        model.save(tmp_path / "m.safetensors")
        again = load_released(str(tmp_path / "m.safetensors"), None, task).eval()
        assert torch.equal(again(X), model(X))
        assert not any("matched" in note for note in again.notes)
        turned = load_released(str(tmp_path / "m.safetensors"), None, task_of(["cat", "dog", "sea lion"])).eval()
        assert torch.allclose(turned(X), outputs, atol=1e-6)

    def test_a_part_of_the_outputs(self, vit, tmp_path):
        folder, outputs = vit
        task = task_of(["sea lion", "cat"])
        model = load_released(f"hf:{folder}", None, task).eval()
        assert torch.allclose(model(X), outputs[:, [2, 0]], atol=1e-6)
        assert "were 3, of which 2 are the task's classes" in " ".join(model.notes)
        assert model.fresh().num_outputs == 2
        model.save(tmp_path / "m.safetensors")
        assert torch.equal(load_released(str(tmp_path / "m.safetensors"), None, task).eval()(X), model(X))

    def test_the_same_order_needs_no_note(self, vit):
        folder, outputs = vit
        model = load_released(f"hf:{folder}", None, task_of(["cat", "DOG", "sea  lion"])).eval()
        assert torch.allclose(model(X), outputs, atol=1e-6)
        assert not any("matched" in note for note in model.notes)

    def test_weights_of_our_own_beside_an_architecture(self, tmp_path):
        first = load_model("cnn", task_of(["a", "b", "c"])).eval()
        first.save(tmp_path / "m.safetensors")
        spec = ModelSpec(name="cnn", weights=str(tmp_path / "m.safetensors"))
        again = load_model(spec, task_of(["c", "a", "b"])).eval()
        assert torch.allclose(again(X), first(X)[:, [2, 0, 1]], atol=1e-6)

    def test_a_recipe_may_name_them(self, tmp_path):
        first = load_model("cnn", task_of(["0", "1", "2"])).eval()
        first.save(tmp_path / "m.safetensors")
        spec = ModelSpec(name="cnn", weights=str(tmp_path / "m.safetensors"), classes=("x", "y", "z"))
        again = load_model(spec, task_of(["z", "x", "y"])).eval()
        assert torch.allclose(again(X), first(X)[:, [2, 0, 1]], atol=1e-6)
        with pytest.raises(HoldfastError, match="names 2 classes"):
            load_model(spec.model_copy(update={"classes": ("x", "y")}), task_of(["z", "x", "y"]))
        with pytest.raises(HoldfastError, match="leave `classes` out"):
            load_model(spec.model_copy(update={"keep_outputs": (0, 1, 2)}), task_of(["z", "x", "y"]))

    def test_more_than_the_head_makes_the_outputs(self):
        class Biased(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(64, 3)
                self.register_buffer("shift", torch.tensor([1.0, 2.0, 3.0]))

            def forward(self, x):
                return self.head(x.flatten(1)) + self.shift

        with pytest.raises(HoldfastError, match="depend on more than its head 'head'"):
            match_outputs(SplitModel(Biased(), "head"), ["a", "b", "c"], task_of(["c", "a", "b"]))


class TestByIndex:
    @pytest.mark.parametrize(
        ("own", "classes", "note"),
        [
            (["cat", "dog", "sea lion"], ["0", "1", "2"], "the classes of animals have no names"),
            (["LABEL_0", "LABEL_1", "LABEL_2"], ["cat", "dog", "emu"], "its outputs have no names"),
            (["cat", "dog", "fox"], ["dog", "cat", "emu"], "no output is called 'emu'; they are called 'cat', 'dog'"),
            (["cat", "cat", "dog"], ["dog", "cat", "emu"], "its outputs have no names"),
            (["2", "0", "1"], ["0", "1", "2"], None),
            (["LABEL_0", "LABEL_1", "LABEL_2"], ["7", "8", "9"], None),
        ],
    )  # fmt: skip
    def test_with_a_note_where_one_has_names(self, own, classes, note):
        model = SplitModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "1")
        before = model(X)
        assert match_outputs(model, own, task_of(classes)) is None
        assert torch.equal(model(X), before)
        assert [note] == [n for n in [note] if n and n in model.notes[0]] if note else model.notes == ()


class TestFolders:
    def test_half_precision_is_float32(self, vit, tmp_path):
        folder, outputs = vit
        transformers.ViTForImageClassification.from_pretrained(folder).half().save_pretrained(tmp_path / "half")
        assert load_file(tmp_path / "half" / "model.safetensors")["classifier.weight"].dtype == torch.float16
        model = load_released(f"hf:{tmp_path}/half/", None, task_of(["cat", "dog", "sea lion"])).eval()
        assert model.dtype == torch.float32
        assert torch.allclose(model(X), outputs, atol=1e-2)

    def test_an_adapter_beside_the_model_is_merged(self, vit, tmp_path):
        from peft import LoraConfig, get_peft_model

        folder, outputs = vit
        inner = transformers.ViTForImageClassification.from_pretrained(folder)
        inner.save_pretrained(tmp_path / "both")
        torch.manual_seed(1)
        parts = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
        config = LoraConfig(r=4, init_lora_weights=False, **parts)
        adapted = get_peft_model(inner, config).eval()
        with torch.no_grad():
            adapted.base_model.model.classifier.modules_to_save["default"].weight.mul_(2)
        wanted = adapted(X).logits.detach()
        assert not torch.allclose(wanted, outputs, atol=0.05)
        adapted.save_pretrained(tmp_path / "both")
        task = task_of(["cat", "dog", "sea lion"])
        model = load_released(f"hf:{tmp_path}/both", None, task).eval()
        assert torch.allclose(model(X), wanted, atol=1e-5)
        assert "it was merged" in model.notes[0]
        model.save(tmp_path / "m.safetensors")
        assert torch.equal(load_released(str(tmp_path / "m.safetensors"), None, task).eval()(X), model(X))
        # The adapter alone, and one that is a pickle.
        (tmp_path / "both" / "config.json").rename(tmp_path / "config.json")
        with pytest.raises(HoldfastError, match=r"adapter without its model.*merge_and_unload"):
            load_released(f"hf:{tmp_path}/both", None, task)
        (tmp_path / "config.json").rename(tmp_path / "both" / "config.json")
        (tmp_path / "both" / "adapter_model.safetensors").rename(tmp_path / "both" / "adapter_model.bin")
        with pytest.raises(HoldfastError, match="no adapter_model"):
            load_released(f"hf:{tmp_path}/both", None, task)

    def test_weights_under_a_wrappers_names(self, vit, tmp_path):
        folder, outputs = vit
        state = load_file(folder / "model.safetensors")
        save_file({f"module.{n}": v for n, v in state.items()}, tmp_path / "w.safetensors")
        model = load_released(f"hf:{folder}", tmp_path / "w.safetensors", task_of(["cat", "dog", "sea lion"])).eval()
        assert torch.allclose(model(X), outputs, atol=1e-6)
        assert any("begin with 'module.'" in note for note in model.notes)

    def test_options_without_effect(self, vit, tmp_path):
        folder, _ = vit
        spec = ModelSpec(name=f"hf:{folder}", weights=str(folder / "model.safetensors"), options={"num_labels": 5})
        with pytest.raises(HoldfastError, match="num_labels replaces the model's own head"):
            load_model(spec, task_of(["cat", "dog", "emu"]))

    def test_a_folder_of_something_else(self, vit, tmp_path, denoiser):
        folder, _ = vit
        denoiser.save_pretrained(tmp_path / "ddpm")
        task = task_of(["cat", "dog", "sea lion"])
        with pytest.raises(HoldfastError, match=r"holds a diffusers pipeline.*diffusers:"):
            load_released(f"hf:{tmp_path}/ddpm", None, task)
        with pytest.raises(HoldfastError, match=r"is a folder of transformers; name it hf:"):
            load_released(f"diffusers:{folder}", None, task)
        (tmp_path / "empty").mkdir()
        with pytest.raises(HoldfastError, match="cannot be loaded"):
            load_released(f"hf:{tmp_path}/empty", None, task)
        (tmp_path / "timm").mkdir()
        (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 3}))
        with pytest.raises(HoldfastError, match=r"a model of timm.*timm:resnet18"):
            load_released(f"hf:{tmp_path}/timm", None, task)
