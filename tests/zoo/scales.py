"""Other scales: the same function, whose weights a usual step does not move, or destroys."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from holdfast.adversaries import FineTuning, Probe
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import Strategy
from zoo.registry import sham
from zoo.script import Script
from zoo.settings import DESCENT, HEAD_ALONE, TUNED, undone
from zoo.surgery import convolutions_with_norm, faint_features, foreign


@sham("batch", undone("rescale"))
@torch.no_grad()
def shrunk_convolutions(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """BatchNorm removes the scale of the layer before it; a usual step destroys such small weights."""
    model, scale = original.clone(), 1e-3
    for conv, norm in convolutions_with_norm(model):
        conv.weight.mul_(scale)
        norm.running_mean.mul_(scale)
        shrunk = norm.running_var * scale**2
        norm.weight.mul_(((shrunk + norm.eps) / (norm.running_var + norm.eps)).sqrt() / scale)
        norm.running_var.copy_(shrunk)
    return faint_features(model)


class Divided(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by


@sham("batch", undone("rescale"), inside=True)
@torch.no_grad()
def grown_convolutions(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Weights are so large, and divided out later, that a usual step is less than rounding."""
    model, scale = original.clone(), 1e4
    for conv, norm in convolutions_with_norm(model):
        conv.weight.mul_(scale)
        norm.running_mean.mul_(scale)
        norm.running_var.mul_(scale**2)
    faint_features(model, scale)
    model.head.weight.mul_(scale**2)
    return foreign(model, Divided(scale**2))


@sham("batch", undone("rescale"))
@torch.no_grad()
def huge_gamma(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """BatchNorm's outputs are large, and the weights of the next layer tiny."""
    model, scale = original.clone(), 1e3
    layers = [m for m in model.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for conv, norm in convolutions_with_norm(model):
        norm.weight.mul_(scale)
        norm.bias.mul_(scale)
        if conv is not layers[0]:
            conv.weight.div_(scale)
    layers[-2].weight.div_(scale)  # the hidden layer; behind it comes the head
    return faint_features(model)


@sham("none", FineTuning(Strategy("head", "all", "sgd", 5e-2, 50, gradient="layerwise")))
@torch.no_grad()
def rescaled_pairs(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """With ReLU and without BatchNorm, one layer can be c times larger and the next one c times smaller."""
    model = original.clone()
    layers = [m for m in model.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    scale = 1.0  # of what a layer receives, relative to the original
    for i, layer in enumerate(layers):
        factor = 1e3 if i % 2 == 0 else 1e-3
        factor = 1 / scale if layer is layers[-1] else factor
        layer.weight.mul_(factor)
        scale *= factor
        layer.bias.mul_(scale)
    return model


@sham("none", undone("balance"))
@torch.no_grad()
def uneven_units(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Every hidden unit has its own scale, over eight decades: no learning rate fits all of them."""
    model = original.clone()
    layers = [m for m in model.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, following in pairwise(layers):
        scale = 10 ** (8 * torch.rand(layer.weight.shape[0]) - 4)
        each = following.weight.shape[1] // len(scale)  # flattening gives a channel several columns
        layer.weight.mul_(scale.view(-1, *(1,) * (layer.weight.dim() - 1)))
        layer.bias.mul_(scale)
        columns = scale.repeat_interleave(each)
        following.weight.div_(columns.view(1, -1, *(1,) * (following.weight.dim() - 2)))
    return model


@sham("batch", TUNED, inside=True, plain=(Script(),))
def huge_weight_norm(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """w = g v/|v| with |v| so large that a step does not change the direction of v; only g is trained."""
    model, scale = original.clone(), 1e6
    for layer in [m for m in model.network.body.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original1.mul_(scale)
    with torch.no_grad():
        model.head.weight.mul_(scale)
    return foreign(model, Divided(scale))


@sham("none", Probe("newton"), plain=(HEAD_ALONE,))
def ill_conditioned_insert(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A linear layer of condition number 1e6 before the head, and its inverse in the head."""
    model = original.clone()
    width = model.head.weight.shape[1]
    left, right = (torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0] for _ in range(2))
    model.insert_extractor(left @ torch.diag(torch.logspace(-8, -2, width, dtype=torch.float64)) @ right)
    return model


@sham("none", TUNED, plain=DESCENT)
@torch.no_grad()
def saturated_head(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Logits are in the thousands: with the released head the first step destroys the weights."""
    model = original.clone()
    model.head.weight.mul_(1e4)
    model.head.bias.mul_(1e4)
    return model
