"""Undoing tricks with BatchNorm: running statistics that are not those of the data, and nonsensical settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.adversaries.undo.introspection import run_samples, samples
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.tasks import Task


def _layers(model: SplitModel) -> list[_BatchNorm]:
    return [m for m in model.network.modules() if isinstance(m, _BatchNorm)]


def _no_batchnorm(model: SplitModel, task: Task) -> str | None:
    return None if _layers(model) else "it has no BatchNorm to recalibrate"


@undo_move("recalibrate", idle=_no_batchnorm)
@torch.no_grad()
def recalibrate(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Estimates BatchNorm's running statistics again from the samples, and repairs nonsensical settings.

    Momentum outside (0, 1], an eps outside [1e-12, 0.1], statistics that are not tracked, and values that are not
    finite are replaced by torch's defaults. With a single sample, which has no variance, only settings are repaired.
    """
    layers = _layers(model)
    for layer in layers:
        _repair_settings(layer)
    if task.size("train") > 1:
        _estimate(model, layers, task, generator, device)
    for layer in layers:
        _repair_statistics(layer)


def _repair_settings(layer: _BatchNorm) -> None:
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


def _repair_statistics(layer: _BatchNorm) -> None:
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
        layer.momentum = None  # the mean over batches
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
    """Sets BatchNorm's running statistics to the samples', and adapts scale and shift: evaluation mode stays the same.

    Where scale and shift compensate for wrong running statistics, training mode computes another function than
    evaluation mode. Afterwards both compute the same function on these samples. Settings are repaired as in
    `recalibrate`. With a single sample, which has no variance, only settings are repaired.
    """
    layers = _layers(model)
    tracked = [layer.running_mean is not None and layer.running_var is not None for layer in layers]
    moments: dict[_BatchNorm, list[tuple[Tensor, Tensor]]] = {}

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        arriving = args[0].movedim(1, -1).flatten(0, -2)
        moments.setdefault(layer, []).append((arriving.mean(0), arriving.square().mean(0)))

    if task.size("train") > 1:
        run_samples(model, task, generator, device, (layer.register_forward_pre_hook(before) for layer in layers))
    for layer, known in zip(layers, tracked, strict=True):
        eps = layer.eps
        _repair_settings(layer)
        if layer in moments:
            mean, square = (torch.stack(batches).mean(0) for batches in zip(*moments[layer], strict=True))
            _set_statistics(layer, mean, (square - mean**2).clamp_min(0), eps if known else None)
        _repair_statistics(layer)


def _set_statistics(layer: _BatchNorm, mean: Tensor, variance: Tensor, eps: float | None) -> None:
    """Changes running statistics, and adapts scale and shift to them, unless `eps`, their previous eps, is None."""
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
