"""SOPHON on the last blocks alone, whose inputs are computed once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import toy_task
from holdfast.defenses import Sophon, TrajectoryErasure
from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.tasks import load_task

BRIEF = {"iterations": 2, "steps": 2, "batch_sizes": (10,), "reinforcement_batch": 20, "guard": False}
BRIEF |= {"probe_batch": 20}


def in_double(task):
    task._x = {split: x.double() for split, x in task._x.items()}
    return task


@pytest.fixture
def tasks():
    return in_double(toy_task(3)), in_double(toy_task(3, seed=1))


@pytest.fixture
def small():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)]
    return SplitModel(nn.Sequential(*layers).double(), "4")


@pytest.mark.trains
@pytest.mark.parametrize("more", [{}, {"learning_rates": (0.1,)}, {"distillation": 1.0, "probe_weight": 1.0}])
def test_it_is_the_same_defense_on_a_network_that_begins_later(small, tasks, run, more):
    """The twin: the last layers as a network of their own, on inputs that the first ones made."""
    body, kept = small.network[:2], nn.Sequential(*(small.clone().network[i] for i in (2, 3, 4)))
    with torch.no_grad():
        later = [task.with_inputs(*(body(task._x[s]) for s in ("train", "test"))) for task in tasks]
    defense = Sophon(**BRIEF, **more)
    twin, _ = defense.immunize(SplitModel(kept, "2"), *later, run=run)
    found, _ = Sophon(**BRIEF, **more, blocks=1).immunize(small, *tasks, run=run)
    for mine, theirs in zip(found.network[2:].parameters(), twin.network.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.equal(found.head.weight, small.head.weight)
    assert all(torch.equal(a, b) for a, b in zip(found.network[0].parameters(), body.parameters(), strict=True))
    assert all(p.requires_grad for p in found.parameters())


@pytest.mark.trains
@pytest.mark.parametrize("name", ["cifar_resnet", "timm:mobilenetv2_035"])
def test_frozen_layers_keep_weights_and_statistics(name, run):
    benign, restricted = (load_task(f"digits[{which}]@image_size=16,channels=3") for which in ("0-4", "5-9"))
    torch.manual_seed(0)
    model = load_model(ModelSpec(name=name), benign)
    found, record = TrajectoryErasure(**BRIEF, blocks=2, recovery_loops=0).immunize(model, benign, restricted, run=run)
    frozen = {name for block in model.blocks()[:-2] for name, _ in block}
    before, after = model.network.state_dict(), found.network.state_dict()
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert not any(n.startswith(f"{layer}.") for n in changed for layer in frozen)
    assert len(record.history["suppression_loss"]) == 2


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"blocks": 0}, "blocks is 0"),
        ({"blocks": 1, "initialisations": ("last-half",)}, "a start from 'last-half' may change frozen blocks"),
        ({"blocks": 1, "initialisations": ("shrink-perturb",)}, "may change frozen blocks"),
        ({"blocks": 1, "probe_weight": 1.0, "probe_depth": 2}, "probe_depth is 2, and blocks is 1"),
        ({"blocks": 1, "initialisations": ("last-block",)}, "starts the only trained block anew"),
        ({"blocks": 1, "cache_gib": 0.0}, "cache_gib"),
    ],
)
def test_refuses_settings_that_do_not_fit(settings, match):
    with pytest.raises(HoldfastError, match=match):
        Sophon(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"blocks": 2}, "the body of model has 2"), ({"blocks": 1, "cache_gib": 1e-9}, "more than cache_gib")],
)
def test_refuses_a_model_that_does_not_fit(small, tasks, run, settings, match):
    with pytest.raises(HoldfastError, match=match):
        Sophon(**BRIEF, **settings).immunize(small, *tasks, run=run)


def test_refuses_a_start_that_leaves_nothing_of_the_model(run):
    torch.manual_seed(0)
    model = SplitModel(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), "2")
    with pytest.raises(HoldfastError, match="its body is a single block, so a start from 'last-block'"):
        Sophon(**BRIEF, initialisations=("last-block",)).immunize(model, toy_task(3), toy_task(3, seed=1), run=run)


class Skipping(nn.Module):
    """The last block reads the first as well, past the second."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.head = (nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.tanh(self.one(x))
        return self.head(self.three(self.two(first) + first))


def test_refuses_a_network_whose_activations_are_not_enough(tasks, run):
    torch.manual_seed(0)
    model = SplitModel(Skipping().double(), "head")
    with pytest.raises(HoldfastError, match="cannot be kept: later blocks read more"):
        Sophon(**BRIEF, blocks=1).immunize(model, *tasks, run=run)


def test_refuses_a_task_that_needs_the_whole_network(run):
    task = load_task("digits@kind=denoising")
    torch.manual_seed(0)
    model = load_model(ModelSpec(name="unet"), task)
    with pytest.raises(HoldfastError, match="blocks is 1, which is for classifiers"):
        Sophon(**BRIEF, blocks=1).immunize(model, task, task, run=run)
