"""Undoing tricks with BatchNorm: running statistics that are not those of the data, and nonsensical settings."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.adversaries.undo.introspection import samples
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.models.batchnorm import batchnorm_layers, moments_of, set_statistics
from holdfast.tasks import Task


def _no_batchnorm(model: SplitModel, task: Task) -> str | None:
    return None if batchnorm_layers(model.network) else "it has no BatchNorm to recalibrate"


@undo_move("recalibrate", idle=_no_batchnorm)
@torch.no_grad()
def recalibrate(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Estimates BatchNorm's running statistics again from the samples, and repairs nonsensical settings.

    Momentum outside (0, 1], an eps outside [1e-12, 0.1], statistics that are not tracked, and values that are not
    finite are replaced by torch's defaults. With a single sample, which has no variance, only settings are repaired.
    """
    layers = batchnorm_layers(model.network)
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
    layers = batchnorm_layers(model.network)
    tracked = [layer.running_mean is not None and layer.running_var is not None for layer in layers]
    moments = moments_of(model, samples(task, generator, device)) if task.size("train") > 1 else {}
    for layer, known in zip(layers, tracked, strict=True):
        eps = layer.eps
        _repair_settings(layer)
        if layer in moments:
            set_statistics(layer, *moments[layer], eps if known else None)
        _repair_statistics(layer)
