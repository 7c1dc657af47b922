"""Undoing blocks that are hard to train: a trainable linear map, at first the identity, after each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adversaries.undo.introspection import run_batch, some_samples
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.tasks import Task

# Parameters of the layer after which the map acts, and a hook that applies them: with modules of their own, the network
# would have other blocks and other names, which fresh blocks and other moves rely on.
WEIGHT, BIAS, AXIS = "inserted_weight", "inserted_bias", "inserted_axis"


def _weighted_layers(model: SplitModel) -> list[nn.Module]:
    """The module of each block that has its weights."""
    return [m for block in model.blocks() for _, m in block if any(p.dim() > 1 for p in m.parameters())]


def _no_block(model: SplitModel, task: Task) -> str | None:
    return None if model.blocks() else "its body has no layer with weights, after which a layer could be inserted"


def _train_layers(model: SplitModel) -> None:
    for module in model.network.modules():
        if hasattr(module, WEIGHT):
            getattr(module, WEIGHT).requires_grad_(True)
            getattr(module, BIAS).requires_grad_(True)


@undo_move("insert-between", impossible=_no_block, finish=_train_layers)
@torch.no_grad()
def insert_between(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Inserts a trainable linear layer after every block, at first the identity, which keeps its outputs.

    The layers map the features of each place or token. They are trained whatever the scope is, so that an adversary
    can change what frozen blocks pass on. In a block of a convolution and a normalisation, the layer comes in between.
    """
    found: dict[nn.Module, Tensor] = {}

    def saw(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.dim() > 1 and first.is_floating_point():
            found.setdefault(layer, first)

    x = some_samples(task, generator, device)[:2]
    run_batch(model, x, (layer.register_forward_hook(saw) for layer in _weighted_layers(model)))
    for layer, output in found.items():
        if hasattr(layer, WEIGHT):
            continue
        axis = 1 if output.dim() > 3 else -1
        width = output.shape[axis]
        layer.register_parameter(WEIGHT, nn.Parameter(torch.eye(width).to(output)))
        layer.register_parameter(BIAS, nn.Parameter(torch.zeros(width).to(output)))
        setattr(layer, AXIS, axis)
        layer.register_forward_hook(_mapped)


def _mapped(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Returns the output with mapped features; of several outputs, the first is mapped."""
    if isinstance(output, tuple):
        return (_mapped(layer, args, output[0]), *output[1:])
    if not isinstance(output, Tensor):
        return output
    axis: int = getattr(layer, AXIS)
    mapped = output.movedim(axis, -1) @ getattr(layer, WEIGHT).T + getattr(layer, BIAS)
    return mapped.movedim(-1, axis)
