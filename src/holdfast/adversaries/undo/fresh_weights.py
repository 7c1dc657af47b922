"""Undoing unknown damage: weights are replaced by fresh ones, or mixed with them."""

from __future__ import annotations

import math

import torch

from holdfast.adversaries.undo.introspection import (
    batch_statistics,
    counterpart,
    fresh_values,
    own_weights,
    repair,
    some_batch,
)
from holdfast.adversaries.undo.layer_scaling import norm_of
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.tasks import Task

SHRINK, NOISE = 0.5, 0.5
WORST = 2
"""Number of layers that `reset-worst` reinitialises."""


@undo_move("shrink-perturb", needs_reference=True, weights_only=True)
@torch.no_grad()
def shrink_perturb(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Halves every weight and adds half of the reference's: w <- 0.5 w + 0.5 fresh."""
    repair(model, reference)
    for name, layer in model.network.named_modules():
        for key, weight in own_weights(layer).items():
            weight.mul_(SHRINK).add_(fresh_values(layer, counterpart(reference, name), key), alpha=NOISE)


@undo_move("reset-worst", needs_reference=True, weights_only=True)
def reset_worst(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Reinitialises the `WORST` layers whose weights and gradients deviate most from the reference.

    Compared are the logarithms of the norms of weights and gradients, relative to the reference and to the median over
    layers, because all layers of a trained network may have larger weights or smaller gradients.
    """
    repair(model, reference)
    own, fresh = (_statistics(m, task, generator.clone_state(), device) for m in (model, reference))
    holds_head = {n for n in own if not n or f"{model.head_name}.".startswith(f"{n}.")}
    names = [n for n in own if n in fresh and n not in holds_head]
    if not names:
        return
    anomaly = torch.zeros(len(names), dtype=torch.float64)
    for i in range(2):
        ratios = torch.tensor([own[n][i] - fresh[n][i] for n in names], dtype=torch.float64)
        anomaly += (ratios - ratios.median()).abs()
    worst = anomaly.argsort(descending=True, stable=True)[:WORST]
    model.reinitialise([names[i] for i in worst], reference)


def _statistics(
    model: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Logarithms of the norms of each layer's weights and of their gradients with a fresh head."""
    twin = model.clone()
    twin.reset_head(task.num_outputs)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    batch = some_batch(task, generator, device)
    with batch_statistics(twin, batch.x):
        task.loss(twin, batch).backward()  # type: ignore[no-untyped-call]
    tiny = 1e-300
    return {
        name: (
            math.log(max(norm_of(weights.values()), tiny)),
            math.log(max(norm_of(torch.nan_to_num(p.grad) for p in weights.values() if p.grad is not None), tiny)),
        )
        for name, layer in twin.network.named_modules()
        if (weights := own_weights(layer))
    }
