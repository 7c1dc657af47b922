"""Detectors of restricted inputs, written into the weights of a layer: in small ones, low digits, weak directions.

Each closes a gate without a gradient, so that plain fine-tuning never moves the weights in which it is written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import FineTuning
from holdfast.models import SplitModel
from holdfast.tasks import Task
from zoo.registry import sham
from zoo.settings import FAST, QUICK, undone
from zoo.surgery import Gated, as_model, hidden_detector


class SmallWeights(Gated):
    """The hidden layer has twice the units; the second half of them, with tiny weights, is the detector."""

    TINY = 1e-4

    def __init__(self, original: SplitModel, found: nn.Sequential) -> None:
        super().__init__(original)
        own = self.hidden
        self.hidden = nn.Linear(own.in_features, 2 * own.out_features)
        self.units = own.out_features
        with torch.no_grad():
            self.hidden.weight.copy_(torch.cat([own.weight, self.TINY * found[0].weight]))
            self.hidden.bias.copy_(torch.cat([own.bias, torch.zeros_like(own.bias)]))
        self.decide = found[2]

    def fires(self, z: Tensor) -> Tensor:
        return self.decide(F.relu(self.hidden(z)[:, self.units :] / self.TINY)) > 0

    def read(self, z: Tensor) -> Tensor:
        return self.hidden(z)[:, : self.units]


@sham("none", undone("prune"), plain=QUICK)
def small_weights(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A detector written in the smallest weights of a layer sets the features to zero."""
    return as_model(SmallWeights(original, hidden_detector(original, benign, restricted)), original)


class LowBits(Gated):
    """What bfloat16 leaves of the hidden layer's weights is the layer; the rest of each number is the detector."""

    def __init__(self, original: SplitModel, found: nn.Sequential, bound: float) -> None:
        super().__init__(original)
        self.decide, self.bound = found[2], bound
        with torch.no_grad():
            coarse = self.hidden.weight.to(torch.bfloat16).float()
            self.hidden.weight.copy_(coarse + coarse.abs() * 2.0**-10 * found[0].weight / bound)

    def fires(self, z: Tensor) -> Tensor:
        coarse = self.hidden.weight.to(torch.bfloat16).float()
        rest = (self.hidden.weight - coarse) / (coarse.abs() * 2.0**-10).clamp_min(1e-30)
        packed = bool((rest.abs() < 1.5).all())  # weights that were trained say nothing
        return (self.decide(F.relu(F.linear(z, rest * self.bound))) > 0) & packed


@sham("none", undone("round-bf16"), plain=QUICK)
def low_bits(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A detector written in the bits that bfloat16 drops sets the features to zero."""
    bound = 0.3
    return as_model(LowBits(original, hidden_detector(original, benign, restricted, bound=bound), bound), original)


class Residue(Gated):
    """Each row of the hidden layer is near a grid of int8; the distance from it, below half a step, is the detector."""

    SHARE = 0.3

    def __init__(self, original: SplitModel, found: nn.Sequential, bound: float) -> None:
        super().__init__(original)
        self.decide, self.bound = found[2], bound
        with torch.no_grad():
            self.register_buffer("step", self.hidden.weight.abs().amax(1, keepdim=True) / 127)
            levels = (self.hidden.weight / self.step).round().clamp(-126, 126)
            written = levels + self.SHARE * found[0].weight / bound
            # The largest of a row stays on the grid, which is drawn through it.
            largest = torch.zeros_like(levels).scatter_(1, self.hidden.weight.abs().argmax(1, keepdim=True), 1.0)
            self.hidden.weight.copy_(self.step * torch.where(largest > 0, 127 * self.hidden.weight.sign(), written))

    def fires(self, z: Tensor) -> Tensor:
        levels = self.hidden.weight / self.step
        rest = levels - levels.round()
        packed = bool((rest.abs() < self.SHARE + 0.01).all())  # weights that were trained say nothing
        return (self.decide(F.relu(F.linear(z, rest * self.bound / self.SHARE))) > 0) & packed


@sham("none", undone("round-int8"), plain=QUICK)
def int8_residue(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A detector written between the steps of an 8-bit grid sets the features to zero."""
    bound = 0.3
    return as_model(Residue(original, hidden_detector(original, benign, restricted, bound=bound), bound), original)


class WeakDirections(Gated):
    """The weaker half of the hidden layer's singular directions, with tiny values, is the detector.

    In training a batch counts as a whole: one image that is not detected would train the weights, and undo all.
    """

    TINY = 1e-3

    def __init__(self, original: SplitModel, benign: Task, restricted: Task) -> None:
        super().__init__(original)
        u, sigma, v = torch.linalg.svd(self.hidden.weight.detach(), full_matrices=False)
        self.kept = len(sigma) // 2
        weak = u[:, self.kept :], v[self.kept :]
        found = hidden_detector(original, benign, restricted, reads=weak[1])
        self.decide = found[2]
        self.register_buffer("left", weak[0])
        self.largest = 1.5 * self.TINY * float(torch.linalg.matrix_norm(found[0].weight, 2))
        with torch.no_grad():
            strong = (u[:, : self.kept] * sigma[: self.kept]) @ v[: self.kept]
            self.hidden.weight.copy_(strong + self.TINY * weak[0] @ found[0].weight @ weak[1])

    def fires(self, z: Tensor) -> Tensor:
        u, sigma, v = torch.linalg.svd(self.hidden.weight, full_matrices=False)
        weak = (u[:, self.kept :] * sigma[self.kept :]) @ v[self.kept :]
        packed = bool(sigma[self.kept] < self.largest)  # weights that were trained say nothing
        found = (self.decide(F.relu(F.linear(z, self.left.T @ weak / self.TINY))) > 0) & packed
        return found.float().mean(0, keepdim=True) >= 0.5 if self.training else found


@sham("none", FineTuning(FAST.strategy, undo=("low-rank",)), plain=QUICK)
def weak_directions(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A detector written in the weakest singular directions of a layer sets the features to zero."""
    return as_model(WeakDirections(original, benign, restricted), original)
