"""Which of a model's layers run unpublished code, and its weights put into the original's code."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from holdfast.models.extractor import tensors_without_extractor
from holdfast.models.split_model import SplitModel

PUBLISHED = ("torch", "torchvision", "timm", "transformers", "diffusers", "holdfast")
"""Packages whose code is trusted, so that a model's tensors alone decide its outputs."""


def foreign_code(model: SplitModel) -> list[str]:
    """Returns which layers run code from outside the `PUBLISHED` packages: classes, hooks, replaced methods.

    Such code may store knowledge elsewhere than in parameters: in integers, a file or a closure.

    Returns:
        Name and class of each layer.

    Example:
        >>> foreign_code(SplitModel(nn.Sequential(nn.Linear(4, 2)), head="0"))
        []
        >>> class Net(nn.Sequential):
        ...     pass
        >>> foreign_code(SplitModel(Net(nn.Linear(4, 2)), head="0"))
        ["'the network' (Net)"]
    """
    layers = {"the model": model, **{n or "the network": m for n, m in model.network.named_modules()}}
    return [
        f"{name!r} ({type(layer).__name__})"
        for name, layer in layers.items()
        if not is_published(type(layer)) or count_hooks(layer) or _own_functions(layer)
    ]


def is_published(*any_of: Any) -> bool:
    """Whether one of these classes and functions is the object that a `PUBLISHED` package has under its name."""
    return any(_published(item) is item for item in any_of)


def _published(item: Any) -> Any:
    """The published object of an item's name: another one, if the item only took the name."""
    module, name = (str(getattr(item, key, None)) for key in ("__module__", "__qualname__"))
    found: Any = sys.modules.get(module) if module.partition(".")[0] in PUBLISHED else None
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _own_functions(layer: nn.Module) -> bool:
    """Whether an attribute of the object hides a method of its class, or is a function from elsewhere."""
    return any(
        callable(getattr(type(layer), name, None)) or (callable(value) and not is_published(type(value), value))
        for name, value in vars(layer).items()
        if not (name == "factory" and isinstance(layer, SplitModel))  # it runs for the scratch control only
    )


def count_hooks(layer: nn.Module) -> int:
    """Returns how many hooks run with a layer."""
    forward, backward = layer._forward_hooks, layer._backward_hooks
    return sum(map(len, (forward, layer._forward_pre_hooks, backward, layer._backward_pre_hooks)))


@torch.no_grad()
def transplant(model: SplitModel, original: SplitModel) -> SplitModel | None:
    """Puts a model's weights into the original's code, as an adversary may always do.

    The model's own code, which may hinder training, is then not used. Its tensors are searched for in parameters,
    buffers, plain attributes and the outputs of parametrizations: under the original's names, under these with one
    prefix (the original inside a wrapper), or in the original's order and shapes, with other tensors between them.
    Counters, such as those of BatchNorm, stay the original's. An extractor is merged into the head.

    Args:
        model: the released model.
        original: left as it is.

    Returns:
        A copy of the original with the model's weights, and with its input normalisation if it has one; None if the
        model lacks a tensor of the original.

    Example:
        >>> original = SplitModel(nn.Sequential(nn.Linear(4, 3)), head="0")
        >>> class Wrapper(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Sequential(nn.Linear(4, 3))
        ...     def forward(self, x):
        ...         return self.inner(x.detach())
        >>> released = SplitModel(Wrapper(), head="inner.0")
        >>> inside = transplant(released, original)
        >>> torch.equal(inside.head.weight, released.head.weight)
        True
    """
    copy = original.clone()
    own = copy.network.state_dict(keep_vars=True)  # the tensors themselves: writing to them writes to the copy
    needed = {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}
    matching = _matching({**tensors_without_extractor(model), **_computed(model)}, needed)
    if matching is None:
        return None
    for name, tensor in needed.items():
        tensor.copy_(matching[name])
    if model.mean is not None and model.std is not None:
        copy.mean, copy.std = model.mean.clone(), model.std.clone()
    copy.name = f"{model.name} in the original's code"
    return copy


def _computed(model: SplitModel) -> dict[str, Tensor]:
    """The tensors that parametrizations compute, under the names of plain ones."""
    return {
        f"{name}.{tensor}".removeprefix("."): getattr(module, tensor)
        for name, module in model.network.named_modules()
        if parametrize.is_parametrized(module)
        for tensor in module.parametrizations
    }


def _matching(tensors: dict[str, Tensor], needed: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensor for each name, or None; see `transplant`."""
    first = next(iter(needed), None)
    if first is None:
        return None
    prefixes = sorted({n.removesuffix(first) for n in tensors if n == first or n.endswith(f".{first}")}, key=len)
    for prefix in prefixes:
        found = {name: tensors.get(prefix + name) for name in needed}
        if all(t is not None and t.shape == needed[name].shape for name, t in found.items()):
            return {name: t for name, t in found.items() if t is not None}
    rest = (t for t in tensors.values() if t.is_floating_point())
    ordered = {name: next((t for t in rest if t.shape == like.shape), None) for name, like in needed.items()}
    if all(t is not None for t in ordered.values()):
        return {name: t for name, t in ordered.items() if t is not None}
    return None
