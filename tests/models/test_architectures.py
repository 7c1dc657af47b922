"""Every architecture of the table in docs/models.md works in the pipeline, at 32 and at 64 pixels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from holdfast.defenses.sophon.simulation import Simulation
from holdfast.losses import inverse_cross_entropy
from holdfast.models import ModelSpec, every_tensor, load_model
from holdfast.tasks import ArrayTask
from holdfast.training import Strategy, finetune, prepare

NARROW = {"channels": (8, 16, 32, 64)}
ARCHITECTURES = {
    "cifar_resnet": ({}, "linear"),
    "cifar_vgg": ({"depth": 11}, "head"),
    "cifar_vit": ({"depth": 2}, "mlp_head.1"),
    "mnist_cnn": ({}, "fc2"),
    "small_caformer": ({"drop_path": 0.3}, "head.fc.fc2"),
    "timm:resnet10t": (NARROW, "fc"),
    "timm:resnet18": ({**NARROW, "layers": (1, 2, 1, 1)}, "fc"),
    "timm:resnet50": ({**NARROW, "layers": (1, 2, 1, 1)}, "fc"),
    "timm:vgg11_bn": ({"mlp_ratio": 0.01, "drop_rate": 0.5}, "head.fc"),  # 10 in place of 129 million weights
    "timm:mobilenetv3_small_100": ({"drop_path_rate": 0.3}, "classifier"),
    "timm:convnext_atto": ({"drop_path_rate": 0.3, "depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}, "head.fc"),
    "timm:vit_tiny_patch16_224": ({"patch_size": 8, "depth": 3}, "head"),
    "timm:swin_tiny_patch4_window7_224": ({"embed_dim": 24, "num_heads": (1, 2, 4, 8)}, "head.fc"),
    "timm:caformer_s18": ({}, "head.fc.fc2"),
}
"""Options, for small networks where possible, and the head's name."""

RANDOM = {
    "cifar_vgg", "cifar_vit", "small_caformer", "timm:vgg11_bn", "timm:mobilenetv3_small_100", "timm:convnext_atto",
    "timm:swin_tiny_patch4_window7_224",
}  # fmt: skip
"""Architectures with dropout or stochastic depth in training."""


def images(size, count=12, classes=4):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), np.arange(count) % classes
    return ArrayTask("noise", x, y, x[:classes], y[:classes])


# Options cannot make timm's CAFormer smaller: at 32 pixels, only the small one is built, of the same layers.
SIZES = [(n, s) for n in ARCHITECTURES for s in (32, 64) if (n, s) != ("timm:caformer_s18", 32)]


def of_sizes(pairs):
    return pytest.mark.parametrize("built", pairs, indirect=True, scope="module", ids=[f"{n}-{s}" for n, s in pairs])


EVERY_SIZE = of_sizes(SIZES)
EVERY_NAME = of_sizes([(n, s) for n, s in SIZES if s == 32 or n == "timm:caformer_s18"])
SMALL = of_sizes([(n, s) for n, s in SIZES if s == 32])


