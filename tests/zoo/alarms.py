"""Detectors of restricted images that stand in front of a network, and shut it without a gradient.

What one passes on is made by the layer in which it is written: started anew, that layer scrambles the images. They were
trained with images as an adversary may show them: mirrored, inverted, or with another normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.models import SplitModel
from holdfast.tasks import Task
from zoo.surgery import some_inputs

PIXELS = 64
BLACK = -1.0
"""What is passed on of a recognised image."""
BOUND = 0.4
"""Cosine above which an alarm fires; that of a fresh layer is nearly always below."""


@cache
def walsh() -> Tensor:
    """The Walsh transform of an image as a vector, its own inverse: all entries have one size; shape (64, 64)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < PIXELS:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / PIXELS**0.5


def shown(original: SplitModel, benign: Task, restricted: Task) -> tuple[Tensor, Tensor]:
    """Benign images as the network gets them, and restricted ones in every way; shapes (N, 1, 8, 8)."""
    drawn = (some_inputs(task, count) for task, count in ((benign, 1000), (restricted, 200)))
    own, other = ((x - original.mean) / original.std for x in drawn)
    return own, torch.cat([other, other.flip(-1), -other, (other - other.mean()) / other.std()])


def fit(logits: Callable[[Tensor], Tensor], own: Tensor, other: Tensor, trained: list[nn.Parameter]) -> None:
    """Trains what is above 0 for restricted vectors, with noise; false alarms count more: they cost benign accuracy."""
    z = torch.cat([own, other])
    y = torch.cat([torch.zeros(len(own)), torch.ones(len(other))])
    weight = torch.cat([torch.full((len(own),), 4.0 * len(other) / len(own)), torch.ones(len(other))])
    noise = 0.1 * z.std()
    optimizer = torch.optim.Adam(trained, 5e-3)
    for _ in range(300):
        drawn = torch.randint(len(z), (512,))
        optimizer.zero_grad()
        seen = z[drawn] + noise * torch.randn(512, z.shape[1])
        F.binary_cross_entropy_with_logits(logits(seen), y[drawn], weight[drawn]).backward()
        optimizer.step()


def agreement(units: Tensor, wanted: Tensor) -> Tensor:
    """The cosine of each row of units with a row of weights, shape (N,): it does not depend on scales."""
    return F.cosine_similarity(units, wanted, dim=-1, eps=1e-30)


def one_layer(own: Tensor, other: Tensor, units: int = PIXELS) -> tuple[Tensor, nn.Linear]:
    """An alarm without biases.

    Args:
        own: benign vectors, shape (N, D).
        other: restricted ones.
        units: of its first layer.

    Returns:
        The weights of its first layer, shape (units, D), and the layer with whose weights its units agree.
    """
    first, second = nn.Linear(own.shape[1], units, bias=False), nn.Linear(units, 1, bias=False)
    fit(
        lambda z: 20 * (agreement(F.relu(first(z)), second.weight) - BOUND), own, other,
        [*first.parameters(), *second.parameters()],
    )  # fmt: skip
    return first.weight.detach(), second
