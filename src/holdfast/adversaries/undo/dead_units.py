"""Undoing dead units, whose output is the same on every sample, so that their weights get no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adversaries.undo.introspection import (
    counterpart,
    fresh_values,
    in_order,
    own_biases,
    own_weights,
    repair,
    run_batch,
    some_samples,
)
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel, is_normalisation
from holdfast.tasks import Task


@undo_move("revive", needs_reference=True, weights_only=True)
@torch.no_grad()
def revive(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Gives dead units fresh incoming weights and a bias of zero.

    A unit is dead if its input to the next layer with weights is constant over the samples (with a single sample:
    zero). A BatchNorm in between is reset for this unit.
    """
    repair(model, reference)
    x = some_samples(task, generator, device)
    order = in_order(model, x)
    for _ in order:  # a mostly dead layer hides dead units behind it: check again after reviving it
        hidden = False
        for layer, norms, dead, name in _dead_units(model, order, x):
            if not bool(dead.any()):
                continue
            hidden = float(dead.float().mean()) >= 0.5
            like = counterpart(reference, name)
            for key, weight in own_weights(layer).items():
                weight[dead] = fresh_values(layer, like, key)[dead]
            for bias in own_biases(layer):
                bias[dead] = 0
            for norm in norms:
                _reset_units(norm, dead)
            if hidden:
                break
        if not hidden:
            return


def _reset_units(norm: nn.Module, units: Tensor) -> None:
    state = {**dict(norm.named_parameters(recurse=False)), **dict(norm.named_buffers(recurse=False))}
    for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
        tensor = state.get(name)
        if tensor is not None and tensor.shape == units.shape:
            tensor.masked_fill_(units, value)


def _dead_units(
    model: SplitModel, order: list[tuple[str, nn.Module]], x: Tensor
) -> list[tuple[nn.Module, list[nn.Module], Tensor, str]]:
    """For each layer with a successor: the layer, the normalisations in between, a mask of its dead units, its name."""
    constant: dict[nn.Module, Tensor] = {}

    def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if layer in constant or not args or not isinstance(args[0], Tensor) or args[0].dim() < 2:
            return
        axis = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
        arriving = args[0].movedim(axis, -1).flatten(0, -2)
        low, high = arriving.amin(0), arriving.amax(0)
        constant[layer] = (low == high) if len(x) > 1 else (low == 0) & (high == 0)

    run_batch(model, x, (m.register_forward_pre_hook(before) for _, m in order if own_weights(m)))
    dead: list[tuple[nn.Module, list[nn.Module], Tensor, str]] = []
    last: tuple[str, nn.Module] | None = None
    between: list[nn.Module] = []
    for name, layer in order:
        if is_normalisation(layer):
            between.append(layer)
            continue
        if last is not None and layer in constant:
            units = len(next(iter(own_weights(last[1]).values())))
            if constant[layer].numel() % units == 0:  # in flattened maps a unit has several inputs
                dead.append((last[1], between, constant[layer].view(units, -1).all(1), last[0]))
        last, between = (name, layer), []
    return dead