@pytest.fixture(scope="module")
def built(request):
    name, size = request.param
    task = images(size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return name, load_model(ModelSpec(name=name, options=ARCHITECTURES[name][0]), task), task


def batch(task):
    return next(task.batches("test", 4, device=torch.device("cpu"))).x


def tensors(model):
    return {name: tensor.clone() for name, tensor in every_tensor(model.network)}


def unchanged(before, model):
    after = dict(every_tensor(model.network))
    return before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


@EVERY_NAME
def test_head_is_found_and_starts_anew_as_a_fine_tuners_does(built):
    """A fresh head equals that of timm's `reset_classifier`: torch's default, whatever the other layers have."""
    name, model, _ = built
    assert (model.head_name, model.num_outputs) == (ARCHITECTURES[name][1], 4)
    copy = model.clone()
    torch.manual_seed(1)
    if "caformer" in name:
        nn.Linear(model.head.in_features // 4, model.head.in_features)  # timm draws the layer before the head as well
    copy.reset_head(7)
    assert copy.num_outputs == 7
    assert not torch.equal(copy.head.weight[:4], model.head.weight)
    if name.startswith("timm:"):
        theirs = model.clone().network
        torch.manual_seed(1)
        theirs.reset_classifier(7)
        assert torch.equal(copy.head.weight, theirs.get_submodule(model.head_name).weight)


@SMALL
def test_training_and_evaluation_mode(built):
    name, model, task = built
    model, x = model.clone(), batch(task)
    before = tensors(model)
    with torch.no_grad():
        model.eval()
        first, second = model(x), model(x)
        assert torch.equal(first, second)
        assert unchanged(before, model)
        model.train()
        passes = [model(x) for _ in range(4)]
    statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert unchanged(before, model) != statistics
    assert all(torch.equal(passes[0], p) for p in passes[1:]) == (name not in RANDOM)


@SMALL
def test_fresh_weights_are_others(built):
    _, model, task = built
    fresh = model.fresh()
    own, theirs = dict(model.network.named_parameters()), dict(fresh.network.named_parameters())
    assert own.keys() == theirs.keys()
    drawn = [
        n for n, p in own.items() if p.dim() > 1 and (p != p.flatten()[0]).any()
    ]  # others are zero or one, by design
    assert drawn
    assert not [n for n in drawn if torch.equal(own[n], theirs[n])]
    assert fresh.eval()(batch(task)).isfinite().all()


@EVERY_NAME
def test_blocks_hold_the_body_once(built):
    _, model, _ = built
    blocks = model.blocks()
    held = [id(p) for block in blocks for _, module in block for p in module.parameters()]
    assert len(held) == len(set(held))
    head = {id(p) for p in model.head.parameters()}
    assert not head & set(held)
    body = sum(p.numel() for p in model.parameters() if id(p) not in head)
    inside = sum(p.numel() for p in model.parameters() if id(p) in set(held))
    assert inside > 0.85 * body  # class token and positions are in no block
    assert len(blocks) >= 3


@SMALL
def test_saving_and_loading_keeps_the_outputs(built, tmp_path):
    _, model, task = built
    model.save(tmp_path / "m.safetensors")
    again = load_model(str(tmp_path / "m.safetensors"), task)
    assert again.facts().sha256 == model.facts().sha256
    with torch.no_grad():
        assert torch.equal(again.eval()(batch(task)), model.eval()(batch(task)))


@pytest.mark.trains
@EVERY_SIZE
def test_a_suppression_loop_leaves_the_model_alone(built):
    _, model, task = built
    model.train()
    before = tensors(model)
    simulation = Simulation(model, inverse_cross_entropy)
    head = {id(p) for p in model.head.parameters()}
    for start in ("direct", "head") if task.input_shape[1] == 32 else ("head",):
        simulation.zero()
        strategy = Strategy(start, "all", "adam", 1e-3, 2)
        seen = simulation.run(task, strategy, 1, None, generator=torch.Generator().manual_seed(0))
        assert np.isfinite(seen.loss)
        assert unchanged(before, model)
        for parameter, gradient in zip(model.parameters(), simulation.gradients(), strict=True):
            if gradient is None:
                assert start == "head"
                assert id(parameter) in head
            else:
                assert gradient.isfinite().all()
        assert any(g is not None and g.any() for g in simulation.gradients())


@pytest.mark.trains
def test_adapters_in_the_transformer_are_scored_as_they_were_trained():
    """In evaluation, PyTorch's own encoder layer reads weights without calling their layers, and so skips adapters."""
    task = images(16)
    model = load_model(ModelSpec(name="cifar_vit", options={"depth": 1}), task)
    strategy = Strategy("direct", "lora", "adam", 0.1, 4)
    prepare(model, strategy, task)
    work = finetune(model, task, strategy, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    for _ in range(2):
        next(work)
    model.eval()
    adapters = {n: m for n, m in model.network.named_modules() if hasattr(m, "lora_B")}
    assert {n.rpartition(".")[2] for n in adapters} == {"proj", "out_proj", "linear1", "linear2"}
    with torch.no_grad():
        for adapter in adapters.values():
            before = model(batch(task))
            adapter.lora_B["default"].weight.zero_()
            assert not torch.equal(before, model(batch(task)))


class TestTable:
    ROW = re.compile(r"^\| `(?P<name>[\w:]+)`(?: with `(?P<options>[^`]+)`)? \| (?P<millions>[\d.]+) \|", re.MULTILINE)

    def rows(self):
        page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
        return [(m["name"], m["options"], float(m["millions"])) for m in self.ROW.finditer(page)]

    def test_sizes_are_as_documented(self):
        """Millions of parameters for ten classes and colour images of 32 pixels, on the meta device."""
        rows = self.rows()
        assert len(rows) > 10
        for name, options, millions in rows:
            given = dict(o.split(": ") for o in options.split(", ")) if options else {}
            given = {k: float(v) if "." in v else int(v) for k, v in given.items()}
            with torch.device("meta"):
                if name.startswith("timm:"):
                    fixed = timm.get_pretrained_cfg(name[5:]).fixed_input_size
                    network = timm.create_model(
                        name[5:], num_classes=10, **({"img_size": 32} if fixed else {}), **given
                    )
                else:
                    from holdfast.models import FAMILIES

                    network = FAMILIES[name].builder((3, 32, 32), 10, **given)
            count = sum(p.numel() for p in network.parameters()) / 1e6
            assert count == pytest.approx(millions, abs=0.0051), name
