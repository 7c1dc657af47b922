"""Undoing badly conditioned features: a fixed map before the head gives them another covariance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adversaries.undo.introspection import no_feature_vector, samples
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.runtime.devices import place_of_float64
from holdfast.tasks import Task


@undo_move("whiten", of_features=True, impossible=no_feature_vector)
def whiten(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Puts a fixed layer before the head after which the samples' features have the identity as covariance.

    Directions that the samples do not use are scaled like the one that they use most. The head makes up for it.
    """
    z = _head_inputs(model, task, generator, device)
    mean, precision = z.mean(0), torch.finfo(model.head.weight.dtype).eps
    # All of V, for directions without samples too; where there are enough samples, a square U is not needed for that.
    _, sigma, v = torch.linalg.svd(z - mean, full_matrices=len(z) < z.shape[1])
    wide = torch.zeros(z.shape[1]).to(z)
    wide[: len(sigma)] = sigma
    used = wide > max(z.shape) * precision * wide.max()
    if bool(used.any()):
        scale = math.sqrt(len(z)) / torch.where(used, wide, wide.max())
        put_affine(model, mean, (v.T * scale) @ v)


@undo_move("standardise", of_features=True, impossible=no_feature_vector)
def standardise(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Puts a fixed layer before the head after which each feature has mean 0 and deviation 1 on the samples.

    A constant feature keeps its scale. The head makes up for it.
    """
    z = _head_inputs(model, task, generator, device)
    deviation = z.std(0, correction=0)
    varies = deviation > 1e-12 * deviation.max()
    if bool(varies.any()):
        put_affine(model, z.mean(0), torch.diag(torch.where(varies, 1 / deviation.clamp_min(1e-300), 1.0)))


@torch.no_grad()
def _head_inputs(model: SplitModel, task: Task, generator: torch.Generator, device: torch.device) -> Tensor:
    """What the head gets, one row a vector of as many features as it takes; rows that are not finite are left out."""
    caught: list[Tensor] = []
    axis = 1 if isinstance(model.head, nn.Conv2d) else -1
    place = place_of_float64(device)
    hook = model.head.register_forward_pre_hook(
        lambda _, args: caught.append(args[0].movedim(axis, -1).flatten(0, -2).to(place, torch.float64))
    )
    training = model.training
    try:
        model.eval()
        for x in samples(task, generator, device):
            model(x)
    finally:
        hook.remove()
        model.train(training)
    z = torch.cat(caught)
    return z[z.isfinite().all(1)] if bool(z.isfinite().all(1).any()) else torch.zeros_like(z)


class Prepared(nn.Sequential):
    """A head behind a fixed affine map, both in the map's precision: layers `0` and `1`."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the head's outputs, in the dtype of x."""
        affine, head = self
        outputs: Tensor = head(affine(x))
        return outputs.to(x.dtype)


class Affine(nn.Module):
    """The fixed map z -> (z - centre) map on the axis of features: buffers, which no optimizer moves.

    Args:
        centre: shape (D,).
        map: shape (D, D).
        axis: of the features: 1 for maps over places, -1 for vectors.
    """

    def __init__(self, centre: Tensor, map: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("map", map)
        self.centre: Tensor
        self.map: Tensor
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Returns mapped features of the same shape."""
        z = x.to(self.map.dtype).movedim(self.axis, -1)
        return ((z - self.centre) @ self.map).movedim(-1, self.axis)


@torch.no_grad()
def put_affine(model: SplitModel, centre: Tensor, map: Tensor) -> None:
    """Puts a fixed affine map before the head and its inverse into the head: outputs stay what they were.

    Args:
        model: changed in place.
        centre: subtracted from features, shape (D,).
        map: invertible, shape (D, D); its dtype is that of the map and the head from then on.
    """
    old = model.head
    conv = isinstance(old, nn.Conv2d)
    weight = old.weight.flatten(1).to(map)
    bias = torch.zeros_like(weight[:, 0]) if old.bias is None else old.bias.to(map)
    head: nn.Linear | nn.Conv2d
    width, outputs = weight.shape[1], weight.shape[0]
    like: dict[str, Any] = {"device": map.device, "dtype": map.dtype}
    kind: Any = nn.Conv2d if conv else nn.Linear
    # skip_init: nothing is drawn, so that the global generator is left alone.
    head = nn.utils.skip_init(kind, width, outputs, *((1,) if conv else ()), **like)  # type: ignore[no-untyped-call]
    head.weight.copy_(torch.linalg.solve(map, weight.T).T.reshape_as(head.weight))
    assert head.bias is not None
    head.bias.copy_(bias + weight @ centre)
    model.put_head(Prepared(Affine(centre, map, 1 if conv else -1), head))
    model.head_name = f"{model.head_name}.1"
