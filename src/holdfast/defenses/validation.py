"""Validation by short adversaries on held-out restricted data, to choose the best state of a long run.

None of these adversaries is in a battery of the audit: a state chosen by the audit's adversaries would look good in the
audit by construction. A test compares them with every battery.
"""

from __future__ import annotations

import math
from typing import Final

from holdfast.defenses.state import State, snapshot
from holdfast.models import SplitModel
from holdfast.runtime.distributed import process_group
from holdfast.runtime.run import Run
from holdfast.tasks import Task
from holdfast.training import Strategy, finetune, not_applicable, prepare

VALIDATION: Final = (
    Strategy("head", "all", "adamw", 2e-3, 40),
    Strategy("direct", "all", "adamw", 2e-3, 40),
    Strategy("head", "all", "nesterov", 2e-2, 40),
)
"""Three short adversaries, with rates and batch sizes that no battery has."""

VALIDATION_SHARE = 0.2
"""Share of the defender's restricted training data that is kept back to score these adversaries."""


class Validation:
    """Scores states by short adversaries, and keeps the state with the lowest score.

    Args:
        task: trains on one part of the defender's data, and is scored on another.
        steps: of each adversary.
        run: seed and device.
    """

    def __init__(self, task: Task, steps: int, run: Run) -> None:
        self.task, self.steps, self.run = task, steps, run
        self.best: State = {}
        self.best_score, self.best_round = math.inf, 0

    def examine(self, model: SplitModel, done: int) -> float:
        """Returns the validation score of the state after `done` rounds, and keeps it if it is the best so far."""
        score = process_group().broadcast_object(validation_score(model, self.task, self.steps, run=self.run))
        if score < self.best_score:
            self.best, self.best_score, self.best_round = snapshot(model), score, done
        return score


def validation_score(model: SplitModel, task: Task, steps: int, *, run: Run) -> float:
    """Returns the best score in `VALIDATION` after half of the steps and the best after all steps, averaged.

    Every call draws the same batches and fresh heads, so that scores of two states can be compared.

    Args:
        model: is not changed.
        task: trains on one part of the defender's data, and is scored on another.
        steps: of each adversary, at least 2.
        run: seed and device.

    Returns:
        A score of the task in the unit that audits compare, larger is better; nan if no adversary can start, or all end
        in non-finite numbers.
    """
    budgets = (steps // 2, steps)
    best = [math.nan, math.nan]
    for strategy in VALIDATION:
        if not_applicable(strategy, model, task) is not None:
            continue
        with run.seeded("validation", strategy.settings()) as generator:
            copy = model.clone()
            prepare(copy, strategy, task)
            training = finetune(copy, task, strategy, generator=generator, device=run.device)
            for step in range(1, steps + 1):
                next(training)
                if step in budgets:
                    i = budgets.index(step)
                    score = task.audit_score(copy)
                    if math.isfinite(score):  # an adversary that diverges does not count
                        best[i] = max(score, best[i]) if math.isfinite(best[i]) else score
    return sum(best) / len(best)
