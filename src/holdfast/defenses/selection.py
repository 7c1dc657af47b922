"""The defender's own examination: short attacks on held-out restricted data, to keep the best state of a long run.

Its adversaries are none of the audit's: a state that was chosen by the audit's would be chosen to look good there. A
test compares them with every battery.
"""

from __future__ import annotations

import math
from typing import Final

from holdfast.models import SplitModel
from holdfast.runtime.run import Run
from holdfast.tasks import Task
from holdfast.training import Strategy, finetune, not_applicable, prepare

VALIDATION: Final = (
    Strategy("head", "all", "adamw", 2e-3, 40),
    Strategy("direct", "all", "adamw", 2e-3, 40),
    Strategy("head", "all", "nesterov", 2e-2, 40),
)
"""Short attacks of three kinds, at rates and batch sizes that no battery has."""


def validation_score(model: SplitModel, task: Task, steps: int, *, run: Run) -> float:
    """Returns what an adversary reaches: the best of `VALIDATION`, averaged over half and all of the steps.

    Every call draws the same batches and fresh heads, so that two states are compared on equal terms.

    Args:
        model: left as it is.
        task: trains on one part of the defender's data, and is scored on another.
        steps: of each attack, at least 2.
        run: seed and device.

    Returns:
        A score of the task as audits compare it, larger is better; nan if no attack can start, or all of them end in
        numbers that are not finite.
    """
    budgets = (steps // 2, steps)
    best = [math.nan, math.nan]
    for strategy in VALIDATION:
        if not_applicable(strategy, model, task) is not None:
            continue
        with run.seeded("validation", strategy.settings()) as generator:
            victim = model.clone()
            prepare(victim, strategy, task)
            training = finetune(victim, task, strategy, generator=generator, device=run.device)
            for step in range(1, steps + 1):
                next(training)
                if step in budgets:
                    i = budgets.index(step)
                    score = task.audit_score(victim)
                    if math.isfinite(score):  # an attack that diverges does not make another one worse
                        best[i] = max(score, best[i]) if math.isfinite(best[i]) else score
    return sum(best) / len(best)
