"""What undo moves need to inspect any network: samples, layers in order of execution, hooks, batch statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from holdfast.models import SplitModel, is_normalisation
from holdfast.tasks import Batch, Task

BATCH = 250
"""Samples that pass a model at once; fewer, if the task says so (`Task.rows_at_once`)."""

LIMIT = 2000
"""Largest number of samples that a move uses: enough for means and covariances, without a pass over large data."""


def samples(task: Task, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Yields inputs of the training split in batches: all, or `LIMIT` random ones if there are more."""
    size = task.rows_at_once(BATCH)
    if task.size("train") <= LIMIT:
        yield from (batch.x for batch in task.sweep("train", size, device=device))
        return
    drawn = task.batches("train", size, generator=generator, device=device)
    yield from (batch.x for batch in islice(drawn, LIMIT // size))


def some_samples(task: Task, generator: torch.Generator, device: torch.device) -> Tensor:
    """Returns at most `BATCH` inputs of the training split, drawn at random."""
    return some_batch(task, generator, device).x


def some_batch(task: Task, generator: torch.Generator, device: torch.device) -> Batch:
    """Returns at most `BATCH` samples of the training split, drawn at random."""
    return next(task.batches("train", task.rows_at_once(BATCH), generator=generator, device=device))


def own_weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Returns a module's weight matrices and kernels, without those of its children."""
    return {n: p for n, p in layer.named_parameters(recurse=False) if p.dim() > 1 and p.is_floating_point()}


def own_biases(layer: nn.Module) -> list[nn.Parameter]:
    """Returns a module's biases, without those of its children."""
    own = layer.named_parameters(recurse=False)
    return [p for n, p in own if p.dim() == 1 and "bias" in n and p.is_floating_point()]


@contextmanager
def batch_statistics(model: SplitModel, x: Tensor) -> Iterator[None]:
    """Puts a model into evaluation mode, except that BatchNorm uses the batch's statistics; restores it afterwards.

    So the model computes what it will compute in training on these samples, whatever its running statistics are. With a
    single sample BatchNorm uses its running statistics.
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


def run_batch(model: SplitModel, x: Tensor, hooks: Iterable[RemovableHandle]) -> None:
    """Runs a batch through a model with the batch's statistics, then removes the hooks."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        stack.enter_context(batch_statistics(model, x))
        model(x)


def run_samples(
    model: SplitModel, task: Task, generator: torch.Generator, device: torch.device, hooks: Iterable[RemovableHandle]
) -> None:
    """Runs the samples through a model in evaluation mode, then removes the hooks."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        stack.callback(model.train, model.training)
        model.eval()
        for x in samples(task, generator, device):
            model(x)


@torch.no_grad()
def in_order(model: SplitModel, x: Tensor) -> list[tuple[str, nn.Module]]:
    """Returns the layers with weights and the normalisation layers, in the order of their first calls.

    Layers that are never called come last: a network may use a layer's weight without calling the layer.
    """
    layers = {m: n for n, m in model.network.named_modules() if own_weights(m) or is_normalisation(m)}
    called: dict[nn.Module, str] = {}

    def before(layer: nn.Module, _: object) -> None:
        called.setdefault(layer, layers[layer])

    run_batch(model, x, (m.register_forward_pre_hook(before) for m in layers))
    return [(n, m) for m, n in {**called, **layers}.items()]


def counterpart(reference: SplitModel, name: str) -> nn.Module | None:
    """Returns the reference's layer with this name, if it has one."""
    try:
        return reference.network.get_submodule(name)
    except AttributeError:
        return None


def fresh_values(layer: nn.Module, reference: nn.Module | None, name: str) -> Tensor:
    """Returns the reference's value of a weight, or torch's default initialisation if shapes differ."""
    own = own_weights(layer)[name]
    like = None if reference is None else dict(reference.named_parameters(recurse=False)).get(name)
    if like is not None and like.shape == own.shape:
        return like.detach().to(own)
    bound = max(own[0].numel(), 1) ** -0.5
    return torch.empty_like(own).uniform_(-bound, bound)


@torch.no_grad()
def repair(model: SplitModel, reference: SplitModel) -> None:
    """Replaces values that are not finite: in weights by the reference's, in other parameters by 0 (scales: 1)."""
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


def no_feature_vector(model: SplitModel, task: Task) -> str | None:
    """Returns why a model has no vector of features before its head, or None if it has one."""
    taken = {
        "noise": "it is a denoiser, whose head takes an image",
        "noise of a captioned image": "it is a text-to-image model, whose head takes an image",
        "next token": "its head takes every position",
    }
    what = taken.get(model.answers_with)
    return None if what is None else f"{what}, not a feature vector"
