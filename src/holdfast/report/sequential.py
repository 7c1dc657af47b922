"""Sentences on audits that add seeds until they decide."""

from __future__ import annotations

from typing import Final

from holdfast.auditing.sequential import DEFAULT_BUDGET, LEVEL, stages
from holdfast.results import AuditResult, Stop
from holdfast.results.terms import count

WHY: Final[dict[Stop, str]] = {
    "decided": "the band decides",
    "budget ended": "no more seeds were allowed",
    "not by seeds": "more seeds cannot change the result",
}
"""Why an audit stopped."""


def looks(audit: AuditResult) -> str | None:
    """Says how an audit added its seeds, what each look spent, and why it stopped; None for a fixed number of seeds."""
    record = audit.sequential
    if record is None:
        return None
    seeds, levels = _listed([f"{k.seeds}" for k in record.looks]), _listed([f"{k.level:.2%}" for k in record.looks])
    spent = levels if len(record.looks) == 1 else f"{levels}, together {record.level:.1%}"
    allowed = f"all looks may spend {LEVEL:.0%} together"
    if record.reported:
        allowed = (
            f"more than the {LEVEL:.0%} of one audit, because the first look had been reported as an audit of its own"
        )
    return (
        f"Seeds were added in stages: {count(len(record.looks), 'look')}, with {seeds} seeds (at most "
        f"{record.max_seeds}). The audit stopped because {WHY[record.stopped]}. Level spent: {spent}; {allowed}. The "
        f"bands shown are those of the last look, each with a confidence of {1 - record.looks[-1].level:.2%}, so that "
        f"the bands of all looks hold at once with {1 - max(LEVEL, record.level):.1%}."
    )


def more_seeds(audit: AuditResult, needed: float) -> str:
    """Says how an audit that could not decide gets more seeds.

    Args:
        audit: the audit.
        needed: seeds that would decide, by an estimate.
    """
    seeds, record = len(audit.seeds), audit.sequential
    if record is not None:
        return (
            f"This audit's seeds are used up, and so is its level: a new one, with another --seed and in another "
            f"folder, may begin with more (--seeds {seeds}) and add more (--decide --max-seeds {_most(seeds, needed)})."
        )
    if seeds == 1:
        return "A new audit with --decide and at least 2 seeds adds seeds until it decides."
    most = _most(seeds, needed)
    total = sum(stage.level for stage in stages(seeds, most, reported=True))
    return (
        f"The same command with --decide --max-seeds {most} adds seeds to this audit until it decides, at a level of "
        f"at most {total:.1%} for both together. (In a recipe: audit.decide and audit.max_seeds.) With --decide from "
        f"the start, the level is {LEVEL:.0%}."
    )


def _most(seeds: int, needed: float) -> int:
    """A budget with room for looks that are wider than one band, and for means that change."""
    return max(DEFAULT_BUDGET * seeds, round(2 * needed))


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
