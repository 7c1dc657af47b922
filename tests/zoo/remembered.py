"""What several shams have in common is trained once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
Made = TypeVar("Made")


def remembered(train: Callable[P, Made]) -> Callable[P, Made]:
    """Decorates a function that trains something, so that the same call gets a copy of what the first one made.

    The same call has equal tensors, the same other arguments, and the same state of torch's generator, which it leaves
    as the first one did: every weight is what it would be if it was trained again.
    """
    kept: dict[object, tuple[Made, Tensor]] = {}

    @wraps(train)
    def trained(*args: P.args, **options: P.kwargs) -> Made:
        key = (*map(_content, args), *((k, _content(v)) for k, v in options.items()), _content(torch.get_rng_state()))
        if key not in kept:
            kept[key] = train(*args, **options), torch.get_rng_state()
        made, state = kept[key]
        torch.set_rng_state(state)
        return copy.deepcopy(made)

    return trained


def _content(value: object) -> object:
    """Stands for a value in a key: a tensor by its shape and numbers."""
    if isinstance(value, Tensor):
        return value.shape, hashlib.sha256(value.detach().contiguous().numpy().tobytes()).digest()
    return value
