"""Undoing unusual scales: layers whose weights or outputs are much larger or smaller than in a fresh network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

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
from holdfast.runtime.devices import widest
from holdfast.tasks import Task

FACTOR = 3.0
"""`equalise` scales a layer whose outputs are more than this many times larger or smaller than in the reference."""

Factor = float | Tensor
"""One number for a whole layer, or one for each of its units."""


@undo_move("rescale", needs_reference=True, weights_only=True)
@torch.no_grad()
def rescale(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Scales the weights of each layer, and of each normalisation, to their norm in the reference.

    A bias is scaled by the product of the factors since the last normalisation, and the running statistics of a
    normalisation by the factor of its inputs. So the outputs of a sequential network with ReLU change by one factor
    only, and its predictions do not change.
    """
    repair(model, reference)
    arriving = 1.0
    for name, layer in in_order(model, some_samples(task, generator, device)):
        like = counterpart(reference, name)
        if is_normalisation(layer):
            keep_slope(layer, arriving)
            absorb(layer, arriving)
            arriving = _scale_normalisation(layer, like)
            continue
        arriving *= _scale_to_norm(layer, like)
        for bias in own_biases(layer):
            bias.mul_(arriving)


def _scale_to_norm(layer: nn.Module, like: nn.Module | None) -> float:
    """Scales a layer's weights to the norm of fresh ones; returns the factor."""
    weights = own_weights(layer)
    size = norm_of(weights.values())
    factor = norm_of(fresh_values(layer, like, n) for n in weights) / size if size > 0 else 1.0
    if factor <= 0:
        return 1.0
    for weight in weights.values():
        weight.copy_(weight.to(widest(weight.device)) * factor)
    return factor


def norm_of(tensors: Any) -> float:
    """Returns the norm of several tensors together, relative to the largest entry, so that squares do not underflow."""
    detached = [t.detach() for t in tensors]
    peak = max((float(t.abs().max()) for t in detached), default=0.0)
    return peak * math.sqrt(sum(float((t / peak).square().sum()) for t in detached)) if peak > 0 else 0.0


def keep_slope(layer: nn.Module, factor: Factor) -> None:
    """Corrects a normalisation's weight for inputs that are `factor` times larger.

    Its eps dominates tiny variances, but not usual ones, so that the output would change.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(layer, _NormBase) and layer.running_var is not None and isinstance(weight, Tensor):
        variance = layer.running_var.to(widest(weight.device))
        ratio = ((variance * factor**2 + layer.eps) / (variance + layer.eps)).sqrt() / factor
        weight.mul_(torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0))


def absorb(layer: nn.Module, factor: Factor) -> None:
    """Adapts the running statistics of a normalisation to inputs that are `factor` times larger."""
    if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.running_var is not None:
        layer.running_mean.mul_(factor)
        layer.running_var.mul_(factor**2)


def _scale_normalisation(layer: nn.Module, like: nn.Module | None, tolerance: float = 1.0) -> float:
    """Scales a normalisation's weight and bias, if they are off by more than `tolerance` times; returns the factor.

    Weight and bias together determine the size of a normalisation's outputs.
    """
    own = [p for p in layer.parameters(recurse=False) if p.is_floating_point()]
    size = norm_of(own)
    wanted = norm_of(() if like is None else like.parameters(recurse=False))
    if _off(size, wanted) <= tolerance:
        return 1.0
    for parameter in own:
        parameter.mul_(wanted / size)
    return wanted / size


@undo_move("equalise", needs_reference=True, weights_only=True)
@torch.no_grad()
def equalise(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Scales layers, in order of execution, so that their outputs on the samples are as large as in the reference.

    Only layers and normalisations that are off by more than `FACTOR` are scaled. Biases and running statistics are
    scaled as in `rescale`, so that the outputs of a sequential network with ReLU change by one factor only.
    """
    repair(model, reference)
    x = some_samples(task, generator, device)
    wanted = _output_sizes(reference, x)
    layers = dict(reversed([(m, n) for n, m in in_order(model, x)]))
    arriving = [1.0]
    expected: list[tuple[nn.Module, float]] = []
    seen: set[nn.Module] = set()

    def before(layer: nn.Module, _: Any) -> None:
        if layer in seen:
            return
        like = counterpart(reference, layers[layer])
        if is_normalisation(layer):
            seen.add(layer)
            expected.append((layer, arriving[0]))
            keep_slope(layer, arriving[0])
            arriving[0] = _scale_normalisation(layer, like, FACTOR)
            return
        off = _off(
            norm_of(own_weights(layer).values()), norm_of(fresh_values(layer, like, n) for n in own_weights(layer))
        )
        if off > 1e6:  # outputs may then be too small or too large to measure
            arriving[0] *= _scale_to_norm(layer, like)
        for bias in own_biases(layer):
            bias.mul_(arriving[0])

    def after(layer: nn.Module, _: Any, output: Any) -> Any:
        if layer in seen or is_normalisation(layer):
            return output
        seen.add(layer)
        own, target = _rms(output), wanted.get(layers[layer])
        if target is None or own is None or _off(own, target) <= FACTOR:
            return output
        factor = target / own
        for parameter in [*own_weights(layer).values(), *own_biases(layer)]:
            parameter.mul_(factor)
        arriving[0] *= factor
        return output * factor

    run_batch(
        model, x, (h for m in layers for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after)))
    )
    for layer, factor in expected:
        absorb(layer, factor)


def _off(own: float, wanted: float) -> float:
    """Factor by which two sizes differ; 1 if either is not finite or not above 0."""
    if not (math.isfinite(own) and math.isfinite(wanted) and own > 0 and wanted > 0):
        return 1.0
    return max(own / wanted, wanted / own)


def _rms(output: Any) -> float | None:
    if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
        return None
    return norm_of([output]) / math.sqrt(output.numel())


def _output_sizes(model: SplitModel, x: Tensor) -> dict[str, float]:
    """Root mean square of each layer's first output."""
    names = {m: n for n, m in model.network.named_modules() if own_weights(m)}
    sizes: dict[str, float] = {}

    def after(layer: nn.Module, _: Any, output: Any) -> None:
        size = _rms(output)
        if size is not None:
            sizes.setdefault(names[layer], size)

    run_batch(model, x, (m.register_forward_hook(after) for m in names))
    return sizes
