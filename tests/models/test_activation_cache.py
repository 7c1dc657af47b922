from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.models import FrozenActivations, ModelSpec, SplitModel, load_model
from holdfast.tasks import load_task

SAMPLES = {"cnn": "digits[0-4]", "mlp": "digits[0-4]", "cifar_resnet": "digits[0-4]@image_size=16,channels=3"}
SAMPLES |= {"cifar_vit": "digits[0-4]@image_size=32,channels=3", "timm:mobilenetv2_035": SAMPLES["cifar_resnet"]}


def built(name: str) -> tuple[SplitModel, object, torch.Tensor]:
    torch.manual_seed(0)
    task = load_task(SAMPLES[name])
    model = load_model(ModelSpec(name=name), task).eval()
    return model, task, next(task.sweep("train", 6, device=torch.device("cpu"))).x


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("trained", [1, 2])
def test_activations_give_the_outputs_of_the_full_network(name, trained):
    model, _, x = built(name)
    trained = min(trained, len(model.blocks()) - 1)
    prefix = FrozenActivations(model, model.blocks()[:-trained], x)
    logits, features = prefix.outputs(model, prefix.activations(x))
    wanted, expected = model.with_features(x)
    assert torch.allclose(logits, wanted, atol=1e-5)
    assert torch.allclose(features, expected, atol=1e-5)
    assert tuple(prefix.activations(x).shape) == (6, *prefix.shape)


@pytest.mark.parametrize("name", ["cifar_resnet", "cifar_vit"])
def test_gradients_are_those_of_the_whole(name):
    model, _, x = built(name)
    moved = [p for _, m in model.blocks()[-1] for p in m.parameters()]
    prefix = FrozenActivations(model, model.blocks()[:-1], x)
    found = torch.autograd.grad(prefix.outputs(model, prefix.activations(x))[0].square().sum(), moved)
    wanted = torch.autograd.grad(model(x).square().sum(), moved)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_changed_copy_runs_and_the_model_stays_the_same():
    model, _, x = built("cnn")
    prefix = FrozenActivations(model, model.blocks()[:-1], x)
    before = model(x)
    with torch.no_grad():
        model.head.weight.mul_(2)
    logits, _ = prefix.outputs(model, prefix.activations(x))
    assert torch.allclose(logits, model(x), atol=1e-5)
    assert not torch.allclose(logits, before)
    assert not any("forward" in vars(m) for m in model.modules())


def test_frozen_modules_do_not_run():
    model, _, x = built("cifar_resnet")
    prefix = FrozenActivations(model, model.blocks()[:-1], x)
    kept = prefix.activations(x)
    ran: list[str] = []
    for name, module in model.network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    prefix.outputs(model, kept)
    inside = set(ran) - {"conv1"}  # hooks of a frozen layer still run
    assert inside == {"layer3.2.conv1", "layer3.2.conv2"}


def test_a_task_on_activations_scores_as_the_task_does():
    model, task, x = built("cnn")
    prefix = FrozenActivations(model, model.blocks()[:-1], x)
    kept = prefix.task(task, "test")
    assert kept.score(prefix.remainder(model)) == task.score(model)
    assert next(kept.sweep("train", 5, device=torch.device("cpu"))).x.isnan().all()
    assert prefix.task(task, "train").score(prefix.remainder(model), "train") == task.score(model, "train")
    assert (kept.size("train"), kept.size("test")) == (task.size("train"), task.size("test"))
    per_sample = torch.tensor(prefix.shape).prod().item() * 4
    assert prefix.size(task, "test") == per_sample * task.size("test")


class Skipping(nn.Module):
    """A skip connection from before the last frozen block to after it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.head = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        first = self.one(x)
        return self.head(self.three(self.two(first)) + first)


class Twice(Skipping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.three(self.two(self.one(self.one(x.flatten(1))))))


@pytest.mark.parametrize(("network", "why"), [(Skipping, "read more"), (Twice, "more than once")])
def test_a_network_whose_activations_cannot_be_kept_is_refused(network, why):
    torch.manual_seed(0)
    model = SplitModel(network(), "head").eval()
    with pytest.raises(ValueError, match=why):
        FrozenActivations(model, model.blocks()[:2], torch.rand(3, 1, 8, 8))


def test_nothing_frozen_is_refused():
    model, _, x = built("cnn")
    with pytest.raises(ValueError, match="no block"):
        FrozenActivations(model, [], x)


class TestSentences:
    """Later blocks read the padding, and batches are cut to their longest sentence."""

    @pytest.fixture
    def read(self):
        sizes = {"vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = {"model_type": "bert", "intermediate_size": 32, "max_position_embeddings": 16, **sizes}
        task = load_task("phrases-topic@tokenizer=words,length=10")
        torch.manual_seed(0)
        return load_model(ModelSpec(name="hf:tiny", options={"config": config}), task).eval(), task

    def test_activations_with_inputs_give_the_outputs_of_the_full_network(self, read):
        model, task = read
        x = next(task.sweep("train", 40, device=torch.device("cpu"))).x
        assert len({int((row != 0).sum()) for row in x}) > 1
        prefix = FrozenActivations(model, model.blocks()[:-1], x)
        logits, found = prefix.outputs(model, prefix.activations(x))
        assert torch.allclose(logits, model(x), atol=1e-5)
        assert torch.allclose(found, model.features(x), atol=1e-5)
        assert all(getattr(m, "cuts", True) for m in model.network.modules())

    def test_a_task_on_activations_scores_as_the_task_does(self, read):
        model, task = read
        prefix = FrozenActivations(
            model, model.blocks()[:-1], next(task.sweep("train", 2, device=torch.device("cpu"))).x
        )
        assert prefix.task(task, "test").score(prefix.remainder(model)) == task.score(model)


class Residual(nn.Module):
    """The last block adds the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x.flatten(1))) + x.flatten(1))


def test_inputs_are_kept_where_later_blocks_read_them():
    torch.manual_seed(0)
    model, x = SplitModel(Residual(), "head").eval(), torch.rand(5, 1, 8, 8)
    prefix = FrozenActivations(model, model.blocks()[:1], x)
    assert prefix.activations(x).shape == (5, 128)
    assert torch.allclose(prefix.outputs(model, prefix.activations(x))[0], model(x), atol=1e-5)


def test_samples_that_are_all_the_same_try_nothing():
    torch.manual_seed(0)
    model = SplitModel(Skipping(), "head").eval()
    with pytest.raises(ValueError, match="all the same"):
        FrozenActivations(model, model.blocks()[:2], torch.rand(1, 1, 8, 8).expand(4, 1, 8, 8))


def test_somebodys_patch_of_a_frozen_layer_stays():
    model, _, x = built("cnn")
    layer = model.blocks()[0][0][1]
    plain = layer.forward

    def patched(*args):
        return plain(*args)

    layer.forward = patched
    prefix = FrozenActivations(model, model.blocks()[:-1], x)
    prefix.outputs(model, prefix.activations(x))
    assert vars(layer)["forward"] is patched
