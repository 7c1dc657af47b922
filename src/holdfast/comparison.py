"""What the curves of an audit say: best of the battery, advantage with a confidence band, what it costs.

**Selection.** The best of many adversaries looks better than it is on the samples that chose it. So the test split is
cut in folds, adversary and stopping time are chosen on every second fold and scored on the others, then the other way
around, and the two scores are averaged. Both halves are used, and no sample is scored by what it helped to choose.

**Confidence.** Two things are random: the seeds (samples, batches, fresh weights) and the test split. The bootstrap
draws n seeds with replacement, all test folds fixed, and folds inside each half, all seeds fixed; alike for all models,
which share samples, batches and test images, so that differences vary less than scores; and it chooses anew each time.
With d_k and e_k the deviations of the advantage a_k at budget k in a replicate of the first and of the second kind,

    a_k +- c sd(D_k),   D_k = sqrt(n / (n - 1)) (t_{n-1} / z) d_k + e_k,   c = 95 % quantile of max_k |D_k| / sd(D_k),

covers all budgets at once. The factors are for few seeds: resampling n values makes their variance (n - 1) / n too
small, and t_{n-1} / z is what Student's distribution adds to the normal one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, t

from holdfast.results import ROLES, BudgetRow, Cell, Cost, Curve, Interval, Role

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
REPLICATES = 1000


@dataclass(frozen=True)
class Battery:
    """The curves of one model: scores of shape (adversaries, seeds, budgets, folds); NaN where not finite.

    Attributes:
        names: of the adversaries.
        scores: see above.
        both_ways: whether each half of the folds scores what the other chose; False: the second scores only, because a
            search saw the first.
    """

    names: tuple[str, ...]
    scores: Array
    both_ways: bool = True

    @classmethod
    def of(cls, curves: Sequence[Curve], *, both_ways: bool = True) -> Battery:
        """Stacks the curves of one model; seeds and budgets must be those of the first adversary."""
        names = tuple(dict.fromkeys(c.adversary for c in curves))
        by_name = [sorted((c for c in curves if c.adversary == name), key=lambda c: c.seed) for name in names]
        width = max((len(f) for c in curves for f in c.folds if f is not None), default=1)
        lost = [math.nan] * width
        stacked = [[[f if f is not None else lost for f in c.folds] for c in mine] for mine in by_name]
        return cls(names, np.asarray(stacked, dtype=np.float64), both_ways)

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return int(self.scores.shape[1])

    def best_name(self, budget: int) -> str:
        """The adversary that is best on the whole test split, at this index of the budgets or before."""
        means = self.scores.mean((1, 3))[:, : budget + 1]
        known = np.where(np.isnan(means), -np.inf, means).max(1)
        return self.names[int(known.argmax())] if np.isfinite(known.max()) else "none finite"

    def best(self, seeds: Array, folds: Array) -> Array:
        """Best of the battery, chosen on one half of the folds and scored on the other.

        Args:
            seeds: weights that sum to 1, shape (R, S): one row a replicate.
            folds: non-negative weights, shape (R, F).

        Returns:
            Scores of shape (R, S, K): of each seed, up to each budget; NaN where no adversary is finite.
        """
        halves = halve(folds)
        scored = [np.einsum("asbf,rf->rabs", self.scores, half) for half in halves]
        forth = _choose(scored[0], scored[1], seeds)
        return (forth + _choose(scored[1], scored[0], seeds)) / 2 if self.both_ways else forth


def halve(folds: Array) -> tuple[Array, Array]:
    """Returns the weights of every second fold and of the others, each summing to 1; of a single fold, it twice."""
    if folds.shape[1] < 2:
        return np.ones_like(folds), np.ones_like(folds)
    parts = []
    for start in (0, 1):
        part = np.zeros_like(folds)
        part[:, start::2] = folds[:, start::2]
        parts.append(part / part.sum(1, keepdims=True))
    return parts[0], parts[1]


def _choose(chooses: Array, scores: Array, seeds: Array) -> Array:
    """Of (R, A, K, S): what scores best in `chooses`, up to each budget, as seen in `scores`; shape (R, S, K)."""
    means = np.einsum("rabs,rs->rab", chooses, seeds)
    means = np.where(np.isnan(means), -np.inf, means)
    replicates, _, budgets = means.shape
    rows = np.arange(replicates)
    top = means.argmax(1)
    found = np.full((replicates, scores.shape[3], budgets), np.nan)
    best_mean = np.full(replicates, -np.inf)
    best_scores = np.full((replicates, scores.shape[3]), np.nan)
    for k in range(budgets):
        here = means[rows, top[:, k], k]
        better = here > best_mean
        best_mean = np.where(better, here, best_mean)
        best_scores = np.where(better[:, None], scores[rows, top[:, k], k], best_scores)
        found[:, :, k] = best_scores
    return found


@dataclass(frozen=True)
class Comparison:
    """The curves of one task, by role.

    Attributes:
        batteries: the curves of each model.
        budgets: the steps at which scores were taken.
        seed: of the bootstrap.
    """

    batteries: dict[Role, Battery]
    budgets: tuple[int, ...]
    seed: int = 0

    @classmethod
    def of(cls, curves: Sequence[Curve], seed: int = 0, *, both_ways: bool = True) -> Comparison:
        """Sorts the curves of one task by role; see `Battery` for `both_ways`."""
        batteries = {
            role: Battery.of(mine, both_ways=both_ways)
            for role in ROLES
            if (mine := [c for c in curves if c.role == role])
        }
        return cls(batteries, tuple(curves[0].budgets), seed)

    @cached_property
    def scores(self) -> dict[Role, Array]:
        """Best of the battery of each seed at each budget, shape (S, K)."""
        return {
            role: b.best(np.full((1, b.seeds), 1 / b.seeds), np.ones((1, b.scores.shape[3])))[0]
            for role, b in self.batteries.items()
        }

    @cached_property
    def _deviations(self) -> dict[Role, Array]:
        """Deviations of the mean best of the battery in each replicate, shape (R, K); see D_k above."""
        generator = np.random.default_rng(self.seed)
        seeds = min(b.seeds for b in self.batteries.values())
        width = min(b.scores.shape[3] for b in self.batteries.values())
        drawn = generator.multinomial(seeds, np.full(seeds, 1 / seeds), REPLICATES) / seeds
        folds = np.zeros((REPLICATES, width))
        for start in range(min(width, 2)):
            size = len(range(start, width, 2)) if width > 1 else 1
            folds[:, start::2] = generator.multinomial(size, np.full(size, 1 / size), REPLICATES)
        all_seeds, all_folds = np.full_like(drawn, 1 / seeds), np.ones_like(folds)
        found = {}
        for role, battery in self.batteries.items():
            by_seeds = np.einsum("rsk,rs->rk", battery.best(drawn, all_folds), drawn)
            by_folds = battery.best(all_seeds, folds).mean(1)
            factor = small_sample(seeds) if seeds > 1 else math.nan
            found[role] = factor * (by_seeds - by_seeds.mean(0)) + by_folds - by_folds.mean(0)
        return found

    def advantage(self, role: Role, over: Role = "scratch") -> Array:
        """Mean advantage at each budget, shape (K,); NaN where either model has no finite score."""
        difference: Array = self.scores[role].mean(0) - self.scores[over].mean(0)
        return difference

    def band(self, role: Role, over: Role = "scratch") -> list[Interval | None]:
        """The band around the advantage at each budget; None at budget 0 and where it cannot be told.

        One seed has no spread, and then there is no band.
        """
        seeds = min(self.batteries[r].seeds for r in (role, over))
        found: list[Interval | None] = [None] * len(self.budgets)
        inside = [k for k, budget in enumerate(self.budgets) if budget]
        mean = self.advantage(role, over)[inside]
        if seeds < 2 or not np.isfinite(mean).all():
            return found
        drawn = (self._deviations[role] - self._deviations[over])[:, inside]
        if not np.isfinite(drawn).all():
            return found
        width = _quantile(drawn) * drawn.std(0, ddof=1)
        for k, centre, half in zip(inside, mean, width, strict=True):
            found[k] = Interval(low=float(centre - half), high=float(centre + half))
        return found

    def share(self, role: Role = "immunized", of: Role = "original") -> tuple[float | None, Interval | None]:
        """What is left of the original's advantage, and its confidence interval.

        The sum over budgets above 0 of the positive advantage of `role`, divided by that of `of`.
        """
        inside = [k for k, budget in enumerate(self.budgets) if budget]
        own, had = (np.maximum(self.advantage(r)[inside], 0).sum() for r in (role, of))
        if not (np.isfinite(own) and np.isfinite(had) and had > 0):
            return None, None
        if min(b.seeds for b in self.batteries.values()) < 2:
            return float(own / had), None
        moved = {r: self.advantage(r)[inside] + self._deviations[r][:, inside] for r in (role, of)}
        shift = self._deviations["scratch"][:, inside]
        each = [np.maximum(moved[r] - shift, 0).sum(1) for r in (role, of)]
        ratios = each[0][each[1] > 0] / each[1][each[1] > 0]
        if len(ratios) < REPLICATES / 2 or not np.isfinite(ratios).all():
            return float(own / had), None
        low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(own / had), Interval(low=float(low), high=float(high))

    def area(self, role: Role) -> float | None:
        """Mean advantage over the budgets from the first above 0 to the last, by trapezoids; in score units."""
        steps = np.asarray([b for b in self.budgets if b], dtype=np.float64)
        values = self.advantage(role)[-len(steps) :]
        if len(steps) < 2 or not np.isfinite(values).all():
            return None
        return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))

    def cells(self) -> list[dict[Role, Cell]]:
        """Best of the battery over seeds, by budget and role."""
        return [
            {role: Cell.of(_plain(v) for v in self.scores[role][:, k]) for role in self.batteries}
            for k in range(len(self.budgets))
        ]

    def rows(self) -> list[BudgetRow]:
        """The comparison as one row a budget."""
        bands = {role: self.band(role) for role in ("immunized", "original")}
        found = []
        for k, (budget, cells) in enumerate(zip(self.budgets, self.cells(), strict=True)):
            found.append(
                BudgetRow(
                    budget=budget,
                    best=cells,
                    best_adversary={role: b.best_name(k) for role, b in self.batteries.items()},
                    advantage=_plain(self.advantage("immunized")[k]),
                    original_advantage=_plain(self.advantage("original")[k]),
                    interval=bands["immunized"][k],
                    original_interval=bands["original"][k],
                )
            )
        return found


def costs(
    comparison: Comparison, target: float, batch_sizes: Mapping[str, int], flops: Mapping[str, float | None]
) -> list[Cost]:
    """Returns what each model costs an attacker until it scores as high as a target.

    Each adversary's mean curve over seeds and the whole test split counts, with straight lines between budgets; the
    cheapest adversary may be another one for steps, samples and operations.

    Args:
        comparison: curves of all roles.
        target: the score to reach.
        batch_sizes: samples a step, by adversary.
        flops: floating-point operations a step, by adversary; None where it could not be counted.
    """
    found = []
    for role, battery in comparison.batteries.items():
        steps = {
            name: reached
            for name, curve in zip(battery.names, battery.scores.mean((1, 3)), strict=True)
            if (reached := _steps_to(target, comparison.budgets, curve)) is not None
        }
        counted = {name: n * per for name, n in steps.items() if (per := flops.get(name)) is not None}
        found.append(
            Cost(
                role=role,
                steps=min(steps.values(), default=None),
                samples=min((n * batch_sizes[name] for name, n in steps.items()), default=None),
                flops=min(counted.values(), default=None),
                adversary=min(steps, key=lambda name: steps[name]) if steps else None,
            )
        )
    return found


def _steps_to(target: float, budgets: Sequence[int], curve: Array) -> float | None:
    """First place, on straight lines between budgets, at which a curve is as high as the target."""
    for k, score in enumerate(curve):
        if score >= target:
            before = curve[k - 1] if k else math.nan
            if k == 0 or math.isnan(before):
                return float(budgets[k])
            share = (target - before) / (score - before)
            return float(budgets[k - 1] + share * (budgets[k] - budgets[k - 1]))
    return None


def _quantile(drawn: Array) -> float:
    """The quantile of the largest deviation over budgets, in standard deviations; at least the pointwise one."""
    deviation = drawn.std(0, ddof=1)
    moving = deviation > 0
    if not moving.any():
        return float(norm.ppf((1 + CONFIDENCE) / 2))
    largest = np.abs((drawn - drawn.mean(0))[:, moving] / deviation[moving]).max(1)
    return max(float(np.quantile(largest, CONFIDENCE)), float(norm.ppf((1 + CONFIDENCE) / 2)))


def small_sample(seeds: int) -> float:
    """Returns by how much a bootstrap over so few seeds is too narrow.

    Example:
        >>> [round(small_sample(n), 2) for n in (2, 3, 5, 10, 100)]
        [9.17, 2.69, 1.58, 1.22, 1.02]
    """
    level = (1 + CONFIDENCE) / 2
    return math.sqrt(seeds / (seeds - 1)) * float(t.ppf(level, seeds - 1) / norm.ppf(level))


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
