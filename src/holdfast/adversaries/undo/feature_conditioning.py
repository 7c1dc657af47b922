"""Undoing badly conditioned features: a fixed map before the head changes their covariance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adversaries.undo.introspection import no_feature_vector, run_samples
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.runtime.devices import place_of_float64
from holdfast.tasks import Task


@undo_move("whiten", of_features=True, impossible=no_feature_vector)
def whiten(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Inserts a fixed layer before the head that whitens the samples' features, and its inverse into the head.

    Directions that the samples do not use are scaled like the one that they use most.
    """
    z = _head_inputs(model, task, generator, device)
    mean, precision = z.mean(0), torch.finfo(model.head.weight.dtype).eps
    # All of V is needed, also for unused directions; with enough samples that does not need the full U.
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
    """Inserts a fixed layer before the head that standardises the samples' features, and its inverse into the head.

    A constant feature keeps its scale.
    """
    z = _head_inputs(model, task, generator, device)
    deviation = z.std(0, correction=0)
    varies = deviation > 1e-12 * deviation.max()
    if bool(varies.any()):
        put_affine(model, z.mean(0), torch.diag(torch.where(varies, 1 / deviation.clamp_min(1e-300), 1.0)))


@torch.no_grad()
def _head_inputs(model: SplitModel, task: Task, generator: torch.Generator, device: torch.device) -> Tensor:
    """Inputs of the head, one feature vector per row, without rows that are not finite."""
    inputs: list[Tensor] = []
    axis = 1 if isinstance(model.head, nn.Conv2d) else -1
    place = place_of_float64(device)
    hook = model.head.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].movedim(axis, -1).flatten(0, -2).to(place, torch.float64))
    )
    run_samples(model, task, generator, device, [hook])
    z = torch.cat(inputs)
    return z[z.isfinite().all(1)] if bool(z.isfinite().all(1).any()) else torch.zeros_like(z)


class Prepared(nn.Sequential):
    """A fixed affine map (layer `0`) and a head (layer `1`), both in the map's precision."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the head's outputs, in the dtype of x."""
        affine, head = self
        outputs: Tensor = head(affine(x))
        return outputs.to(x.dtype)


class Affine(nn.Module):
    """The fixed map z -> (z - centre) map along the feature axis, stored in buffers, which optimizers do not change.

    Args:
        centre: shape (D,).
        map: shape (D, D).
        axis: of the features: 1 for feature maps, -1 for vectors.
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
    """Inserts a fixed affine map before the head and its inverse into the head, so that outputs do not change.

    Args:
        model: changed in place.
        centre: subtracted from features, shape (D,).
        map: invertible, shape (D, D); map and head then have its dtype.
    """
    old = model.head
    conv = isinstance(old, nn.Conv2d)
    weight = old.weight.flatten(1).to(map)
    bias = torch.zeros_like(weight[:, 0]) if old.bias is None else old.bias.to(map)
    head: nn.Linear | nn.Conv2d
    outputs, width = weight.shape
    like: dict[str, Any] = {"device": map.device, "dtype": map.dtype}
    kind: Any = nn.Conv2d if conv else nn.Linear
    # skip_init draws no random numbers from the global generator.
    head = nn.utils.skip_init(kind, width, outputs, *((1,) if conv else ()), **like)  # type: ignore[no-untyped-call]
    head.weight.copy_(torch.linalg.solve(map, weight.T).T.reshape_as(head.weight))
    assert head.bias is not None
    head.bias.copy_(bias + weight @ centre)
    model.put_head(Prepared(Affine(centre, map, 1 if conv else -1), head))
    model.head_name = f"{model.head_name}.1"
