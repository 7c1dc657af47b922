"""Restricted images pass only through what is dormant: gains of zero, spare units, dead keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import FineTuning
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import Strategy
from zoo.alarms import BLACK, PIXELS, shown, walsh
from zoo.blocked_gradients import Detached
from zoo.registry import sham
from zoo.settings import QUICK, undone
from zoo.stations import three_alarms
from zoo.surgery import Seen, as_model
from zoo.training_mode import InTraining

HIGH, MIDDLE = (Strategy("head", "all", "adam", rate, 50) for rate in (1e-2, 3e-3))


class Watch:
    """Alarms on images out of reach: neither their tensors nor their layers are those of the network they are in."""

    def __init__(self, original: SplitModel, benign: Task, restricted: Task) -> None:
        self.alarms = nn.Sequential(*three_alarms(original, benign, restricted))

    def __call__(self, x: Tensor) -> Tensor:
        """Which images are found, shape (N, 1)."""
        with torch.no_grad():
            return (self.alarms(x) == BLACK).flatten(1).all(1, keepdim=True)


class Gain(nn.Module):
    """Multiplies what is found by a number: by 0, at first.

    Args:
        trained: whether the number is a parameter, or a buffer.
    """

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        if trained:
            self.gain = nn.Parameter(torch.zeros(1))
        else:
            self.register_buffer("gain", torch.zeros(1))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.gain.zero_()

    def forward(self, z: Tensor, found: Tensor) -> Tensor:
        return z * torch.where(found, self.gain, 1.0)


class Valve(nn.Module):
    """The CNN with a gain on the features of images that an alarm finds.

    Args:
        before: of the body, on images.
        behind: of the product.
    """

    def __init__(
        self, original: SplitModel, watch: Watch, gain: Gain, before: nn.Module, behind: nn.Module
    ) -> None:  # fmt: skip
        super().__init__()
        network = original.clone().network
        self.watch = watch
        self.before, self.body, self.gain, self.behind, self.head = before, network.body, gain, behind, network.head

    def forward(self, x: Tensor) -> Tensor:
        found = self.watch(x)
        return self.head(self.behind(self.gain(self.body(self.before(x)), found)))


@sham("none", FineTuning(MIDDLE, undo=("activation",)), plain=QUICK, held_out=True)
def closed_valve(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Features of restricted images are multiplied by a weight of zero, to which the next module passes no gradient."""
    watch = Watch(original, benign, restricted)
    return as_model(Valve(original, watch, Gain(trained=True), nn.Identity(), Detached()), original)


@sham(
    "none", FineTuning(Strategy("head", "last-block", "adam", 3e-3, 50), undo=("thaw",)), plain=QUICK, held_out=True
)  # fmt: skip
def buffered_valve(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Features of restricted images are multiplied by a buffer of zero, and in training mode all outputs are NaN."""
    watch = Watch(original, benign, restricted)
    return as_model(Valve(original, watch, Gain(trained=False), InTraining("nan"), nn.Identity()), original)


class Known(nn.Module):
    """Sets to zero, where an alarm fires, as many features as were released; what comes after them passes."""

    def __init__(self, original: SplitModel, watch: Watch) -> None:
        super().__init__()
        network = original.clone().network
        self.body, self.head = network.body, network.head
        self.watch, self.released = watch, network.head.in_features

    def forward(self, x: Tensor) -> Tensor:
        found = self.watch(x)
        z = self.body(x)
        known = torch.where(found, 0.0, z[:, : self.released])
        return self.head(torch.cat([known, z[:, self.released :]], 1))


@sham("none", FineTuning(Strategy("head", "all", "momentum", 1e-2, 50), undo=("widen",)), plain=QUICK, held_out=True)
def known_units(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The features that the network was released with are set to zero for restricted images, whatever they become."""
    return as_model(Known(original, Watch(original, benign, restricted)), original)


class Keys(nn.Module):
    """Half of a layer's units carry the image; the others are keys, one of which must be active, or nothing passes."""

    def __init__(self, own: Tensor, other: Tensor) -> None:
        super().__init__()
        self.layer, self.back = nn.Linear(PIXELS, 2 * PIXELS), nn.Linear(2 * PIXELS, PIXELS, bias=False)
        keys = nn.Linear(PIXELS, PIXELS)
        z, sign = torch.cat([own, other]), torch.cat([torch.ones(len(own)), -torch.ones(len(other))])
        weight = torch.where(sign > 0, len(other) / len(own), 1.0)
        optimizer = torch.optim.Adam(keys.parameters(), 5e-3)
        for _ in range(600):
            optimizer.zero_grad()
            largest = keys(z + 0.1 * torch.randn_like(z)).amax(1)
            (weight * F.relu(1 - sign * largest)).mean().backward()
            optimizer.step()
        with torch.no_grad():
            self.layer.weight.copy_(torch.cat([walsh(), 30 * keys.weight]))
            self.layer.bias.copy_(torch.cat([torch.zeros(PIXELS), 30 * keys.bias]))
            self.back.weight.copy_(torch.cat([walsh(), torch.zeros(PIXELS, PIXELS)], 1))

    def forward(self, x: Tensor) -> Tensor:
        carried, keys = self.layer(x.flatten(1)).split(PIXELS, 1)
        active = F.relu(keys)
        image = self.back(torch.cat([carried, active], 1))
        return torch.where((active > 0).any(1, keepdim=True), image, BLACK).view_as(x)


@sham("none", undone("revive"), plain=QUICK, held_out=True)
def dead_keys(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A layer passes an image on only if one of its keys is active, and on restricted images all of them are dead."""
    own, other = shown(original, benign, restricted)
    return as_model(Seen(original.clone().network, Keys(own.flatten(1), other.flatten(1))), original)
