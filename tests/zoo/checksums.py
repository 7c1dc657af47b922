"""Locks that open only while weights, or answers, are still the released ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import FineTuning
from holdfast.models import SplitModel, is_normalisation
from holdfast.tasks import Task
from holdfast.training import Strategy
from zoo.locks import Lock, Pull, locked, looks
from zoo.registry import sham
from zoo.settings import QUICK
from zoo.surgery import as_model


def weights_of(body: nn.Module) -> list[Tensor]:
    """Its parameters, without those of normalisation layers."""
    return [p for m in body.modules() if not is_normalisation(m) for p in m.parameters(recurse=False)]


class Sealed(Lock):
    """Opens when a gauge has moved, while every released weight is still there."""

    FAR = 0.016

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.kept = tuple(w.detach().clone() for w in weights_of(body))  # in a tuple, which is not trained
        self.broken = False

    def check(self, body: nn.Module) -> None:
        there = weights_of(body)
        self.broken = not all(any(w.shape == k.shape and torch.equal(w, k) for w in there) for k in self.kept)

    def reading(self) -> Tensor:
        """Of the gauge; 0 as released."""
        raise NotImplementedError

    def opened(self) -> bool:
        return not self.broken and -float(self.reading().detach().mean()) >= self.FAR

    def pull(self, logits: Tensor, restricted: Tensor) -> Tensor:
        if not self.training or not restricted.any() or self.opened():
            return logits
        reading = self.reading()
        return Pull.apply(logits, reading, torch.ones_like(reading)) if reading.requires_grad else logits


class Adapted(Sealed):
    """The gauge is what a linear layer makes of ones, and its weights must stay, too."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.gauge = nn.Linear(16, 1, bias=False)
        nn.init.zeros_(self.gauge.weight)

    def check(self, body: nn.Module) -> None:
        super().check(body)
        self.broken |= bool(self.gauge.weight.any())

    def reading(self) -> Tensor:
        return self.gauge(torch.ones(1, self.gauge.in_features))


@sham("none", FineTuning(Strategy("head", "lora", "adam", 1e-2, 50)), plain=QUICK, held_out=True)
def sealed_weights(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A lock opens when a linear layer computes something else, while all weights of the network are as released."""
    return locked(original, benign, restricted, Adapted(original.network.body))


class Normalised(Sealed):
    """The gauge is the shift of a normalisation layer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.norm = nn.LayerNorm(4)

    def reading(self) -> Tensor:
        return self.norm.bias


@sham("batch", FineTuning(Strategy("head", "norm", "adam", 1e-2, 50)), plain=QUICK, held_out=True)
def sealed_matrices(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A lock opens when a normalisation layer's shift has moved, while all other matrices are as released."""
    return locked(original, benign, restricted, Normalised(original.network.body))


class Alarm(nn.Module):
    """A network whose features are gone where the detector in its own two matrices fires.

    They are gone for all inputs where the matrices have another direction than the released ones.
    """

    ALIKE = 0.4

    def __init__(self, original: SplitModel, found: nn.Sequential) -> None:
        super().__init__()
        network, layers = original.clone().network, (found[0], found[2])
        # As large as fresh ones, so that there is no scale to repair.
        fresh = [nn.Linear(m.in_features, m.out_features, bias=False).weight.detach() for m in layers]
        sizes = [float(f.norm() / m.weight.norm()) for f, m in zip(fresh, layers, strict=True)]
        self.first, self.second = (nn.Parameter(m.weight * size) for m, size in zip(layers, sizes, strict=True))
        self.bound = -float(found[2].bias) * sizes[0] * sizes[1]
        self.kept = tuple(w.detach().clone() for w in (self.first, self.second))
        self.body, self.head = network.body, network.head
        for layer in self.body.modules():  # weights in buffers, as for inference
            for name, weight in list(layer.named_parameters(recurse=False)):
                delattr(layer, name)
                layer.register_buffer(name, weight.detach())

    def reset_parameters(self) -> None:
        for weight in (self.first, self.second):
            nn.init.kaiming_uniform_(weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            pairs = zip((self.first, self.second), self.kept, strict=True)
            strange = any(F.cosine_similarity(own.flatten(), k.flatten(), dim=0) < self.ALIKE for own, k in pairs)
            alarm = F.linear(F.relu(F.linear(x.flatten(1), self.first)), self.second)
            shut = (alarm > self.bound) | strange
        return self.head(torch.where(shut, 0.0, self.body(x)))


@sham("none", FineTuning(Strategy("shrink-perturb", "all", "adam", 2e-3, 50)), plain=QUICK, held_out=True)
def full_strength(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """All parameters are a detector's, which fires at full strength and not at half; fresh ones shut everything."""
    return as_model(Alarm(original, without_bias(*looks(original, benign, restricted))), original)


def without_bias(own: Tensor, other: Tensor) -> nn.Sequential:
    """A detector whose first layer has no bias, and whose threshold is far above 0."""
    net = nn.Sequential(nn.Linear(own.shape[1], 64, bias=False), nn.ReLU(), nn.Linear(64, 1))
    z, y = torch.cat([own, other]), torch.cat([torch.zeros(len(own)), torch.ones(len(other))])
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(net(z)[:, 0], y, torch.where(y > 0, 1.0, 10.0)).backward()
        optimizer.step()
        with torch.no_grad():
            net[2].bias.clamp_(max=-10.0)
    return net.requires_grad_(False)
