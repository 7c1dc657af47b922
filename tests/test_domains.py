"""The real domains that are at hand, end to end: as benign and as restricted tasks, at 32 and at 64 pixels."""

from __future__ import annotations

import math

import pytest
import torch

from holdfast import Sophon, halves
from holdfast.adversaries import FineTuning
from holdfast.models import ModelSpec, load_model
from holdfast.tasks import load_task
from holdfast.training import Strategy

CLASSES = {
    "cifar10": 10,
    "cifar100_objects": 10,
    "cifar100_people_places": 10,
    "imagenette64": 10,
    "mnist[3,8]": 2,
    "mnist[0-3]": 4,
    "stanford_cars40": 40,
    "usps": 10,
}
PAIRS = [
    ("cifar10", "cifar100_objects"),
    ("mnist[3,8]", "cifar100_people_places"),
    ("imagenette64", "stanford_cars40"),
    ("cifar10", "imagenette64"),
    ("imagenette64", "mnist[0-3]"),
    ("imagenette64", "usps"),
]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(("benign_name", "restricted_name"), PAIRS)
def test_immunized_and_attacked(few_data, run, benign_name, restricted_name, size):
    """A round of SOPHON on the defender's half, then an adversary on the other: every step that data takes."""
    benign, restricted = (
        load_task(f"{name}@image_size={size},channels=3,test_limit=60", data_dir=few_data)
        for name in (benign_name, restricted_name)
    )
    for task, name in ((benign, benign_name), (restricted, restricted_name)):
        assert task.input_shape == (3, size, size)
        assert task.num_outputs == CLASSES[name]
        batch = next(task.batches("train", 8, device=run.device))
        assert 0 <= batch.x.min() < 0.4
        assert 0.6 < batch.x.max() <= 1
    theirs, ours = halves(restricted)
    assert theirs.size("train") + ours.size("train") == restricted.size("train")
    with run.seeded("initialise"):
        model = load_model(ModelSpec(name="cnn", options={"width": 8}), benign)
    brief = Sophon(
        iterations=1, steps=2, batch_sizes=(8,), reinforcement_batch=8, initialisations=("head",), guard=False
    )
    immunized, _ = brief.immunize(model, benign, theirs, run=run)
    assert immunized.facts().sha256 != model.facts().sha256
    assert 0 <= benign.score(immunized) <= 1
    adversary = FineTuning(Strategy("head", "all", "adam", 2e-3, 16))
    curve = adversary.attack(immunized, ours.few_shot(5, seed=0), role="immunized", seed=0, budgets=(0, 3), run=run)
    assert all(score is not None and math.isfinite(score) for score in [*curve.scores, curve.losses[1]])
    assert torch.equal(restricted._x["test"], ours._x["test"])
