"""Undoing tricks with BatchNorm: statistics that are not those of the data, and settings that make no sense."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.adversaries.undo.introspection import samples
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.tasks import Task


def _layers(model: SplitModel) -> list[_BatchNorm]:
    return [m for m in model.network.modules() if isinstance(m, _BatchNorm)]


def _no_batchnorm(model: SplitModel) -> str | None:
    return None if _layers(model) else "it has no BatchNorm to recalibrate"


@undo_move("recalibrate", idle=_no_batchnorm)
@torch.no_grad()
def recalibrate(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Estimates BatchNorm's running statistics anew from the samples, and mends settings that make no sense.

    Momentum outside (0, 1], an eps outside [1e-12, 0.1], statistics that are not tracked, and values that are not
    finite are replaced by torch's defaults. With a single sample there is no variance: only settings are mended.
    """
    layers = _layers(model)
    for layer in layers:
        _mend_settings(layer)
    if task.size("train") > 1:
        _estimate(model, layers, task, generator, device)
    for layer in layers:
        _mend_statistics(layer)


def _mend_settings(layer: _BatchNorm) -> None:
    layer.eps = layer.eps if 1e-12 <= layer.eps <= 0.1 else 1e-5
    if layer.momentum is not None and not 0 < layer.momentum <= 1:
        layer.momentum = 0.1
    if layer.running_mean is None or layer.running_var is None:
        like = next(layer.parameters(), torch.zeros(()))
        layer.register_buffer("running_mean", torch.zeros(layer.num_features).to(like))
        layer.register_buffer("running_var", torch.ones(layer.num_features).to(like))
    if layer.num_batches_tracked is None:
        layer.register_buffer("num_batches_tracked", torch.tensor(0))
    layer.track_running_stats = True


def _mend_statistics(layer: _BatchNorm) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    torch.nan_to_num_(layer.running_mean, 0.0, 0.0, 0.0)
    torch.nan_to_num_(layer.running_var, 1.0, 1.0, 1.0)


def _estimate(
    model: SplitModel, layers: list[_BatchNorm], task: Task, generator: torch.Generator, device: torch.device
) -> None:
    training, momenta = model.training, [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # the plain mean over batches
    for x in samples(task, generator, device):
        if len(x) > 1:
            model(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.train(training)


@undo_move("fold", idle=_no_batchnorm)
@torch.no_grad()
def fold(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Gives BatchNorm the samples' statistics, and lets scale and shift make up for it: evaluation stays what it is.

    Where running statistics are nonsense that scale and shift hide, training mode computes another function than
    evaluation mode. Afterwards it computes the same one on these samples. Settings are mended as in `recalibrate`.
    With a single sample there is no variance: only settings are mended.
    """
    layers = _layers(model)
    tracked = [layer.running_mean is not None and layer.running_var is not None for layer in layers]
    seen: dict[_BatchNorm, list[tuple[Tensor, Tensor]]] = {}

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        arriving = args[0].movedim(1, -1).flatten(0, -2)
        seen.setdefault(layer, []).append((arriving.mean(0), arriving.square().mean(0)))

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    training = model.training
    try:
        model.eval()
        for x in samples(task, generator, device) if task.size("train") > 1 else ():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    for layer, known in zip(layers, tracked, strict=True):
        eps = layer.eps
        _mend_settings(layer)
        if layer in seen:
            mean, square = (torch.stack(found).mean(0) for found in zip(*seen[layer], strict=True))
            _refer_to(layer, mean, (square - mean**2).clamp_min(0), eps if known else None)
        _mend_statistics(layer)


def _refer_to(layer: _BatchNorm, mean: Tensor, variance: Tensor, eps: float | None) -> None:
    """Changes the statistics; scale and shift too, where a layer had some, with this eps."""
    running = layer.running_mean, layer.running_var
    assert running[0] is not None
    assert running[1] is not None
    if eps is not None and layer.affine:
        slope = layer.weight / (running[1] + eps).sqrt()
        weight, bias = slope * (variance + layer.eps).sqrt(), layer.bias + slope * (mean - running[0])
        sound = weight.isfinite() & bias.isfinite()
        layer.weight.copy_(torch.where(sound, weight, layer.weight))
        layer.bias.copy_(torch.where(sound, bias, layer.bias))
    running[0].copy_(mean)
    running[1].copy_(variance)
