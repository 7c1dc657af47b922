"""Undoing unusual scales of single units, in layers whose scale as a whole may be usual."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.adversaries.undo.introspection import counterpart, in_order, repair, some_samples
from holdfast.adversaries.undo.layer_scaling import FACTOR, absorb, keep_slope
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel, is_normalisation
from holdfast.tasks import Task

ROUNDING = 1e-3
"""Outputs count as equal if they differ by less than this, relative to the largest."""


@undo_move("balance", needs_reference=True, weights_only=True)
@torch.no_grad()
def balance(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Scales units whose weights and bias are `FACTOR` times too large or too small to their norm in the reference.

    The next layer in order of execution is scaled inversely. In unknown code that layer need not be the one that reads
    the unit: if outputs on the samples in evaluation mode change, the change is undone.
    """
    repair(model, reference)
    x = some_samples(task, generator, device)
    training = model.training
    order = in_order(model, x)
    model.eval()
    outputs = model(x)
    for (name, layer), (_, reader) in pairwise(order):
        factors = _factors(layer, counterpart(reference, name))
        if factors is None or not _reads(reader, len(factors)) or bool((factors == 1).all()):
            continue
        kept = [(t, t.clone()) for m in (layer, reader) for t in [*m.parameters(False), *m.buffers(False)]]
        for parameter in _unit_parameters(layer):
            parameter.mul_(factors.view(-1, *(1,) * (parameter.dim() - 1)))
        _compensate(reader, factors)
        changed = model(x)
        if not bool(((changed - outputs).abs() <= ROUNDING * outputs.abs().max()).all()):
            for tensor, value in kept:
                tensor.copy_(value)
    model.train(training)


def _rows_are_units(layer: nn.Module) -> bool:
    """Whether the rows of a layer's weight are its units."""
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _unit_parameters(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters(recurse=False) if p.is_floating_point()]


def _factors(layer: nn.Module, like: nn.Module | None) -> Tensor | None:
    """Returns one factor per unit; None if the units of a layer are unknown."""
    if like is None or not (_rows_are_units(layer) or is_normalisation(layer)):
        return None
    own, wanted = _unit_parameters(layer), _unit_parameters(like)
    if not own or [p.shape for p in own] != [p.shape for p in wanted] or len({len(p) for p in own}) > 1:
        return None
    ratios = _sizes(wanted).to(own[0].device) / _sizes(own)
    off = torch.maximum(ratios, 1 / ratios)
    return torch.where(off.isfinite() & (off > FACTOR), ratios, 1.0).to(own[0])


def _sizes(parameters: list[nn.Parameter]) -> Tensor:
    """Norm of each unit's parameters, relative to the largest entry, so that squares do not underflow."""
    rows = torch.cat([p.detach().flatten(1) if p.dim() > 1 else p.detach()[:, None] for p in parameters], 1)
    peak = rows.abs().amax(1)
    return peak * (rows / peak[:, None]).square().sum(1).sqrt()


def _reads(reader: nn.Module, units: int) -> bool:
    """Whether a layer may read this many units; with flattened maps a unit has several columns."""
    if isinstance(reader, _BatchNorm):
        return reader.num_features == units and reader.running_var is not None
    weight = getattr(reader, "weight", None)
    grouped = isinstance(reader, nn.modules.conv._ConvNd) and reader.groups != 1
    return _rows_are_units(reader) and not grouped and isinstance(weight, Tensor) and weight.shape[1] % units == 0


def _compensate(reader: nn.Module, factors: Tensor) -> None:
    """Adapts a layer to inputs that are larger by these factors."""
    if isinstance(reader, _BatchNorm):
        keep_slope(reader, factors)
        absorb(reader, factors)
        return
    weight = reader.weight
    assert isinstance(weight, Tensor)
    columns = factors.repeat_interleave(weight.shape[1] // len(factors))
    weight.div_(columns.view(1, -1, *(1,) * (weight.dim() - 2)))
