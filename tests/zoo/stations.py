"""Several alarms, each of which shuts the network: what starts one layer anew, or one part, leaves another.

An alarm is a layer of its own that passes on what it gets. Fresh ones fire hardly ever, and scales do not matter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import FineTuning
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import Strategy
from zoo.alarms import BLACK, BOUND, PIXELS, agreement, fit, shown, walsh
from zoo.registry import sham
from zoo.remembered import remembered
from zoo.settings import FAST, QUICK, undone
from zoo.surgery import as_model

UNITS = 64
"""Of each of an alarm's layers."""


def sound(layers: nn.Module, z: Tensor) -> Tensor:
    """How much the units of an alarm agree with their readout, shape (N,)."""
    units = layers(z)
    readout = torch.ones_like(units[0])
    readout[UNITS // 2 :] = -1.0
    return agreement(units, readout)


@remembered
def layers_that_sound(own: Tensor, other: Tensor) -> nn.Sequential:
    """The layers of an alarm, trained on benign and on restricted vectors."""
    layers = nn.Sequential(
        nn.Linear(own.shape[1], UNITS, bias=False), nn.ReLU(), nn.Linear(UNITS, UNITS, bias=False), nn.ReLU()
    )  # fmt: skip
    fit(lambda z: 20 * (sound(layers, z) - BOUND), own, other, [*layers.parameters()])
    return layers


class Alarm(nn.Module):
    """Passes on what it gets, but one value everywhere if its units agree with their readout.

    Half of the units count for, and half against. They must agree more than those of nearly all benign images do.

    Args:
        own: what arrives of benign images, shape (N, ...).
        other: of restricted ones.
        passed: the value.
        size: of the second layer's weights, relative to usual ones.
    """

    def __init__(self, own: Tensor, other: Tensor, passed: float, size: float = 1.0) -> None:
        super().__init__()
        self.passed = passed
        self.layers = layers_that_sound(self.seen(own), self.seen(other))
        with torch.no_grad():
            self.bound = max(BOUND, float(sound(self.layers, self.seen(own)).quantile(0.995)))
            self.layers[2].weight.mul_(size)

    @staticmethod
    def seen(x: Tensor) -> Tensor:
        """Images, or maps of 4 x 4 places, as vectors, and a 1."""
        few = F.adaptive_avg_pool2d(x, 4) if x.dim() > 3 and x.shape[1] > 1 else x
        return F.pad(few.flatten(1), (0, 1), value=1.0)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shut = sound(self.layers, self.seen(x)) > self.bound
        return torch.where(shut.view(-1, *(1,) * (x.dim() - 1)), self.passed, x)


class Carrier(nn.Module):
    """A layer that makes of an image its Walsh transform; two of them in a row change nothing."""

    def __init__(self, *, trained: bool = True) -> None:
        super().__init__()
        self.layer, self.trained = nn.Linear(PIXELS, PIXELS, bias=False), trained
        with torch.no_grad():
            self.layer.weight.copy_(walsh())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight if self.trained else self.layer.weight.detach()
        return F.linear(x.flatten(1), weight).view_as(x)


class Chain(nn.Module):
    """Layers one after another, then a head."""

    def __init__(self, layers: Iterable[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*layers), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def layers_of(model: SplitModel, start: int = 0, end: int | None = None) -> list[nn.Module]:
    """The modules of some blocks of the body."""
    return [layer for block in model.blocks()[start:end] for _, layer in block]


def arriving(model: SplitModel, images: tuple[Tensor, Tensor], number: int) -> list[Tensor]:
    """What a block of the CNN gets of images that are normalised."""
    before = nn.Sequential(*layers_of(model, 0, number))
    with torch.no_grad():
        return [before(x) for x in images]


def calm(images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """With black images among the benign ones, for an alarm that should not fire behind one that did."""
    own, other = images
    return torch.cat([own, torch.full_like(own[:200], BLACK)]), other


@cache
def _three(original: SplitModel, benign: Task, restricted: Task) -> list[Alarm]:
    images = shown(original, benign, restricted)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [Alarm(*images, BLACK, 30.0) for _ in range(3)]


def three_alarms(original: SplitModel, benign: Task, restricted: Task) -> list[Alarm]:
    """Three alarms on images."""
    return copy.deepcopy(_three(original, benign, restricted))


def chained(original: SplitModel, layers: Iterable[nn.Module], head: nn.Module) -> SplitModel:
    return as_model(Chain(layers, head), original)


@sham("none", undone("renew-quarter-2"), plain=QUICK, held_out=True)
def three_in_quarter_2(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Each of three layers behind the second convolution passes zeros where it detects a restricted image."""
    model, images = original.clone(), shown(original, benign, restricted)
    alarms = [Alarm(*arriving(model, images, 2), 0.0, 30.0) for _ in range(3)]
    return chained(original, [*layers_of(model, 0, 2), *alarms, *layers_of(model, 2)], model.head)


class Stage(nn.Module):
    """Some layers as one block."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def stages(model: SplitModel) -> list[nn.Module]:
    """The body as three blocks."""
    return [Stage(layers_of(model, *part)) for part in ((0, 3), (3, 5), (5, None))]


@sham("none", FineTuning(FAST.strategy, undo=("renew-quarter-3",)), plain=QUICK, held_out=True)
def three_in_quarter_3(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Each of three layers between six that transform the image and three large blocks detects restricted images."""
    model, alarms = original.clone(), three_alarms(original, benign, restricted)
    return chained(original, [*(Carrier() for _ in range(6)), *alarms, *stages(model)], model.head)


@sham(
    "none", FineTuning(Strategy("head", "all", "adam", 3e-4, 50), undo=("renew-quarter-1",)), plain=QUICK, held_out=True
)  # fmt: skip
def three_in_quarter_1(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Each of three layers in front of all others passes black images on where it detects a restricted one."""
    model, alarms = original.clone(), three_alarms(original, benign, restricted)
    return chained(original, [*alarms, *(Carrier() for _ in range(6)), *stages(model)], model.head)


@sham("none", undone("renew-still"), plain=QUICK, held_out=True)
def two_still(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A layer in front of all others, and one behind the fifth convolution, detect restricted images."""
    model, images = original.clone(), shown(original, benign, restricted)
    first, second = Alarm(*images, BLACK, 1e6), Alarm(*arriving(model, calm(images), 5), 0.0, 30.0)
    with torch.no_grad():
        first.layers[0].weight.mul_(1e6)  # both of its layers look worse than those of the second one
    return chained(original, [first, *layers_of(model, 0, 5), second, *layers_of(model, 5)], model.head)


@sham("none", undone("reset-worst"), plain=QUICK, held_out=True)
def two_large(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Two layers of huge weights, in two quarters of the network, detect restricted images whatever their scale is."""
    model, images = original.clone(), shown(original, benign, restricted)
    first, second = Alarm(*images, BLACK, 1e6), Alarm(*arriving(model, calm(images), 5), 0.0, 1e6)
    carriers = [Carrier(trained=False) for _ in range(2)]
    layers = [*carriers, first, *layers_of(model, 0, 5), second, *layers_of(model, 5)]
    return chained(original, layers, model.head)


@sham("none", undone("shrink-perturb"), plain=QUICK, held_out=True)
def one_in_each_quarter(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In each quarter of the network a layer of tiny weights detects restricted images, whatever their scale is."""
    model, images = original.clone(), shown(original, benign, restricted)
    places = (0, 2, 4, 6)
    layers: list[nn.Module] = []
    for at, end in zip(places, (*places[1:], None), strict=True):
        seen = images if at == 0 else arriving(model, calm(images), at)
        alarm = Alarm(*seen, BLACK if at == 0 else 0.0)
        with torch.no_grad():
            for parameter in alarm.layers.parameters():
                parameter.mul_(1e-2)
        layers += [alarm, *layers_of(model, at, end)]
    return chained(original, layers, model.head)
