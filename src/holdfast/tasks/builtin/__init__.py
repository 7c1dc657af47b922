"""Named tasks: each file registers a function that makes the task.

    @TASKS.register("wine")
    def wine() -> ArrayTask: ...

A function that makes a task of sentences takes a tokenizer and a length, as `phrases_topic` does. Files of other
packages register through entry points of the group `holdfast.tasks`; see `Registry`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from holdfast.runtime.registry import Registry
from holdfast.tasks.base import Task

TASKS: Registry[Callable[..., Task]] = Registry("task", "holdfast.tasks.builtin", group="holdfast.tasks")


def is_sentences(name: str) -> bool:
    """Returns whether a named task needs a tokenizer.

    Example:
        >>> is_sentences("phrases-mood"), is_sentences("digits")
        (True, False)
    """
    return takes(name, "tokenizer")


def takes(name: str, argument: str) -> bool:
    """Returns whether the function of a named task has such an argument."""
    return argument in inspect.signature(TASKS[name]).parameters
