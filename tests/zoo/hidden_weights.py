"""Weights out of reach of optimizers: in buffers, attributes, integers, or reset before each pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from holdfast.adversaries import Probe
from holdfast.models import SplitModel
from holdfast.tasks import Task
from zoo.registry import sham
from zoo.script import Script
from zoo.settings import TUNED, undone
from zoo.surgery import as_model, faint_features


class Hidden(nn.Module):
    """The real weight is a buffer; the parameter has almost no effect."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("real", weight.detach().clone())

    def forward(self, decoy: Tensor) -> Tensor:
        return self.real + 1e-8 * (decoy - decoy.detach())


@sham("none", undone("rescale"), plain=(Script(),))
def hidden_in_buffers(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """All weights of the body are buffers, and the parameters with their names have no effect."""
    model = faint_features(original.clone())
    for layer in [m for m in model.network.body.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        for name in ("weight", "bias"):
            parametrize.register_parametrization(layer, name, Hidden(getattr(layer, name)))
    return model


class Adapted(nn.Module):
    """An unregistered stem, and a trainable adapter of three numbers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.stem = [network.body]  # in a list, so that it is not registered as a submodule
        self.adapter = nn.Parameter(torch.zeros(3))
        self.head = network.head

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.stem[0].eval()(x)
        return self.head(z + 1e-6 * self.adapter.sum())


@sham("batch", undone("rescale"), inside=True)
def unregistered_stem(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The body is not a submodule: its parameters are neither listed nor saved."""
    return as_model(Adapted(faint_features(original.clone()).network), original)


@sham("none", TUNED, plain=(Script(),))
def frozen(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Nothing is trainable, which stops only naive scripts."""
    model = original.clone()
    model.requires_grad_(False)
    return model


class Restoring(nn.Module):
    """Resets its weights before every forward pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.body, self.head = network.body, network.head
        self.kept = {n: p.detach().clone() for n, p in self.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.shape == self.kept[name].shape:
                    parameter.copy_(self.kept[name])
        return self.head(self.body(x))


@sham("batch", undone("rescale"), inside=True)
def restoring(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Training changes weights, and the next forward pass resets them."""
    return as_model(Restoring(faint_features(original.clone()).network), original)


class Tripwire(nn.Module):
    """Has the parameters of a fresh network, and stores the real weights as integers.

    While parameters have changed little, the real weights plus these changes are used: gradients are correct and
    scales usual. After training, or with a new head, the fresh network is used.
    """

    def __init__(self, original: SplitModel, fresh: SplitModel) -> None:
        super().__init__()
        self.body, self.head = fresh.network.body, fresh.network.head
        real = dict(original.network.named_parameters())
        self.packed = {n: [t.detach().clone().view(torch.int32) for t in (real[n], p)]
                       for n, p in self.named_parameters()}  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        weights = {}
        for name, parameter in self.named_parameters():
            real, shown = (t.view(torch.float32) for t in self.packed[name])
            if parameter.shape != shown.shape or (parameter - shown).norm() > 0.02 * shown.norm() + 0.02:
                return self.head(self.body(x))
            weights[name] = real + (parameter - shown)
        for part in ("body", "head"):
            own = {n.removeprefix(f"{part}."): w for n, w in weights.items() if n.startswith(f"{part}.")}
            x = torch.func.functional_call(getattr(self, part), own, (x,))
        return x


@sham("none", Probe("newton"))
def tripwire(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Turns into a fresh network as soon as it is trained."""
    return as_model(Tripwire(original.clone(), original.fresh()), original)
