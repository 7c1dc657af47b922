"""Undoing tricks that hide weights from optimizers in buffers, attributes, parametrizations and hooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel, is_normalisation
from holdfast.tasks import Task


@undo_move("thaw")
def thaw(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Turns every floating-point tensor that the network uses into a trainable parameter, and removes gradient hooks.

    Buffers and attributes that hide weights become parameters. Parametrizations, such as weight normalisation, are
    replaced by parameters with the values that they compute. Running statistics, which a forward pass in training mode
    changes, and the tensors of normalisation layers stay as they are.

    Example:
        >>> from holdfast.tasks import load_task
        >>> hiding = nn.Module()
        >>> hiding.register_buffer("weight", torch.ones(64, 8))
        >>> hiding.forward = lambda x: x @ hiding.weight
        >>> model = SplitModel(nn.Sequential(nn.Flatten(), hiding, nn.Linear(8, 5)), "2")
        >>> thaw(model, model, load_task("digits[0-4]"), torch.Generator(), torch.device("cpu"))
        >>> [n for n, p in model.network.named_parameters() if p.requires_grad]
        ['1.weight', '2.weight', '2.bias']
    """
    for module in model.network.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    bake(model)
    weights = (
        _hidden_weights(model, next(task.sweep("train", task.rows_at_once(8), device=device)).x)
        if _hidden(model)
        else []
    )
    before = model.dtype
    made: dict[int, nn.Parameter] = {}
    for name, key in weights:
        module = model.network.get_submodule(name)
        value = getattr(module, key)
        delattr(module, key)
        module.register_parameter(key, made.setdefault(id(value), nn.Parameter(value.detach())))
    if model.dtype != before:
        model.precision = before
    for parameter in model.network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def bake(model: SplitModel) -> None:
    """Replaces every parametrized tensor by a plain parameter with the same value."""
    for module in model.network.modules():
        if parametrize.is_parametrized(module):
            # Copies of a module share the class that torch made, from which it deletes the tensor's property.
            made = type(module)
            own = {k: v for k, v in vars(made).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(made.__name__, made.__bases__, own)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)


def _hidden(model: SplitModel) -> dict[tuple[str, str], Tensor]:
    """Floating-point tensors other than parameters, by (module, name)."""
    return {
        (name, key): value
        for name, module in model.network.named_modules()
        if not is_normalisation(module)
        for key, value in [*module.named_buffers(recurse=False), *vars(module).items()]
        if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isfinite().all())
    }


def _hidden_weights(model: SplitModel, x: Tensor) -> list[tuple[str, str]]:
    """The hidden tensors that a forward pass in training mode does not change: weights, not statistics."""
    twin = model.clone().train()
    before = {key: value.clone() for key, value in _hidden(twin).items()}
    with torch.no_grad(), torch.random.fork_rng():
        twin(torch.cat([x, x]) if len(x) == 1 else x)
    after = _hidden(twin)
    return [key for key, value in before.items() if key in after and torch.equal(after[key], value)]
