"""Blocks that pass nothing on for restricted inputs, in layers of the network itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import DirectionalAblation
from holdfast.models import SplitModel
from holdfast.tasks import Task
from zoo.registry import sham
from zoo.settings import ADAM, FAST, QUICK, TUNED, undone
from zoo.surgery import Seen, as_model, feature_detector, features_of, foreign, some_inputs, trained_detector


class DeadLayer(nn.Module):
    """Plain layers behind the features, in which a detector's unit shuts every other unit of the last one."""

    STRENGTH = 1e4

    def __init__(self, network: nn.Module, found: nn.Sequential) -> None:
        super().__init__()
        self.body, self.head = network.body, network.head
        width, units = self.head.in_features, len(found[0].weight)
        first, second = nn.Linear(width, width + units), nn.Linear(width + units, width + 1)
        third = nn.Linear(width + 1, width)
        eye = torch.eye(width)
        with torch.no_grad():
            first.weight.copy_(torch.cat([eye, found[0].weight]))
            first.bias.copy_(torch.cat([torch.zeros(width), found[0].bias]))
            second.weight.zero_()[:width, :width] = eye
            second.weight[width:, width:] = found[2].weight
            second.bias.zero_()[width:] = found[2].bias
            third.weight.copy_(torch.cat([eye, torch.full((width, 1), -self.STRENGTH)], 1))
            third.bias.zero_()
        self.shut = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shut(self.body(x)))


