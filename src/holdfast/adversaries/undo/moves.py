"""Undo moves: repairs that an informed adversary tries before fine-tuning.

An adversary who knows that a model was made hard to fine-tune repairs it first: scales weights back, revives dead
units, estimates statistics again. Each move costs a few forward passes on the adversary's own samples. A defense that
such a move defeats has hidden what the model knows, not removed it.

Each move changes a copy of the released model in place. It gets what the adversary has: samples, and a freshly
initialised model of the same architecture (`reference`). If there is nothing to repair, it does not change the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Final

import torch

from holdfast.models import SplitModel
from holdfast.runtime.registry import Registry
from holdfast.tasks import Task

Make = Callable[[SplitModel, SplitModel, Task, torch.Generator, torch.device], None]
Reason = Callable[[SplitModel, Task], str | None]


def _never(model: SplitModel, task: Task) -> str | None:
    return None


def _nothing(model: SplitModel) -> None:
    return None


@dataclass
class UndoMove:
    """A move and its requirements. Call it with (model, reference, task, generator, device).

    Attributes:
        name: for `FineTuning(undo=...)`.
        make: changes the model in place.
        needs_reference: whether it uses the fresh model; if not, `reference` may be the model itself.
        of_features: whether it depends on the features of the last layer of the body; if the strategy reinitialises
            that layer, it does so before the move.
        idle: returns why the move would do nothing on a model and a task, or None. Other moves may still be useful.
        impossible: returns why the move cannot be made on a model and a task, or None. With a reason, the adversary
            cannot start.
        finish: called after the strategy has chosen which weights are trained.
        weights_only: whether it changes nothing but values of weights: no layer, setting or statistics. Attacks on
            small networks can then be trained together after it; see `holdfast.adversaries.batched`.
    """

    name: str
    make: Make
    needs_reference: bool = False
    of_features: bool = False
    idle: Reason = _never
    impossible: Reason = _never
    finish: Callable[[SplitModel], None] = _nothing
    weights_only: bool = False

    def __post_init__(self) -> None:
        update_wrapper(self, self.make)

    def __call__(
        self, model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
    ) -> None:
        """Makes the move."""
        self.make(model, reference, task, generator, device)

    def cannot(self, model: SplitModel, task: Task) -> str | None:
        """Returns why the move cannot be made on a model and a task, or None if it can."""
        reason = model.not_renewable() if self.needs_reference else None
        return (
            self.impossible(model, task) if reason is None else f"{self.name} compares with a fresh model, and {reason}"
        )


UNDO: Final[Registry[UndoMove]] = Registry("undo move", "holdfast.adversaries.undo")
"""Moves by name. A new one is a file in this folder, or an entry point of the group `holdfast.adversaries.undo`."""


def undo_move(
    name: str,
    *,
    needs_reference: bool = False,
    of_features: bool = False,
    idle: Reason = _never,
    impossible: Reason = _never,
    finish: Callable[[SplitModel], None] = _nothing,
    weights_only: bool = False,
) -> Callable[[Make], Make]:
    """Returns a decorator that registers a function as an undo move; see `UndoMove` for the arguments.

    Raises:
        HoldfastError: if another move has this name.
    """

    def registered(make: Make) -> Make:
        UNDO.register(name)(UndoMove(name, make, needs_reference, of_features, idle, impossible, finish, weights_only))
        return make

    return registered


def not_applicable(moves: tuple[str, ...], model: SplitModel, task: Task) -> str | None:
    """Returns why a move cannot be made on a model, or why all of them would do nothing; None if they are useful."""
    for move in moves:
        if (reason := UNDO[move].cannot(model, task)) is not None:
            return reason
    reasons = [UNDO[move].idle(model, task) for move in moves]
    return reasons[0] if reasons and None not in reasons else None
