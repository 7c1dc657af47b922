"""What would change a verdict: the nearest adversary, the seeds that are missing, the flag that bars it."""

from __future__ import annotations

import math
from typing import Final

from holdfast.auditing.sequential import stops
from holdfast.report.sequential import more_seeds
from holdfast.report.wording import CAUSES, by_strength, percent, points, search_for, span
from holdfast.results import AuditResult, BudgetRow
from holdfast.results.tables import Cell
from holdfast.results.terms import count

MANY: Final = 1000
"""Seeds above which "more seeds" is not a practical advice."""

REMEDIES: Final[dict[str, str]] = {
    "no-finite-score": "An audit of weights that compute finite scores on all three models.",
    "unskilled-original": f"An original that knows its benign task. {CAUSES}",
    "original-below-reported": f"An original that scores as its publisher says. {CAUSES}",
    "benign-not-finite": "A defense after which the benign score is finite.",
    "benign-dropped": "A defense that keeps the benign score.",
    "scratch-does-not-learn": "A control that learns: more steps (budgets), more samples (shots), or a battery with "
    "higher learning rates.",
    "no-original-advantage": "A restricted task that the original is worth having for: another one, fewer samples "
    "(shots), or smaller budgets.",
    "battery-lost": "A battery that the controls survive: lower learning rates, or smaller budgets.",
    "fine-tuning-broke": "Attacks that do not break on the model: lower learning rates, normalised gradients, and undo "
    "moves.",
    "not-attacked": "Attacks that train: higher learning rates, more steps, and undo moves.",
}
"""What an invalid audit lacks, by the code of its reason."""


def what_would_change(audit: AuditResult) -> list[str]:
    """Returns sentences on what would change the verdict, the most direct first.

    The number of seeds is an estimate: it takes the mean as it is, and the width of its band as proportional to one
    over the square root of the seeds. Test samples, which widen the band too, stay what they are.
    """
    code = audit.verdict.decision.code if audit.verdict.decision is not None else ""
    codes = [reason.code for reason in audit.verdict.reasons]
    lines: list[str] = []
    if code in ("worthless", "unproven"):
        lines += [REMEDIES[each] for each in dict.fromkeys(codes) if each in REMEDIES]
        if "uncertain-original-advantage" in codes:
            lines.append(f"More than {count(len(audit.seeds), 'seed')}, so that the original's advantage is certain.")
        if code == "worthless" and stops(audit.verdict, audit.by_budget) is None:
            lines.append(more_seeds(audit, len(audit.seeds)))
    if code == "exceeds":
        lines += _to_pass(audit)
    if code == "undecided":
        lines += _to_decide(audit)
    if code == "bounded":
        lines += _to_fall(audit)
    lines += [
        f"The red flag {flag.name!r} bars {'a verdict' if code == 'unproven' else 'resists'}. {flag.remedy}"
        for flag in audit.flags
        if flag.severity == "critical"
    ]
    if code in ("undecided", "bounded") and not audit.search:
        lines.append(f"A search against this model (battery {search_for(audit)}), which may find what no list has.")
    return lines


def _after_training(audit: AuditResult) -> list[BudgetRow]:
    return [row for row in audit.by_budget if row.budget and row.advantage is not None]


def _nearest(audit: AuditResult) -> BudgetRow | None:
    return max(_after_training(audit), key=lambda row: row.advantage or 0.0, default=None)


def _described(row: BudgetRow) -> str:
    """The best attack at a budget, with its score and advantage."""
    reached = percent(row.best["immunized"].mean)
    return (
        f"{row.best_adversary['immunized']}, at {reached} after {count(row.budget, 'step')} or before: "
        f"{points(row.advantage)} points"
    )


def _to_pass(audit: AuditResult) -> list[str]:
    """For a model that a battery undoes."""
    limits, row = audit.verdict.thresholds, _nearest(audit)
    if row is None:
        return []
    above = (row.best["scratch"].mean or 0.0) + limits.tolerance
    through = [name for name in by_strength(audit) if _reached(audit, name, row.budget) > above]
    return [
        f"A defense that holds against {_described(row)} against {audit.spoken.training_control}. The upper end of the "
        f"95% band must stay below {100 * limits.max_advantage:g} points at every budget.",
        f"{len(through)} of {count(len(audit.adversaries), 'adversary')} alone are more than "
        f"{100 * limits.tolerance:g} points above it there{_some(through)}; all of them would have to be stopped.",
    ]


def _to_decide(audit: AuditResult) -> list[str]:
    """For an audit whose numbers allow either verdict."""
    limits, seeds = audit.verdict.thresholds, len(audit.seeds)
    wide = [
        row for row in _after_training(audit) if row.interval is not None and row.interval.high > limits.max_advantage
    ]
    if not wide:
        return ["More than one seed, which alone shows no spread."] if seeds == 1 else []
    worst = max(wide, key=lambda row: row.interval.high if row.interval else 0.0)
    lines = [
        f"A narrower band. With {count(seeds, 'seed')} it is {span(worst.interval)} points after "
        f"{count(worst.budget, 'step')}; the nearest adversary is {_described(worst)}."
    ]
    resisting = [_seeds_for(row, seeds, limits.max_advantage - (row.advantage or 0.0)) for row in wide]
    failing = [
        _seeds_for(row, seeds, row.advantage or 0.0) for row in wide if (row.advantage or 0.0) > limits.tolerance
    ]
    need = {"for `resists`": max(resisting), "against it": min(failing, default=math.inf)}
    side = min(need, key=need.__getitem__)
    if math.isfinite(need[side]):
        lines.append(f"{_about(need[side])} would decide {side}, if the means stay as they are.")
        if need[side] <= MANY:
            lines.append(more_seeds(audit, need[side]))
    return lines


def _to_fall(audit: AuditResult) -> list[str]:
    """For a model that resists."""
    limits, row = audit.verdict.thresholds, _nearest(audit)
    if row is None:
        return []
    return [
        f"An attack that reaches more on this model than {audit.spoken.training_control}. The nearest is "
        f"{_described(row)} against it, with a 95% band of {span(row.interval)}; above {100 * limits.tolerance:g} "
        "points with a band above 0 the verdict would be partial or fails.",
        f"More than {count(audit.budgets[-1], 'step')}, or more than {audit.adversary_samples} samples: nothing was "
        "measured there.",
    ]


def _seeds_for(row: BudgetRow, seeds: int, half: float) -> float:
    """Seeds with which half of the band would be below `half`; infinite if no number is enough."""
    if row.interval is None or half <= 0:
        return math.inf
    now = (row.interval.high - row.interval.low) / 2
    return max(seeds + 1, math.ceil(seeds * (now / half) ** 2))


def _about(seeds: float) -> str:
    return f"About {seeds:.0f} seeds" if seeds <= MANY else f"More than {MANY} seeds"


def _reached(audit: AuditResult, name: str, budget: int) -> float:
    """The best mean score of an adversary on the immunized model up to a budget."""
    curves = [
        c.scores[: audit.budgets.index(budget) + 1]
        for c in audit.curves
        if c.adversary == name and c.role == "immunized"
    ]
    means = [Cell.of(scores).mean for scores in zip(*curves, strict=True)]
    return max((mean for mean in means if mean is not None), default=-math.inf)


def _some(names: list[str], shown: int = 3) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f" ({', '.join(names[:shown])}{more})"
