"""Statistics of the curves of an audit: best of the battery, advantage with a confidence band, cost.

**Selection.** The best of many adversaries looks better than it is on the samples that chose it. So the test split is
cut into folds: adversary and stopping time are chosen on every second fold and scored on the others, then the other way
around, and the two scores are averaged. All samples are used, and none scores a choice that it took part in.

**Confidence.** Two things are random: the seeds (samples, batches, fresh weights) and the test split. The bootstrap
draws n seeds with replacement for all folds, and f folds within each half for all seeds. The draws are the same for all
models, which share samples, batches and test images, so that differences vary less than scores. With d_k and e_k the
deviations of the advantage a_k at budget k in a replicate of the first and of the second kind, the band

    a_k +- c sd(D_k),   D_k = g(n) d_k + g(f) e_k,   c = 95 % quantile of max_k |D_k| / sd(D_k),

covers all budgets at once. g(n) = sqrt(n / (n - 1)) t_{n-1} / z corrects for small n: resampling n values makes their
variance too small by (n - 1) / n, and t_{n-1} / z replaces the normal by Student's distribution. A look of a sequential
audit has another confidence than 95 %, in both places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import scipy

from holdfast.results import ROLES, BudgetRow, Cost, Curve, Interval, Role
from holdfast.results.tables import Cell

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
REPLICATES = 1000

MORE_REPLICATES = 20
"""The bootstrap grows with the confidence by at most this; beyond that the quantile is bounded, see `_quantile`."""

ROUNDING = 1e-12
"""Far below any spread of scores, far above rounding errors of sums."""


@dataclass(frozen=True)
class Battery:
    """The curves of one model: scores of shape (adversaries, seeds, budgets, folds); NaN where not finite.

    Attributes:
        names: of the adversaries.
        scores: see above.
        both_ways: whether each half of the folds scores what the other chose; False: only the second half scores,
            because a search has seen the first.
    """

    names: tuple[str, ...]
    scores: Array
    both_ways: bool = True

    @classmethod
    def of(cls, curves: Sequence[Curve], width: int, *, both_ways: bool = True) -> Battery:
        """Stacks the curves of one model, scored on `width` folds; all have the seeds and budgets of the first."""
        names = tuple(dict.fromkeys(c.adversary for c in curves))
        by_name = [sorted((c for c in curves if c.adversary == name), key=lambda c: c.seed) for name in names]
        lost = [math.nan] * width
        stacked = [[[f if f is not None else lost for f in c.folds] for c in seeds] for seeds in by_name]
        return cls(names, np.asarray(stacked, dtype=np.float64), both_ways)

    def only(self, names: Sequence[str]) -> Battery:
        """Returns the battery of some of the adversaries."""
        return Battery(tuple(names), self.scores[[self.names.index(name) for name in names]], self.both_ways)

    def at_the_end(self) -> Battery:
        """Returns the battery at the last budget alone, without early stopping."""
        return Battery(self.names, self.scores[:, :, -1:], self.both_ways)

    def stopped_anywhere(self) -> Battery:
        """Returns a battery of one budget in which each stopping time is a member; its best is that of the last budget.

        So it can be compared with another battery `at_the_end`.
        """
        adversaries, seeds, budgets, folds = self.scores.shape
        members = self.scores.transpose(2, 0, 1, 3).reshape(budgets * adversaries, seeds, 1, folds)
        return Battery(self.names * budgets, members, self.both_ways)

    def best_name(self, budget: int) -> str:
        """Returns the adversary that is best on the whole test split, up to the budget of this index."""
        means = self.scores.mean((1, 3))[:, : budget + 1]
        known = np.where(np.isnan(means), -np.inf, means).max(1)
        return self.names[int(known.argmax())] if np.isfinite(known.max()) else "none finite"

    @cached_property
    def best(self) -> tuple[Array, ...]:
        """Best of the battery, chosen on one half of the folds and scored on the other; one array per scored half.

        Shape (S, K, F): seeds, budgets up to which is chosen, folds; NaN where no adversary is finite with every seed.
        A single fold both chooses and scores.
        """
        first, second = halve(self.scores.shape[3])
        ways = [(first, second), (second, first)] if self.both_ways else [(first, second)]
        return tuple(_choose(self.scores[..., one].mean((1, 3)), self.scores[..., two]) for one, two in ways)


def halve(folds: int) -> tuple[list[int], list[int]]:
    """Returns the indices of every second fold, and of the others; a single fold is in both.

    Example:
        >>> halve(5), halve(1)
        (([0, 2, 4], [1, 3]), ([0], [0]))
    """
    return list(range(0, folds, 2)), list(range(1, folds, 2)) or [0]


def _choose(means: Array, scores: Array) -> Array:
    """Returns the scores (S, K, F) at the best mean up to each budget; means (A, K), scores (A, S, K, F)."""
    known = np.where(np.isnan(means), -np.inf, means)
    best_scores = np.full(scores.shape[1:], np.nan)
    best, chosen = -math.inf, best_scores[:, 0]
    for k, top in enumerate(known.argmax(0)):
        if known[top, k] > best:
            best, chosen = known[top, k], scores[top, :, k]
        best_scores[:, k] = chosen
    return best_scores


@dataclass(frozen=True)
class Comparison:
    """The curves of one task, by role.

    Attributes:
        batteries: the curves of each model.
        budgets: the steps at which scores were taken.
        seed: of the bootstrap.
        floor: lowest score in sums over budgets; lower ones count as this. Errors are unbounded, and one budget at
            which nothing is learned yet would outweigh all others.
        confidence: of bands and intervals.
    """

    batteries: dict[Role, Battery]
    budgets: tuple[int, ...]
    seed: int = 0
    floor: float = -math.inf
    confidence: float = CONFIDENCE

    @classmethod
    def of(
        cls,
        curves: Sequence[Curve],
        seed: int = 0,
        *,
        both_ways: bool = True,
        floor: float = -math.inf,
        confidence: float = CONFIDENCE,
    ) -> Comparison:
        """Sorts the curves of one task by role; see `Battery` for `both_ways`."""
        width = max((len(f) for c in curves for f in c.folds if f is not None), default=1)
        batteries = {
            role: Battery.of(own, width, both_ways=both_ways)
            for role in ROLES
            if (own := [c for c in curves if c.role == role])
        }
        return cls(batteries, tuple(curves[0].budgets), seed, floor, confidence)

    @cached_property
    def scores(self) -> dict[Role, Array]:
        """Best of the battery for each seed and budget, shape (S, K)."""
        return {role: np.mean([half.mean(2) for half in b.best], 0) for role, b in self.batteries.items()}

    @cached_property
    def _deviations(self) -> dict[Role, Array] | None:
        """Deviations of the mean best of the battery in each replicate, shape (R, K); see D_k above.

        None for a single seed, or a single fold in a half, because one value has no spread.
        """
        first = next(iter(self.batteries.values()))
        counts = [first.scores.shape[1], *(half.shape[2] for half in first.best)]
        if min(counts) < 2:
            return None
        generator = np.random.default_rng(self.seed)
        by_seed, *by_fold = [_resampled(n, generator, self.confidence) for n in counts]
        deviations = {}
        for role, battery in self.batteries.items():
            folds = [weights @ half.mean(0).T for weights, half in zip(by_fold, battery.best, strict=True)]
            deviations[role] = by_seed @ self.scores[role] + np.mean(folds, 0)
        return deviations

    def advantage(self, role: Role, over: Role = "scratch") -> Array:
        """Returns the mean advantage at each budget, shape (K,); NaN where either model has no finite score."""
        difference: Array = self.scores[role].mean(0) - self.scores[over].mean(0)
        return difference

    def _floored(self, role: Role, deviations: Mapping[Role, Array] | None = None) -> Array:
        """Advantage over scratch of scores cut off at the floor; of replicates, if their deviations are given."""
        own, scratch = (
            np.maximum(self.scores[r].mean(0) + (0.0 if deviations is None else deviations[r]), self.floor)
            for r in (role, "scratch")
        )
        difference: Array = own - scratch
        return difference

    def band(self, role: Role, over: Role = "scratch") -> list[Interval | None]:
        """Returns the band around the advantage at each budget.

        None at budget 0, where scores are not finite, and for one seed or one fold in a half, which have no spread.
        """
        band: list[Interval | None] = [None] * len(self.budgets)
        inside = [k for k, budget in enumerate(self.budgets) if budget]
        mean = self.advantage(role, over)[inside]
        deviations = self._deviations
        if deviations is None or not np.isfinite(mean).all():
            return band
        drawn = (deviations[role] - deviations[over])[:, inside]
        width = _quantile(drawn, self.confidence) * drawn.std(0, ddof=1)
        for k, centre, half in zip(inside, mean, width, strict=True):
            band[k] = Interval(low=float(centre - half), high=float(centre + half))
        return band

    def share(self, role: Role = "immunized", of: Role = "original") -> tuple[float | None, Interval | None]:
        """Returns the retained share of the original's advantage, and its confidence interval.

        The share is the sum over budgets above 0 of the positive advantage of `role`, divided by that of `of`. The
        interval is None where the band is, and if `of` has no advantage in too many replicates.
        """
        inside = [k for k, budget in enumerate(self.budgets) if budget]
        own, had = (np.maximum(self._floored(r)[inside], 0).sum() for r in (role, of))
        if not (np.isfinite(own) and np.isfinite(had) and had > 0):
            return None, None
        drawn = self._deviations
        if drawn is None:
            return float(own / had), None
        owns, hads = (np.maximum(self._floored(r, drawn)[:, inside], 0).sum(1) for r in (role, of))
        if (hads > 0).mean() < self.confidence:
            return float(own / had), None
        ratios = owns / np.where(hads > 0, hads, np.nan)
        low, high = np.nanquantile(ratios, [(1 - self.confidence) / 2, (1 + self.confidence) / 2])
        return float(own / had), Interval(low=float(low), high=float(high))

    def area(self, role: Role) -> float | None:
        """Returns the mean advantage from the first budget above 0 to the last, by trapezoids; in score units."""
        steps = np.asarray([b for b in self.budgets if b], dtype=np.float64)
        values = self._floored(role)[-len(steps) :]
        if len(steps) < 2 or not np.isfinite(values).all():
            return None
        return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))

    def cells(self) -> list[dict[Role, Cell]]:
        """Returns the best of the battery over seeds, by budget and role."""
        return [
            {role: Cell.of(_finite(v) for v in self.scores[role][:, k]) for role in self.batteries}
            for k in range(len(self.budgets))
        ]

    def rows(self) -> list[BudgetRow]:
        """Returns the comparison as one row per budget; without an original, its advantage is None."""
        compared: list[Role] = [r for r in ("immunized", "original") if r in self.batteries]
        bands = {role: self.band(role) for role in compared}
        gained = {role: self.advantage(role) for role in compared}
        had, no_bands = "original" in gained, [None] * len(self.budgets)
        return [
            BudgetRow(
                budget=budget,
                best=cells,
                best_adversary={role: b.best_name(k) for role, b in self.batteries.items()},
                advantage=_finite(gained["immunized"][k]),
                original_advantage=_finite(gained["original"][k]) if had else None,
                interval=bands["immunized"][k],
                original_interval=bands.get("original", no_bands)[k],
            )
            for k, (budget, cells) in enumerate(zip(self.budgets, self.cells(), strict=True))
        ]


def costs(
    comparison: Comparison, target: float, batch_sizes: Mapping[str, int], flops: Mapping[str, float | None]
) -> list[Cost]:
    """Returns the cost of reaching a target score, for each model.

    Each adversary's mean curve over seeds and the whole test split counts, with straight lines between budgets. Steps,
    samples and operations may have different cheapest adversaries.

    Args:
        comparison: curves of all roles.
        target: the score to reach.
        batch_sizes: samples per step, by adversary.
        flops: floating-point operations per step, by adversary; None where they could not be counted.
    """
    by_role = []
    for role, battery in comparison.batteries.items():
        steps = {
            name: reached
            for name, curve in zip(battery.names, battery.scores.mean((1, 3)), strict=True)
            if (reached := _steps_to(target, comparison.budgets, curve)) is not None
        }
        counted = {name: n * per for name, n in steps.items() if (per := flops.get(name)) is not None}
        by_role.append(
            Cost(
                role=role,
                steps=min(steps.values(), default=None),
                samples=min((n * batch_sizes[name] for name, n in steps.items()), default=None),
                flops=min(counted.values(), default=None),
                adversary=min(steps, key=lambda name: steps[name]) if steps else None,
            )
        )
    return by_role


def _steps_to(target: float, budgets: Sequence[int], curve: Array) -> float | None:
    """Returns the first step, on straight lines between budgets, at which a curve reaches the target."""
    for k, score in enumerate(curve):
        if score >= target:
            before = curve[k - 1] if k else math.nan
            if k == 0 or math.isnan(before):
                return float(budgets[k])
            share = (target - before) / (score - before)
            return float(budgets[k - 1] + share * (budgets[k] - budgets[k - 1]))
    return None


def _quantile(drawn: Array, confidence: float) -> float:
    """Quantile of the largest deviation over budgets, in standard deviations; at least the pointwise quantile.

    Where too few replicates lie beyond a quantile, a normal distribution bounds it: by the union over budgets.
    """
    deviation = drawn.std(0, ddof=1)
    pointwise = float(scipy.special.ndtri((1 + confidence) / 2))
    if MORE_REPLICATES * (1 - confidence) < 1 - CONFIDENCE:
        return float(scipy.special.ndtri(1 - (1 - confidence) / (2 * drawn.shape[1])))
    varies = deviation > ROUNDING  # budgets without spread do not affect c
    if not varies.any():
        return pointwise
    largest = np.abs((drawn - drawn.mean(0))[:, varies] / deviation[varies]).max(1)
    return max(float(np.quantile(largest, confidence)), pointwise)


def _resampled(count: int, generator: np.random.Generator, confidence: float) -> Array:
    """Deviations of bootstrap weights from equal weights, widened for few values; shape (R, count).

    R grows with the confidence, so that as many replicates lie beyond its quantile.
    """
    replicates = round(REPLICATES * min((1 - CONFIDENCE) / (1 - confidence), MORE_REPLICATES))
    drawn = generator.multinomial(count, np.full(count, 1 / count), replicates) / count
    return (drawn - 1 / count) * small_sample(count, confidence)


def small_sample(count: int, confidence: float = CONFIDENCE) -> float:
    """Returns the factor by which a bootstrap over so few values is too narrow.

    Example:
        >>> [round(small_sample(n), 2) for n in (2, 3, 5, 10, 100)]
        [9.17, 2.69, 1.58, 1.22, 1.02]
        >>> [round(small_sample(n, 0.99), 2) for n in (2, 3, 5, 10, 100)]
        [34.95, 4.72, 2.0, 1.33, 1.02]
    """
    level = (1 + confidence) / 2
    return math.sqrt(count / (count - 1)) * float(scipy.special.stdtrit(count - 1, level) / scipy.special.ndtri(level))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
