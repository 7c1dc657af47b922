"""How often sequential audits are wrong, how many seeds they need, and what repeated looks without a correction do.

Scores are drawn, not trained: 8 adversaries, a point apart, 4 budgets, 20 folds. A seed moves all models together and
each of them by itself, as does the test split; the difference of two models has a spread of about 4 points a seed. The
audited model has the same true advantage at every budget, and the verdict comes from the code of the audit. At an
advantage of 0 (and a tolerance of 0) each alarm is false; at one of `max_advantage`, each `resists`. A 95 % band allows
2.5 % of either.

    python benchmarks/sequential.py

Prints a page and writes it to docs/results/sequential.md. Exits with 1 if a sequential audit is wrong significantly
more often than 2.5 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from holdfast.auditing.sequential import LEVEL, Stage, stages, until_decided
from holdfast.auditing.statistics import Array, Battery, Comparison
from holdfast.auditing.verdict import judge
from holdfast.results import BudgetRow, Role, Side, ThreatModel, Thresholds, Verdict

BUDGETS = (0, 5, 10, 20, 50)
ADVERSARIES, FOLDS, MOST = 8, 20, 40
LIMITS = Thresholds()
STRICT = Thresholds(tolerance=0.0)
TRIED = ThreatModel(battery="drawn", strategies=8, scored=8, searched=0, samples=100, steps=50, seeds=5)

DESIGNS: dict[str, list[Stage]] = {
    "5 seeds": [Stage(5, LEVEL)],
    "20 seeds": [Stage(20, LEVEL)],
    "3 looks at 95 %: 5, 10, 20": [Stage(n, LEVEL) for n in (5, 10, 20)],
    "16 looks at 95 %: 5, 6, ..., 20": [Stage(n, LEVEL) for n in range(5, 21)],
    "`--decide`, 2 looks: 10, 20": stages(10, 20),
    "`--decide`, 3 looks: 5, 10, 20": stages(5, 20),
    "`--decide`, 4 looks: 5, 10, 20, 40": stages(5, 40),
    "`--decide`, 5 looks: 2, 4, 8, 16, 32": stages(2, 32),
    "5 seeds first, then `--decide` up to 20": stages(5, 20, reported=True),
}


@dataclass(frozen=True)
class Judged:
    """One look at drawn scores."""

    verdict: Verdict
    rows: list[BudgetRow]


def draw(generator: np.random.Generator, advantage: float) -> dict[Role, Array]:
    """Scores of the three models, shape (adversaries, seeds, budgets, folds)."""

    def noise(spread: float, *shape: int) -> Array:
        return spread * generator.normal(size=shape)

    steps, gap = len(BUDGETS), 0.01 * np.arange(ADVERSARIES)[:, None, None, None]
    rise = np.linspace(0.1, 0.5, steps)[:, None]
    shared = noise(0.03, 1, MOST, 1, 1) + noise(0.1, 1, 1, 1, FOLDS)
    gains: dict[Role, float] = {"immunized": advantage, "original": 0.3, "scratch": 0.0}
    return {
        role: rise + gain - gap + shared + noise(0.02, 1, MOST, 1, 1) + noise(0.015, 1, MOST, steps, 1)
        + noise(0.01, ADVERSARIES, MOST, steps, 1) + noise(0.03, 1, 1, 1, FOLDS) + noise(0.03, 1, MOST, steps, FOLDS)
        for role, gain in gains.items()
    }  # fmt: skip


def outcomes(repetition: int, advantage: float, limits: Thresholds) -> dict[str, tuple[str, int]]:
    """What each design decides on the same scores, and with how many seeds."""
    scores = draw(np.random.default_rng((repetition, round(1000 * advantage) + 1000)), advantage)

    @cache
    def look(stage: Stage) -> Judged:
        batteries = {
            role: Battery(tuple(map(str, range(ADVERSARIES))), own[:, : stage.seeds]) for role, own in scores.items()
        }
        comparison = Comparison(batteries, BUDGETS, repetition, confidence=stage.confidence)
        rows = comparison.rows()
        benign = Side(original=1.0, immunized=1.0, chance=0.1)
        verdict = judge(rows, [], benign=benign, chance=0.0, limits=limits, tried=TRIED, retained=comparison.share())
        return Judged(verdict, rows)

    found = {}
    for name, planned in DESIGNS.items():
        judged, looks, _ = until_decided(planned, look)
        assert judged.verdict.decision is not None
        found[name] = judged.verdict.decision.code, looks[-1].seeds
    return found
