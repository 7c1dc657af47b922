"""Undoing what sits in small differences of the weights: they are rounded, pruned, or cut to a low rank.

A trained network hardly changes when its weights are compressed. A trick that depends on their last digits, on many
small weights or on weak directions is lost.
"""

from __future__ import annotations

import torch

from holdfast.adversaries.undo.introspection import own_weights
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.tasks import Task

LEVELS = 127
"""Largest integer of symmetric int8."""

PRUNED = 0.5
"""Share of each matrix's weights that `prune` sets to zero."""

KEPT_RANK = 0.5
"""Share of each matrix's singular values that `low-rank` keeps."""


def _matrices(model: SplitModel) -> list[torch.nn.Parameter]:
    """Every weight matrix and kernel of finite numbers; one that several layers share comes once."""
    unique = {id(w): w for layer in model.network.modules() for w in own_weights(layer).values()}
    return [w for w in unique.values() if bool(w.isfinite().all())]


@undo_move("round-int8", weights_only=True)
@torch.no_grad()
def round_int8(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Rounds the weights of each unit to 8-bit integers, scaled by its largest weight, and back."""
    for weight in _matrices(model):
        step = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True) / LEVELS
        weight.copy_(torch.where(step > 0, (weight / step).round() * step, weight))


@undo_move("round-bf16", weights_only=True)
@torch.no_grad()
def round_bf16(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Rounds every weight and bias to bfloat16 and back, as a usual half-precision copy of the model would be."""
    for parameter in model.network.parameters():
        if parameter.is_floating_point():
            parameter.copy_(parameter.to(torch.bfloat16))


@undo_move("prune", weights_only=True)
@torch.no_grad()
def prune(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Sets the smaller half of each matrix's weights to zero; they are trained afterwards like all others."""
    for weight in _matrices(model):
        smallest = weight.abs().flatten().argsort()[: int(PRUNED * weight.numel())]
        kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
        kept[smallest] = False
        weight.mul_(kept.view(weight.shape))


@undo_move("low-rank", weights_only=True)
@torch.no_grad()
def low_rank(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Keeps the larger half of each matrix's singular values; kernels are matrices of units by everything else."""
    for weight in _matrices(model):
        matrix, peak = weight.flatten(1), weight.abs().max()
        kept = max(1, round(KEPT_RANK * min(matrix.shape)))
        if bool(peak > 0):
            # Scaled to 1, so that squares of very large or small weights stay within float32.
            u, sigma, v = torch.linalg.svd(matrix / peak, full_matrices=False)
            weight.copy_(((u[:, :kept] * sigma[:kept]) @ v[:kept] * peak).view(weight.shape))
