"""SOPHON whose first rounds are on smaller images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import toy_task
from holdfast.defenses import Sophon
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, load_model
from holdfast.tasks import load_task

BRIEF = {"iterations": 3, "steps": 2, "batch_sizes": (10,), "reinforcement_batch": 20, "guard_every": 1}
FIRST = {"small_size": 8, "small_rounds": 2}
SEEN: list[tuple[bool, int, int]] = []


class Watched(nn.Module):
    """Averages over all pixels, and notes the mode, and how many images of what size it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SEEN.append((self.training, len(x), x.shape[-1]))
        return self.head(self.convolution(x).relu().mean((2, 3)))


@pytest.fixture
def tasks():
    return [load_task(f"digits[{which}]@image_size=16") for which in ("0-4", "5-9")]


@pytest.mark.trains
def test_first_rounds_train_on_small_images_and_the_guard_measures_on_full_ones(tasks, run):
    torch.manual_seed(0)
    model = SplitModel(Watched(), "head")
    defense = Sophon(**BRIEF, **FIRST, initialisations=("direct",), learning_rates=(1e-3,))
    SEEN.clear()
    found, record = defense.immunize(model, *tasks, run=run)
    trained = [size for training, _, size in SEEN if training]
    a_round = len(trained) // 3
    assert trained == [8] * 2 * a_round + [16] * a_round
    assert {size for training, count, size in SEEN if not training and count > 20} == {16}  # the held-out benign images
    assert None not in record.history["benign_score"]
    assert not torch.equal(found.head.weight, model.head.weight)


@pytest.mark.trains
def test_such_a_round_is_one_on_a_task_of_small_images(tasks, run):
    torch.manual_seed(0)
    model = SplitModel(Watched(), "head")
    brief = {**BRIEF, "iterations": 2, "guard": False}
    _, mixed = Sophon(**brief, small_size=8, small_rounds=1).immunize(model, *tasks, run=run)
    _, small = Sophon(**brief).immunize(model, *(task.as_images(8) for task in tasks), run=run)
    for series in ("suppression_loss", "reinforcement_loss"):
        assert mixed.history[series][0] == pytest.approx(small.history[series][0], rel=1e-5)
        assert mixed.history[series][1] != pytest.approx(small.history[series][1], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"small_size": 8}, "small_rounds is 0 and small_size is 8; give both"),
        ({"small_rounds": 1}, "small_rounds is 1 and small_size is None; give both"),
        ({"small_rounds": 3, "small_size": 8}, "small_rounds is 3; expected fewer than the 3 rounds"),
        ({"small_rounds": -1, "small_size": 8}, "small_rounds is -1"),
        ({**FIRST, "blocks": 2}, "which small_rounds would need for two sizes"),
    ],
)
def test_settings_that_do_not_fit(more, message):
    with pytest.raises(HoldfastError, match=message):
        Sophon(**BRIEF, **more)


def test_tasks_and_networks_that_do_not_fit(tasks, run):
    def immunize(name, benign, restricted, **more):
        Sophon(**BRIEF, **{**FIRST, **more}).immunize(load_model(name, benign), benign, restricted, run=run)

    with pytest.raises(HoldfastError, match="has images of 16x16 pixels; expected a smaller size"):
        immunize("cnn", *tasks, small_size=16)
    with pytest.raises(HoldfastError, match="mnist_cnn does not take such images"):
        immunize("mnist_cnn", *tasks)
    vectors = toy_task(3), toy_task(3, seed=1)
    model = SplitModel(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), "2")
    with pytest.raises(HoldfastError, match="for classification and regression of images"):
        Sophon(**BRIEF, **FIRST).immunize(model, *vectors, run=run)
