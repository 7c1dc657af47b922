"""Undoing tricks with the scales of single units, which hide where a layer as a whole looks as usual."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.adversaries.undo.introspection import counterpart, in_order, mend, some_samples
from holdfast.adversaries.undo.layer_scaling import FACTOR, absorb, keep_slope
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel, is_normalisation
from holdfast.tasks import Task

ROUNDING = 1e-3
"""Outputs that differ by less, relative to the largest, are the same."""


@undo_move("balance", needs_reference=True)
@torch.no_grad()
def balance(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Scales each unit whose weights and bias are `FACTOR` times too large or small to what they are in the reference.

    What reads the unit next, in order of execution, makes up for it. Who makes up for what can only be guessed in a
    network of unknown code: where outputs on the samples in evaluation mode change, the step is taken back.
    """
    mend(model, reference)
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
        for parameter in _of_units(layer):
            parameter.mul_(factors.view(-1, *(1,) * (parameter.dim() - 1)))
        _make_up(reader, factors)
        changed = model(x)
        if not bool(((changed - outputs).abs() <= ROUNDING * outputs.abs().max()).all()):
            for tensor, value in kept:
                tensor.copy_(value)
    model.train(training)


def _plain(layer: nn.Module) -> bool:
    """Whether the rows of a layer's weight are its units."""
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _of_units(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters(recurse=False) if p.is_floating_point()]


def _factors(layer: nn.Module, like: nn.Module | None) -> Tensor | None:
    """One factor a unit; None where a layer has no units that can be told."""
    if like is None or not (_plain(layer) or is_normalisation(layer)):
        return None
    own, wanted = _of_units(layer), _of_units(like)
    if not own or [p.shape for p in own] != [p.shape for p in wanted] or len({len(p) for p in own}) > 1:
        return None
    ratios = _sizes(wanted).to(own[0].device) / _sizes(own)
    off = torch.maximum(ratios, 1 / ratios)
    return torch.where(off.isfinite() & (off > FACTOR), ratios, 1.0).to(own[0])


def _sizes(parameters: list[nn.Parameter]) -> Tensor:
    """Norm of what belongs to each unit; by the largest entry first, since squares of tiny numbers vanish."""
    rows = torch.cat([p.detach().flatten(1) if p.dim() > 1 else p.detach()[:, None] for p in parameters], 1)
    peak = rows.abs().amax(1)
    return peak * (rows / peak[:, None]).square().sum(1).sqrt()


def _reads(reader: nn.Module, units: int) -> bool:
    """Whether a layer may be what reads so many units; flattened maps give a unit several columns."""
    if isinstance(reader, _BatchNorm):
        return reader.num_features == units and reader.running_var is not None
    weight = getattr(reader, "weight", None)
    whole = not isinstance(reader, nn.modules.conv._ConvNd) or reader.groups == 1
    return _plain(reader) and whole and isinstance(weight, Tensor) and weight.shape[1] % units == 0


def _make_up(reader: nn.Module, factors: Tensor) -> None:
    """Lets a layer expect units that are so many times larger."""
    if isinstance(reader, _BatchNorm):
        keep_slope(reader, factors)
        absorb(reader, factors)
        return
    weight = reader.weight
    assert isinstance(weight, Tensor)
    columns = factors.repeat_interleave(weight.shape[1] // len(factors))
    weight.div_(columns.view(1, -1, *(1,) * (weight.dim() - 2)))
