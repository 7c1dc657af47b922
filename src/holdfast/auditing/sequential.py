"""Sequential audits: seeds are added in stages until the band decides, and all looks share one level.

Look k has a band of confidence 1 - alpha_k. By the union bound, the bands of all looks hold at once with probability at
least 1 - (alpha_1 + ... + alpha_K), however the looks depend on each other and wherever the audit stops. The alpha_k
are the increments of a spending function, and so add up to the level of an audit with a fixed number of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

from holdfast.auditing.statistics import CONFIDENCE
from holdfast.auditing.verdict import bounded
from holdfast.results import BudgetRow, Look, Stop, Verdict

LEVEL = 1 - CONFIDENCE
"""Level of all looks together."""

POWER = 1.5
"""Of the spending function: 1 spends early, as Pocock's bounds do, and 3 late, as those of O'Brien and Fleming."""

GROWTH = 2
"""A look has this many times the seeds of the one before."""

DEFAULT_BUDGET = 4
"""Most seeds, in units of those of the first look."""

WAITING = {"uncertain-original-advantage", "no-original-advantage"}
"""Reasons for `invalid` that more seeds may remove, as long as the original's band reaches high enough."""


@dataclass(frozen=True)
class Stage:
    """One planned look.

    Attributes:
        seeds: all seeds up to this look.
        level: probability that the band of this look may miss the truth.
    """

    seeds: int
    level: float

    @property
    def confidence(self) -> float:
        """Confidence of the band."""
        return 1 - self.level


class Judged(Protocol):
    """The result of one look."""

    @property
    def verdict(self) -> Verdict:
        """The verdict of all seeds so far."""

    @property
    def rows(self) -> Sequence[BudgetRow]:
        """The audit by budget."""


Found = TypeVar("Found", bound=Judged)


def spent(share: float) -> float:
    """Returns the level that is spent when this share of the seeds has been used.

    A spending function of Lan and DeMets (1983), from the power family of Kim and DeMets (1987).

    Example:
        >>> [round(spent(share), 4) for share in (0, 0.25, 0.5, 1)]
        [0.0, 0.0063, 0.0177, 0.05]
    """
    return LEVEL * math.pow(share, POWER)


def stages(seeds: int, max_seeds: int, *, reported: bool = False) -> list[Stage]:
    """Returns the looks of a sequential audit.

    Args:
        seeds: of the first look.
        max_seeds: of the last one.
        reported: whether the first look was reported before, as an audit with a fixed number of seeds, at the full
            level. The later looks then add theirs, and the total is larger than that of one audit.

    Example:
        >>> [(stage.seeds, round(stage.level, 4)) for stage in stages(5, 30)]
        [(5, 0.0034), (10, 0.0062), (20, 0.0176), (30, 0.0228)]
    """
    counts = [seeds]
    while counts[-1] < max_seeds:
        counts.append(min(GROWTH * counts[-1], max_seeds))
    after = [spent(count / max_seeds) for count in counts]
    levels = [after[0], *(now - before for before, now in pairwise(after))]
    if reported or len(counts) == 1:
        levels[0] = LEVEL
    return [Stage(count, level) for count, level in zip(counts, levels, strict=True)]


def until_decided(planned: Sequence[Stage], look: Callable[[Stage], Found]) -> tuple[Found, list[Look], Stop]:
    """Looks until more seeds are not needed, not allowed, or of no use.

    Args:
        planned: the looks; at least one.
        look: adds the seeds of a stage and judges all seeds so far.

    Returns:
        The last result, all looks, and why it stopped.
    """
    looks: list[Look] = []
    for stage in planned:
        found = look(stage)
        decision = found.verdict.decision
        assert decision is not None
        looks.append(Look(seeds=stage.seeds, level=stage.level, decision=decision.code))
        stop = stops(found.verdict, found.rows)
        if stop is not None:
            return found, looks, stop
    return found, looks, "budget ended"


def stops(verdict: Verdict, rows: Sequence[BudgetRow]) -> Stop | None:
    """Returns why no more seeds are needed after a look, or None.

    The band decides if it proves an advantage or excludes a large one. If it excludes one and something else bars
    `resists`, or there is nothing to compare with, more seeds change nothing.

    Args:
        verdict: of the look.
        rows: the look by budget.
    """
    code = verdict.decision.code if verdict.decision is not None else None
    if code in ("exceeds", "bounded"):
        return "decided"
    if code == "undecided" or (code == "unproven" and not bounded(rows, verdict.thresholds)):
        return None
    reasons = {reason.code for reason in verdict.reasons} - {"data-warning"}
    needed = verdict.thresholds.min_original_advantage
    reaches = any(row.original_interval is not None and row.original_interval.high >= needed for row in rows)
    waits = code == "worthless" and bool(reasons) and reasons <= WAITING and reaches
    return None if waits else "not by seeds"
