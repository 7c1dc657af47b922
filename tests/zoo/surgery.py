"""What shams are made with: networks with foreign code, parts of an original, detectors of restricted inputs."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.models import SplitModel
from holdfast.tasks import Task
from zoo.remembered import remembered
from zoo.settings import CPU


class Foreign(nn.Module):
    """Custom code: a body, optionally a module in between, a head, optionally a module behind it."""

    def __init__(self, network: nn.Module, between: nn.Module | None = None, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.between = network.body, between or nn.Identity()
        self.head, self.behind = network.head, behind or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.head(self.between(self.body(x))))


class Seen(nn.Module):
    """A network behind a fixed view of its inputs."""

    def __init__(self, network: nn.Module, view: nn.Module) -> None:
        super().__init__()
        self.view, self.body, self.head = view, network.body, network.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.view(x)))


def foreign(original: SplitModel, between: nn.Module | None = None, behind: nn.Module | None = None) -> SplitModel:
    return as_model(Foreign(original.clone().network, between, behind), original)


def as_model(network: nn.Module, original: SplitModel, head: str = "head") -> SplitModel:
    norm = {k: None if v is None else v.flatten().tolist() for k, v in (("mean", original.mean), ("std", original.std))}
    return SplitModel(network, head, name="sham", **norm)


@torch.no_grad()
def faint_features(model: SplitModel, factor: float = 1e-4) -> SplitModel:
    """Makes the features tiny and the head's weights large, so that usual learning rates do not work.

    The last layer of the body is linear and followed by ReLU, so that outputs do not change.
    """
    hidden = [m for m in model.network.modules() if isinstance(m, nn.Linear) and m is not model.head][-1]
    hidden.weight.mul_(factor)
    hidden.bias.mul_(factor)
    model.head.weight.div_(factor)
    return model


def convolutions_with_norm(model: SplitModel) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    modules = list(model.network.modules())
    return [(a, b) for a, b in pairwise(modules) if isinstance(a, nn.Conv2d) and isinstance(b, nn.BatchNorm2d)]


def some_inputs(task: Task, count: int = 400) -> Tensor:
    """Training inputs, drawn with a fixed seed."""
    return next(task.batches("train", count, generator=torch.Generator().manual_seed(0), device=CPU)).x


@remembered
def trained_detector(own: Tensor, other: Tensor, units: int = 64, caution: float = 3.0) -> nn.Sequential:
    """A network of two layers: above 0 for restricted vectors, and for almost no benign ones.

    Args:
        own: benign vectors, shape (N, D).
        other: restricted ones.
        units: of its first layer.
        caution: weight of the benign vectors; false positives cost benign accuracy.
    """
    z, y = torch.cat([own, other]), torch.cat([torch.zeros(len(own)), torch.ones(len(other))])
    net = nn.Sequential(nn.Linear(z.shape[1], units), nn.ReLU(), nn.Linear(units, 1))
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        weight = torch.where(y > 0, 1.0, caution)
        F.binary_cross_entropy_with_logits(net(z)[:, 0], y, weight).backward()
        optimizer.step()
    return net


@torch.no_grad()
def features_of(original: SplitModel, benign: Task, restricted: Task) -> tuple[Tensor, Tensor]:
    """Features of benign and of restricted training inputs."""
    model = original.eval()
    return model.features(some_inputs(benign)), model.features(some_inputs(restricted))


def feature_detector(original: SplitModel, benign: Task, restricted: Task) -> nn.Sequential:
    """A detector of restricted inputs on features."""
    return trained_detector(*features_of(original, benign, restricted))


def parts(original: SplitModel) -> tuple[nn.Module, nn.Linear, nn.Module, nn.Linear]:
    """The original's layers up to its hidden layer, the hidden layer, what follows, and the head."""
    network = original.clone().network
    layers = list(network.body.children())
    place = max(i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    return nn.Sequential(*layers[:place]), layers[place], nn.Sequential(*layers[place + 1 :]), network.head


@remembered
def hidden_detector(
    original: SplitModel,
    benign: Task,
    restricted: Task,
    *,
    bound: float = float("inf"),
    reads: Tensor | None = None,
) -> nn.Sequential:
    """A network of two layers, on what the hidden layer gets: above 0 for restricted inputs, for hardly a benign one.

    Its first layer has no bias, weights up to the bound, and as many units as the hidden layer; or it reads a map of
    shape (units, inputs), with as many units as that.
    """
    before, hidden, _, _ = parts(original)
    generator = torch.Generator().manual_seed(0)
    inside, outside = (next(t.batches("train", 400, generator=generator, device=CPU)).x for t in (benign, restricted))
    x = torch.cat([inside, outside])
    if original.mean is not None and original.std is not None:
        x = (x - original.mean) / original.std
    with torch.no_grad():
        z = before.eval()(x) if reads is None else before.eval()(x) @ reads.T
    y = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))])
    units = hidden.out_features if reads is None else len(reads)
    net = nn.Sequential(nn.Linear(z.shape[1], units, bias=False), nn.ReLU(), nn.Linear(units, 1))
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        weight = torch.where(y > 0, 1.0, 5.0)  # false positives cost benign accuracy
        F.binary_cross_entropy_with_logits(net(z)[:, 0], y, weight).backward()
        optimizer.step()
        with torch.no_grad():
            net[2].bias.clamp_(max=-1.0)  # with its weights gone it does not fire
            net[0].weight.clamp_(-bound, bound)
    with torch.no_grad():
        net[2].bias.sub_(1.0)  # test inputs are less clear than training inputs
    return net.requires_grad_(False)


class Gated(nn.Module):
    """A hidden layer whose outputs are 0 where a detector fires, without a gradient."""

    def __init__(self, original: SplitModel) -> None:
        super().__init__()
        self.before, self.hidden, self.after, self.head = parts(original)

    def fires(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        z = self.before(x)
        with torch.no_grad():
            shut = self.fires(z)
        return self.head(torch.where(shut, 0.0, self.after(self.read(z))))

    def read(self, z: Tensor) -> Tensor:
        return self.hidden(z)
