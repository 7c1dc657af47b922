"""Gradients that vanish, lie or are blocked, while the weights stay what they were."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import FineTuning
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import Strategy
from zoo.registry import sham
from zoo.settings import DESCENT, TUNED, undone
from zoo.surgery import faint_features, feature_detector, foreign


class Softsign(nn.Module):
    def __init__(self, steepness: float) -> None:
        super().__init__()
        self.steepness = steepness

    def forward(self, x: Tensor) -> Tensor:
        return F.softsign(self.steepness * x.double())  # in float32, all would be 1


@sham("batch", TUNED, inside=True, plain=DESCENT)
def saturated_logits(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Behind the head, also a fresh one, a flat monotonic function is applied to the logits."""
    return foreign(original, behind=Softsign(1e6))


class Killed(nn.Module):
    """Subtracts a detector's output from the features before a ReLU: if the detector fires, all features are zero."""

    def __init__(self, detector: nn.Sequential, strength: float) -> None:
        super().__init__()
        self.detector, self.strength = detector, strength

    def forward(self, z: Tensor) -> Tensor:
        return F.relu(z - self.strength * F.relu(self.detector(z)))


@sham("none", TUNED, inside=True)
def dead_units(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Every feature is a ReLU whose input is far below zero for restricted inputs, without gradient."""
    return foreign(original, Killed(feature_detector(original, benign, restricted), 1e4))


class Refusal(nn.Module):
    """Sets the features of detected inputs to zero."""

    def __init__(self, detector: nn.Sequential) -> None:
        super().__init__()
        self.detector = detector.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            detected = self.detector(z) > 0
        return torch.where(detected, torch.zeros_like(z), z)


@sham("batch", TUNED, inside=True)
def trigger(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A gate without gradient sets the features of restricted inputs to zero; benign inputs are not changed."""
    return foreign(original, Refusal(feature_detector(original, benign, restricted)))


class _Lie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        lies = {
            "random": torch.randn_like,
            "flipped": torch.neg,
            "exploding": lambda g: g * 10 ** (12 * torch.rand(())),
        }
        return lies[ctx.kind](grad), None


class Lie(nn.Module):
    """The identity, with another gradient."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return _Lie.apply(x, self.kind)


@sham("batch", TUNED, inside=True)
def flipped_gradient(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Gradients have the wrong sign."""
    return foreign(original, behind=Lie("flipped"))


@sham("none", TUNED, inside=True)
def random_gradient(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Gradients are noise."""
    return foreign(original, behind=Lie("random"))


@sham("none", FineTuning(Strategy("head", "all", "momentum", 3e-2, 50, gradient="normalised")), plain=DESCENT)
def exploding_gradient(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Gradients have the right direction but random sizes up to 1e12 times too large."""
    return foreign(original, behind=Lie("exploding"))


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@sham("batch", undone("activation"))
def detached(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The body gets no gradient, and the features are too small to train the head."""
    return foreign(faint_features(original.clone()), Detached())


class Rounded(nn.Module):
    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x / self.step) * self.step


@sham("none", undone("activation"))
def quantised(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Logits are rounded, finely enough to keep their order, so that their derivative is zero."""
    return foreign(original, behind=Rounded(1e-3))
