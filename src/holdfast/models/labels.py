"""Matches a model's outputs with a task's classes, by name if both have names, else by index."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models.introspection import blank_layer
from holdfast.models.split_model import SplitModel
from holdfast.tasks import Task

_NO_NAME = re.compile(r"(label|class|output|category)?\s*-?\d+")


def real_names(names: Sequence[Any] | None) -> list[str] | None:
    """Returns names of classes in the form that is compared; None if they are only numbers, or one comes twice.

    Example:
        >>> real_names(["Sea  Lion", "cat"]), real_names(["LABEL_0", "LABEL_1"]), real_names(["3", "1"])
        (['sea lion', 'cat'], None, None)
    """
    plain = [" ".join(str(name).replace("_", " ").split()).casefold() for name in names or ()]
    if not plain or len(set(plain)) < len(plain) or all(_NO_NAME.fullmatch(name) for name in plain):
        return None
    return plain


def names_of(network: nn.Module) -> tuple[str, ...] | None:
    """Returns the names of the outputs of a network of transformers or timm, in order; None if it has none.

    Example:
        >>> names_of(nn.Linear(2, 2)) is None
        True
    """
    names = names_in({"id2label": getattr(getattr(network, "config", None), "id2label", None)})
    if names is not None:
        return names
    config = getattr(network, "pretrained_cfg", None)
    labels = config.get("label_names") if isinstance(config, Mapping) else None
    return tuple(map(str, labels)) if isinstance(labels, list | tuple) and labels else None


def names_in(config: Any) -> tuple[str, ...] | None:
    """Returns the names in a configuration of transformers, in the outputs' order; None if it has none.

    Example:
        >>> names_in({"id2label": {"1": "dog", "0": "cat"}})
        ('cat', 'dog')
    """
    labels = config.get("id2label") if isinstance(config, Mapping) else None
    if not isinstance(labels, Mapping) or not labels:
        return None
    try:
        numbered = {int(key): str(name) for key, name in labels.items()}
    except (TypeError, ValueError):
        return None
    return tuple(numbered[i] for i in sorted(numbered)) if sorted(numbered) == list(range(len(numbered))) else None


def match_outputs(model: SplitModel, names: Sequence[str] | None, task: Task) -> list[int] | None:
    """Puts a model's outputs into the order of a task's classes, by name; outputs without a class are left out.

    Args:
        model: with its weights; it and its `notes` are changed in place.
        names: of its outputs, in their order; None: unknown.
        task: with classes.

    Returns:
        The outputs that were kept, in their new order; None if nothing changed.

    Raises:
        HoldfastError: if there are too many or too few names, or the outputs depend on more than the head.
    """
    classes = getattr(task, "class_names", None)
    if names is None or classes is None or not task.labels_are_classes:
        return None
    if len(names) != model.num_outputs:
        raise HoldfastError(
            f"{model.name} names {len(names)} classes ({_some(names)}) and has {model.num_outputs} outputs; they must "
            "agree."
        )
    own, wanted = real_names(names), real_names(classes)
    if own == wanted and own is not None:
        return None
    if own is None or wanted is None:
        if own is not None or wanted is not None:
            which = "its outputs have" if own is None else f"the classes of {task.name} have"
            model.notes += (f"Outputs of {model.name} and classes are matched by index: {which} no names.",)
        return None
    rows = [own.index(name) for name in wanted if name in own]
    if len(rows) < len(wanted):
        missing = [str(c) for c, name in zip(classes, wanted, strict=True) if name not in own]
        model.notes += (
            f"Outputs of {model.name} and classes of {task.name} are matched by index: no output is called "
            f"{_some(missing)}; they are called {_some(names)}.",
        )
        return None
    _select(model, rows, task)
    what = "in another order" if len(rows) == len(own) else f"{len(own)}, of which {len(rows)} are the task's classes"
    model.notes += (f"The outputs of {model.name} were {what}; they were matched with {task.name} by name.",)
    return rows


def _some(names: Sequence[Any]) -> str:
    return f"{', '.join(repr(str(n)) for n in names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


@torch.no_grad()
def _select(model: SplitModel, rows: Sequence[int], task: Task) -> None:
    """Keeps some rows of the head, and checks that the model's outputs follow."""
    probe = next(iter(task.batches("test", 2, device=model.device))).x
    before = _outputs(model, probe)[:, list(rows)]
    old, new = model.head, blank_layer(model.head, len(rows))
    new.weight.copy_(old.weight[list(rows)])
    if new.bias is not None and old.bias is not None:
        new.bias.copy_(old.bias[list(rows)])
    new.requires_grad_(old.weight.requires_grad)
    model.put_head(new)
    after = _outputs(model, probe)
    if after.shape != before.shape or not torch.allclose(before, after, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise HoldfastError(
            f"The outputs of {model.name} are named in another order than the classes of {task.name}, and they depend "
            f"on more than its head {model.head_name!r}, so they cannot be reordered. Order the task's classes as the "
            "model's, with NAME[...]."
        )


def _outputs(model: SplitModel, x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        outputs: torch.Tensor = model.clone().eval()(x)
    return outputs