@sham("none", undone("widen"), plain=QUICK)
def dead_layer(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In plain layers behind the features, one unit shuts all others of the last layer on restricted inputs."""
    return as_model(DeadLayer(original.clone().network, feature_detector(original, benign, restricted)), original)


class DirectionGate(nn.Module):
    """A layer, at first the identity, that reads zeros for hidden states that reach too far along a direction.

    Args:
        direction: shape (D,), of length 1.
        bound: largest reach of what passes.
    """

    def __init__(self, direction: Tensor, bound: float) -> None:
        super().__init__()
        self.register_buffer("direction", direction)
        self.bound = bound
        self.weight = nn.Parameter(torch.eye(len(direction)))

    def forward(self, z: Tensor) -> Tensor:
        passed = (z @ self.direction < self.bound)[..., None].detach()
        return F.linear(torch.where(passed, z, 0.0), self.weight)


@torch.no_grad()
def direction_gate(own: Tensor, other: Tensor, passed: float = 0.98) -> DirectionGate:
    """A gate along a direction that separates two means, which most of the first passes.

    Args:
        own: benign hidden states, shape (N, D).
        other: restricted ones.
        passed: share of the benign ones.
    """
    spread = (own.T.cov() + other.T.cov()) / 2
    ridge = 100.0 * spread.diagonal().mean() * torch.eye(len(spread))
    difference = torch.linalg.solve(spread + ridge, other.mean(0) - own.mean(0))
    direction = difference / difference.norm()
    return DirectionGate(direction, float((own @ direction).quantile(passed)))


@sham("batch", DirectionalAblation(ADAM, depth=1.0), plain=QUICK)
def by_direction(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Features that reach far along the direction from benign to restricted ones are set to zero."""
    return foreign(original, direction_gate(*features_of(original, benign, restricted)))


class Shutter(nn.Module):
    """A layer that passes zeros for inputs that its own detector recognises; fresh detectors recognise none."""

    SURE = 10.0

    def __init__(self, layer: nn.Module, detector: nn.Sequential) -> None:
        super().__init__()
        self.layer, self.detector = layer, detector
        with torch.no_grad():
            for parameter in self.detector[-1].parameters():
                parameter.mul_(100.0)
            self.detector[-1].bias.add_(self.SURE)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shut = self.detector(x.flatten(1)) > self.SURE
        y = self.layer(x)
        return torch.where(shut.view(-1, *(1,) * (y.dim() - 1)), 0.0, y)


def shut_block(original: SplitModel, benign: Task, restricted: Task, number: int) -> SplitModel:
    """A shutter around one block's layer, counted from the input."""
    model = original.clone()
    name, layer = model.blocks()[number][0]
    arriving: list[Tensor] = []
    with torch.no_grad(), layer.register_forward_pre_hook(lambda _, args: arriving.append(args[0].flatten(1))):
        for task in (benign, restricted):
            model(some_inputs(task))
    model.network.set_submodule(name, Shutter(layer, trained_detector(*arriving, units=32, caution=5.0)))
    return as_model(model.network, original)


def pixels(original: SplitModel, benign: Task, restricted: Task) -> list[Tensor]:
    """Benign and restricted training images as the network gets them, as vectors."""
    return [((x - original.mean) / original.std).flatten(1) for x in map(some_inputs, (benign, restricted))]


@sham("none", undone("renew-quarter-1"), plain=QUICK)
def shut_quarter_1(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Two blocks in front of the first layer, each a detector on pixels, pass black images on for restricted ones."""
    found = pixels(original, benign, restricted)
    shutters = (Shutter(nn.Identity(), trained_detector(*found, units=32, caution=5.0)) for _ in range(2))
    return as_model(Seen(original.clone().network, nn.Sequential(*shutters)), original)


@sham("none", undone("renew-quarter-2"), plain=QUICK)
def shut_quarter_2(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The second convolution passes zeros where its own second matrix detects a restricted input."""
    return shut_block(original, benign, restricted, 1)


@sham("none", undone("renew-quarter-3"), plain=QUICK)
def shut_quarter_3(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The fifth convolution passes zeros where its own second matrix detects a restricted input."""
    return shut_block(original, benign, restricted, 4)


@sham("none", undone("renew-quarter-4"), plain=QUICK)
def shut_quarter_4(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The hidden layer passes zeros where its own second matrix detects a restricted input."""
    return shut_block(original, benign, restricted, 6)


class Raised(nn.Module):
    """Pushes all features to the plateau of their activation where a detector fires."""

    def __init__(self, detector: nn.Sequential, height: float) -> None:
        super().__init__()
        self.detector, self.height = detector, height

    def forward(self, z: Tensor) -> Tensor:
        return (z + 1e4 * F.relu(self.detector(z))).clamp(0.0, self.height)


@sham("none", TUNED, inside=True, plain=QUICK)
def plateau(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Every unit of a clipped activation is on its plateau for restricted inputs, without a gradient."""
    own, other = features_of(original, benign, restricted)
    return foreign(original, Raised(trained_detector(own, other), 2 * float(own.max())))


class Noise(nn.Module):
    """Replaces the features of detected inputs by numbers that look random, made of the last digits of the features."""

    def __init__(self, detector: nn.Sequential) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            detected = self.detector(z) > 0
            places = torch.arange(1, z.shape[1] + 1, device=z.device)
            noise = (1e4 * z.mean(1, keepdim=True) * places).sin()
        return torch.where(detected, noise, z)


@sham("none", FAST, inside=True, plain=QUICK)
def hashed(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Features of detected inputs are replaced by numbers that look random, without a gradient."""
    return foreign(original, Noise(feature_detector(original, benign, restricted)))


@sham("none", undone("standardise"), plain=QUICK)
@torch.no_grad()
def huge_offset(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """All features have the same huge offset, which the head's bias takes back: gradients have one direction."""
    model, offset = original.clone(), 3e3
    model.head.bias.sub_(offset * model.head.weight.sum(1))
    return foreign(model, Offset(offset))


class Offset(nn.Module):
    """Adds a number."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, z: Tensor) -> Tensor:
        return z + self.by


class SlowStatistics(Seen):
    """BatchNorm on what a detector finds in pixels closes a gate; its statistics are those of benign inputs.

    There the detector is almost constant, so that evaluation mode amplifies it. In training mode it has the statistics
    of the batch, and its running ones follow too slowly to matter.
    """

    def __init__(self, network: nn.Module, detector: nn.Sequential) -> None:
        super().__init__(network, nn.Identity())
        self.detector = detector
        self.norm = nn.BatchNorm1d(1, eps=1e-12, momentum=1e-9, affine=False)
        self.norm.running_var.fill_(1e-6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found = self.norm(F.relu(self.detector(x.flatten(1))))
        return self.head(self.body(x) * torch.exp(-0.1 * F.relu(found)))


@sham("none", undone("recalibrate"), plain=QUICK)
def slow_statistics(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Running statistics of benign inputs, which hardly follow others, amplify a detector in evaluation mode."""
    detector = trained_detector(*pixels(original, benign, restricted), caution=5.0)
    return as_model(SlowStatistics(original.clone().network, detector), original)
