"""Undoing spent units: every hidden layer gets fresh units beside those that it has, and outputs stay the same.

After Net2Net (Chen et al., ICLR 2016), with other new units: copies of old ones would be as dead or saturated as these.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.adversaries.undo.introspection import in_order, repair, some_samples
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel, is_normalisation
from holdfast.tasks import Task

MORE = 0.5
"""Fresh units, as a share of the units that a layer has."""

FEW = 4
"""Samples on which outputs are compared."""

SMALL = 5_000_000
"""Weights of a network up to which it is tried beforehand whether anything can be widened."""

ROUNDING = 1e-4
"""Outputs count as equal if they differ by less than this, relative to the largest."""

Undo = Callable[[], None]


def _nothing_to_widen(model: SplitModel, task: Task) -> str | None:
    if sum(p.numel() for p in model.parameters()) > SMALL or model.not_renewable() is not None:
        return None
    x = next(task.sweep("train", FEW, device=model.device)).x
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        found = _widen_all(model.clone(), model.fresh(), x)
    return None if found else "it has no layer whose outputs only one other linear or convolutional layer reads"


@undo_move("widen", needs_reference=True, idle=_nothing_to_widen)
def widen(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Adds fresh units to every hidden layer; the next layer reads the old ones as before, and the new ones by zeros.

    Each new unit reads all units before it, also the new ones. So a fresh network stands beside the old one, with which
    it shares the head, and learns where the old one passes no gradient. A fresh head reads both.

    In unknown code the next layer in order of execution need not be the one that reads a layer: what raises an error,
    or changes outputs, is undone. The reference gets the same units, so that fresh blocks fit.
    """
    if reference is not model:
        _widen_all(model, reference, some_samples(task, generator, device)[:FEW])


@torch.no_grad()
def _widen_all(model: SplitModel, reference: SplitModel, x: Tensor) -> int:
    """Widens every layer of both networks that can be; returns how many."""
    repair(model, reference)
    training, count = model.training, 0
    model.eval()
    outputs = model(x)
    chain = [(name, layer) for name, layer in in_order(model, x) if _is_known(layer)]
    places = [i for i, (_, layer) in enumerate(chain) if not is_normalisation(layer)]
    for start, end in pairwise(places):
        names = [name for name, _ in chain[start : end + 1]]
        undone = _widened(model, names)
        if undone is None:
            continue
        if _same(model, x, outputs) and _widened(reference, names) is not None:
            count += 1
            continue
        for undo in undone:
            undo()
    model.train(training)
    return count


def _is_known(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or _plain_conv(layer) or is_normalisation(layer)


def _plain_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1


def _same(model: SplitModel, x: Tensor, outputs: Tensor) -> bool:
    try:
        changed = model(x)
    except Exception:  # the code of a network may raise anything where shapes do not fit
        return False
    if changed.shape != outputs.shape:
        return False
    difference, largest = (changed - outputs).abs(), outputs.abs().max()
    return bool((difference <= ROUNDING * largest).all())


def _widened(model: SplitModel, names: list[str]) -> list[Undo] | None:
    """Widens the first layer, the normalisations after it, and the inputs of the last; None if they do not fit.

    Returns functions that take it back.
    """
    modules = dict(model.network.named_modules())
    layers = [modules[name] for name in names if name in modules]
    if len(layers) != len(names):
        return None
    first, *norms, last = layers
    units = _units(first)
    width = _inputs(last)
    if first is last or not all(isinstance(n, _BatchNorm) and n.num_features == units for n in norms):
        return None
    if width % units or (isinstance(last, nn.modules.conv._ConvNd) and width != units):
        return None
    more = max(1, round(MORE * units))
    undone = [_add_outputs(first, more)]
    undone += [_add_features(norm, more) for norm in norms]
    undone.append(_add_inputs(last, more * (width // units)))
    return undone


def _units(layer: nn.Module) -> int:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.shape[0]


def _inputs(layer: nn.Module) -> int:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.shape[1]


def _put(layer: nn.Module, values: dict[str, Tensor], sizes: dict[str, int]) -> Undo:
    """Gives a layer other tensors and sizes; returns what puts the old ones back."""
    tensors = {name: getattr(layer, name) for name in values}
    numbers = {name: getattr(layer, name) for name in sizes}
    for name, value in values.items():
        old = tensors[name]
        new = value.to(old)
        trained = isinstance(old, nn.Parameter)
        setattr(layer, name, nn.Parameter(new, old.requires_grad) if trained else new)
    for name, size in sizes.items():
        setattr(layer, name, size)

    def back() -> None:
        for name, value in [*tensors.items(), *numbers.items()]:
            setattr(layer, name, value)

    return back


def _add_outputs(layer: nn.Module, more: int) -> Undo:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    bound = max(weight[0].numel(), 1) ** -0.5  # torch's default
    values = {"weight": torch.cat([weight, torch.empty_like(weight[:1]).expand(more, *weight.shape[1:]).clone()])}
    values["weight"][-more:].uniform_(-bound, bound)
    if isinstance(bias, Tensor):
        values["bias"] = torch.cat([bias, torch.empty_like(bias[:1]).expand(more).clone().uniform_(-bound, bound)])
    size = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    return _put(layer, values, {size: weight.shape[0] + more})


def _add_features(norm: nn.Module, more: int) -> Undo:
    neutral = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    values = {
        name: torch.cat([own, own.new_full((more,), value)])
        for name, value in neutral.items()
        if isinstance(own := getattr(norm, name), Tensor)
    }
    assert isinstance(norm, _BatchNorm)
    return _put(norm, values, {"num_features": norm.num_features + more})


def _add_inputs(layer: nn.Module, more: int) -> Undo:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    wide = torch.cat([weight, weight.new_zeros(weight.shape[0], more, *weight.shape[2:])], 1)
    size = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
    return _put(layer, {"weight": wide}, {size: weight.shape[1] + more})
