"""How the undo moves look into a foreign network: samples, layers in order of execution, and batch statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from holdfast.models import Denoiser, SplitModel, is_normalisation
from holdfast.tasks import Task

BATCH = 250
LIMIT = 2000
"""Samples that a move looks at, at most: enough for means and covariances, and no epoch of a large data set."""


def samples(task: Task, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Yields inputs of the training split in batches: all of them, or a random `LIMIT`."""
    if task.size("train") <= LIMIT:
        yield from (batch.x for batch in task.sweep("train", BATCH, device=device))
        return
    drawn = task.batches("train", BATCH, generator=generator, device=device)
    yield from (batch.x for batch in islice(drawn, LIMIT // BATCH))


def some_samples(task: Task, generator: torch.Generator, device: torch.device) -> Tensor:
    """Returns at most `BATCH` inputs of the training split, drawn at random."""
    return next(task.batches("train", BATCH, generator=generator, device=device)).x


def own_weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weight matrices (and kernels) that a module owns by itself."""
    return {n: p for n, p in layer.named_parameters(recurse=False) if p.dim() > 1 and p.is_floating_point()}


def own_biases(layer: nn.Module) -> list[nn.Parameter]:
    """Returns what a module with weights adds to its output."""
    found = layer.named_parameters(recurse=False)
    return [p for n, p in found if p.dim() == 1 and "bias" in n and p.is_floating_point()]


@contextmanager
def batch_statistics(model: SplitModel, x: Tensor) -> Iterator[None]:
    """Inside, the model is deterministic, BatchNorm uses the batch's statistics, and its own stay what they are.

    So a move sees what training on these samples will see, whatever was put into the running statistics. BatchNorm
    needs two samples for that; with one, it uses its own.
    """
    modes = [(m, m.training) for m in model.modules()]
    layers = [m for m in model.modules() if isinstance(m, _NormBase)]
    kept = [(b, b.clone()) for m in layers for b in m.buffers(recurse=False)]
    model.eval()
    for layer in layers:
        layer.training = len(x) > 1
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, value in kept:
            buffer.copy_(value)


@torch.no_grad()
def in_order(model: SplitModel, x: Tensor) -> list[tuple[str, nn.Module]]:
    """Returns the layers with weights and the normalisations, in the order in which a forward pass first calls them.

    Those that it does not call (a network may use a layer's weight without calling the layer) come last.
    """
    layers = {m: n for n, m in model.network.named_modules() if own_weights(m) or is_normalisation(m)}
    called: dict[nn.Module, str] = {}

    def before(layer: nn.Module, _: object) -> None:
        called.setdefault(layer, layers[layer])

    hooks = [m.register_forward_pre_hook(before) for m in layers]
    try:
        with batch_statistics(model, x):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [(n, m) for m, n in {**called, **layers}.items()]


def counterpart(reference: SplitModel, name: str) -> nn.Module | None:
    """Returns the layer of that name in the reference, if it has one."""
    return dict(reference.network.named_modules()).get(name)


def fresh_values(layer: nn.Module, reference: nn.Module | None, name: str) -> Tensor:
    """Returns a weight as it is in the reference; where that has none of its shape, as torch would draw it."""
    own = own_weights(layer)[name]
    like = None if reference is None else dict(reference.named_parameters(recurse=False)).get(name)
    if like is not None and like.shape == own.shape:
        return like.detach().to(own)
    bound = max(own[0].numel(), 1) ** -0.5
    return torch.empty_like(own).uniform_(-bound, bound)


@torch.no_grad()
def mend(model: SplitModel, reference: SplitModel) -> None:
    """Replaces weights that are not finite by those of the reference, and other parameters that are not finite by 0."""
    for name, layer in model.network.named_modules():
        weights = own_weights(layer)
        for key, parameter in layer.named_parameters(recurse=False):
            if not parameter.is_floating_point() or bool(parameter.isfinite().all()):
                continue
            neutral = 1.0 if is_normalisation(layer) and key == "weight" else 0.0
            fresh = (
                fresh_values(layer, counterpart(reference, name), key)
                if key in weights
                else torch.full_like(parameter, neutral)
            )
            parameter.copy_(torch.where(parameter.isfinite(), parameter, fresh))


def no_feature_vector(model: SplitModel) -> str | None:
    """Says why a model has no vector of features before its head, or None if it has one."""
    if isinstance(model, Denoiser):
        return "it is a denoiser, whose head takes an image and no vector of features"
    return None
