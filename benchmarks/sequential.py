"""How often sequential audits are wrong, how many seeds they need, and what repeated looks without a correction do.

Scores are drawn, not trained: 8 adversaries, a point apart, 4 budgets, 20 folds. A seed moves all models together and
each of them by itself, as does the test split; the difference of two models has a spread of about 4 points a seed. The
verdict comes from the code of the audit. Where the audited model has no advantage at any budget (and the tolerance is
0), each alarm is false. Where it has one of `max_advantage` at the last budget, and is far below scratch at the others,
each `resists` is false. A 95 % band allows 2.5 % of either.

    python benchmarks/sequential.py

Prints a page and writes it to docs/results/sequential.md. Exits with 1 if a sequential audit is wrong significantly
more often than 2.5 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from holdfast.auditing.sequential import LEVEL, Stage, stages, until_decided
from holdfast.auditing.statistics import Array, Battery, Comparison
from holdfast.auditing.verdict import judge
from holdfast.results import BudgetRow, Role, Side, ThreatModel, Thresholds, Verdict

BUDGETS = (0, 5, 10, 20, 50)
ADVERSARIES, FOLDS, MOST = 8, 20, 40
BELOW = -0.1
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


COMPARED = ("5 seeds", "20 seeds", "`--decide`, 3 looks: 5, 10, 20", "`--decide`, 4 looks: 5, 10, 20, 40")
EFFECTS = (-0.05, 0.0, 0.02, 0.08, 0.15, 0.3)


@dataclass(frozen=True)
class Judged:
    """One look at drawn scores."""

    verdict: Verdict
    rows: list[BudgetRow]


def draw(generator: np.random.Generator, advantage: float, *, last_only: bool = False) -> dict[Role, Array]:
    """Scores of the three models, shape (adversaries, seeds, budgets, folds)."""

    def noise(spread: float, *shape: int) -> Array:
        return spread * generator.normal(size=shape)

    steps, gap = len(BUDGETS), 0.01 * np.arange(ADVERSARIES)[:, None, None, None]
    rise = np.linspace(0.1, 0.5, steps)[:, None]
    shared = noise(0.03, 1, MOST, 1, 1) + noise(0.1, 1, 1, 1, FOLDS)
    own = np.full((steps, 1), BELOW if last_only else advantage)
    own[-1] = advantage
    gains: dict[Role, Array | float] = {"immunized": own, "original": 0.3, "scratch": 0.0}
    return {
        role: rise + gain - gap + shared + noise(0.02, 1, MOST, 1, 1) + noise(0.015, 1, MOST, steps, 1)
        + noise(0.01, ADVERSARIES, MOST, steps, 1) + noise(0.03, 1, 1, 1, FOLDS) + noise(0.03, 1, MOST, steps, FOLDS)
        for role, gain in gains.items()
    }  # fmt: skip


def outcomes(
    repetition: int, advantage: float, limits: Thresholds, designs: Sequence[str], *, last_only: bool
) -> dict[str, tuple[str, int]]:
    """What each design decides on the same scores, and with how many seeds."""
    scores = draw(np.random.default_rng((repetition, round(1000 * advantage) + 1000)), advantage, last_only=last_only)

    @cache
    def look(stage: Stage) -> Judged:
        names = tuple(map(str, range(ADVERSARIES)))
        batteries = {role: Battery(names, own[:, : stage.seeds]) for role, own in scores.items()}
        comparison = Comparison(batteries, BUDGETS, repetition, confidence=stage.confidence)
        rows, benign = comparison.rows(), Side(original=1.0, immunized=1.0, chance=0.1)
        verdict = judge(rows, [], benign=benign, chance=0.0, limits=limits, tried=TRIED, retained=comparison.share())
        return Judged(verdict, rows)

    found = {}
    for name in designs:
        judged, looks, _ = until_decided(DESIGNS[name], look)
        assert judged.verdict.decision is not None
        found[name] = judged.verdict.decision.code, looks[-1].seeds
    return found


@dataclass(frozen=True)
class Counted:
    """Decisions and seeds of one design over all repetitions."""

    decisions: list[str]
    seeds: list[int]

    def share(self, decision: str) -> float:
        """Share of the repetitions with this decision."""
        return self.decisions.count(decision) / len(self.decisions)

    @property
    def mean_seeds(self) -> float:
        """Seeds of the last look, on average."""
        return float(np.mean(self.seeds))


def counted(
    advantage: float, limits: Thresholds, repetitions: int, designs: Sequence[str], *, last_only: bool = False
) -> dict[str, Counted]:
    """Repeats all designs at one true advantage, at every budget or at the last one only."""
    every = [outcomes(i, advantage, limits, designs, last_only=last_only) for i in range(repetitions)]
    return {name: Counted([o[name][0] for o in every], [o[name][1] for o in every]) for name in designs}


def wrong(design: str, alarms: Counted, passes: Counted) -> bool:
    """Whether a design that keeps a level is wrong more often than that, at a level of 0.1 %."""
    if "at 95 %" in design:
        return False
    allowed, n = sum(stage.level for stage in DESIGNS[design]) / 2, len(alarms.decisions)
    errors = max(alarms.decisions.count("exceeds"), passes.decisions.count("bounded"))
    return bool(binomtest(errors, n, allowed, alternative="greater").pvalue < 0.001)


def page(
    alarms: dict[str, Counted],
    passes: dict[str, Counted],
    power: dict[float, dict[str, Counted]],
    command: str,
    seconds: float,
) -> str:
    """What was counted, as a page of the documentation."""
    n, few = (len(next(iter(c.values())).decisions) for c in (alarms, next(iter(power.values()))))
    errors = "\n".join(
        f"| {name} | {' + '.join(f'{100 * k.level:.2f}' for k in DESIGNS[name][:5])}"
        f"{' + ...' if len(DESIGNS[name]) > 5 else ''} | {100 * alarms[name].share('exceeds'):.1f} % "
        f"| {100 * passes[name].share('bounded'):.1f} % | {alarms[name].mean_seeds:.1f} "
        f"| {passes[name].mean_seeds:.1f} |"
        for name in DESIGNS
    )
    effects = "\n".join(
        f"| {100 * advantage:+.0f} | {name} | {100 * c.share('bounded'):.0f} % | {100 * c.share('exceeds'):.0f} % "
        f"| {100 * (1 - c.share('bounded') - c.share('exceeds')):.0f} % | {c.mean_seeds:.1f} |"
        for advantage, found in power.items()
        for name, c in found.items()
    )
    return f"""# Sequential audits, simulated

