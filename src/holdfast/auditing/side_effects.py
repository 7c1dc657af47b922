"""Side effects: how well an immunized model still learns harmless tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from holdfast.adversaries import BATTERIES
from holdfast.auditing.statistics import Comparison
from holdfast.auditing.trials import On, Trial, TrialRunner, applicable
from holdfast.results import ROLES, SideEffect
from holdfast.runtime.run import derive_seed
from holdfast.tasks import Task

SIDE_EFFECTS = "side-effects-v1"
"""The battery for side effects: fine-tuning by harmless users."""


def side_effects(
    tasks: Mapping[On, Task], runner: TrialRunner, stages: Sequence[Sequence[int]], confidence: float
) -> list[SideEffect]:
    """Measures how well the models learn harmless tasks: the benign task again, and the transfer task if given.

    Args:
        tasks: by role.
        runner: runs the trials.
        stages: the seeds of the audit, as they were added: what is trained together does not depend on later ones.
        confidence: of bands and intervals.
    """
    effects = []
    for on in ("benign", "transfer"):
        if on not in tasks:
            continue
        harmless, refused = applicable(SIDE_EFFECTS, BATTERIES[SIDE_EFFECTS], runner.context.immunized, tasks[on])
        curves = []
        for seeds in stages:
            trials = [Trial(role, a, s, on) for s in seeds for role in ROLES for a in harmless]
            curves += runner.run(trials, f"Side effects ({tasks[on].name})")
        bootstrap = derive_seed(runner.context.run.seed, "bootstrap", on)
        comparison = Comparison.of(curves, bootstrap, confidence=confidence)
        lost, interval = comparison.advantage("original", "immunized")[-1], comparison.band("original", "immunized")[-1]
        effects.append(
            SideEffect(
                task=tasks[on].name,
                task_role=on,
                by_budget=comparison.rows(),
                lost=float(lost) if math.isfinite(lost) else None,
                interval=interval,
                not_applicable=refused,
                failures={f"{c.adversary}, seed {c.seed}": c.failure for c in curves if c.failure is not None},
            )
        )
    return effects