Scores drawn from a known truth: {ADVERSARIES} adversaries, {len(BUDGETS) - 1} budgets, {FOLDS} folds; the difference
of two models has a spread of about 4 points a seed. All designs see the same scores, and decide by the code of the
audit.

## Errors

{n} audits at each of two borders. **Alarm**: an advantage is found (`fails`, `partial`) where there is none at any
budget, with a `tolerance` of 0. **Pass**: `resists` where the true advantage is {100 * LIMITS.max_advantage:g} points
(`max_advantage`) at the last budget; at the others it is {100 * BELOW:g}, so that this one decides. An audit of 95 %
may do either in 2.5 %, and a share of 2.5 % is uncertain by {196 * (0.025 * 0.975 / n) ** 0.5:.1f} points. Seeds are
means at both borders.

| design | level of each look, % | alarms | passes | seeds, no advantage | seeds, `max_advantage` |
|---|---|---|---|---|---|
{errors}

## Power, and seeds

{few} audits a row, with the default thresholds and the same advantage at every budget.

| true advantage, points | design | `resists` | `fails` or `partial` | undecided | seeds |
|---|---|---|---|---|---|
{effects}

```console
$ {command}
```

{seconds:.0f} seconds on one core.
"""


def main() -> int:
    """Runs, prints and writes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--audits", type=int, default=1000, help="at each border")
    parser.add_argument("--power-audits", type=int, default=300, help="at each effect")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "results" / "sequential.md")
    options = parser.parse_args()
    begin = time.perf_counter()
    alarms = counted(0.0, STRICT, options.audits, list(DESIGNS))
    passes = counted(LIMITS.max_advantage, LIMITS, options.audits, list(DESIGNS), last_only=True)
    power = {effect: counted(effect, LIMITS, options.power_audits, COMPARED) for effect in EFFECTS}
    command = f"python benchmarks/sequential.py {' '.join(sys.argv[1:])}".strip()
    text = page(alarms, passes, power, command, time.perf_counter() - begin)
    print(text)
    options.out.write_text(text)
    return int(any(wrong(name, alarms[name], passes[name]) for name in DESIGNS))


if __name__ == "__main__":
    sys.exit(main())
