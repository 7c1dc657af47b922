"""Texts that report, card, leaderboard and terminal share: key numbers, formats, commands and caveats."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.auditing.retention import WITH_BENIGN_DATA, benign_after
from holdfast.auditing.verdict import doubts as doubts_of
from holdfast.results import AuditResult, BudgetRow, Cost, Interval, Role, RunResult, reason_texts
from holdfast.results.tables import Cell, Table
from holdfast.results.terms import count

MINUS = "\N{MINUS SIGN}"
NEVER = "never within the budget"

METHODS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "low-rank adapters (LoRA)": lambda config: config.get("scope") in ("lora", "qlora"),
    "linear probes on prepared features": lambda config: config.get("kind") == "probe",
    "undoing the defense before fine-tuning (rescaling, recalibration, revived units, ...)": lambda config: bool(
        config.get("undo")
    ),
    "keeping the benign task with benign data (replay, an anchor)": lambda config: any(
        config.get(option) for option in WITH_BENIGN_DATA
    ),
    "distillation": lambda config: config.get("kind") == "distillation",
}
"""Methods that a battery may lack, and a test of an adversary's settings for each."""


@dataclass(frozen=True)
class KeyNumbers:
    """The most important rows of an audit.

    Attributes:
        last: the largest budget.
        worst: the budget above 0 with the largest advantage of the immunized model; None: no budget has finite scores
            on this model and from scratch.
        headroom: the same for the original.
    """

    last: BudgetRow
    worst: BudgetRow | None
    headroom: BudgetRow | None


def key_numbers(audit: AuditResult) -> KeyNumbers:
    """Returns the key numbers of an audit."""
    rows = [r for r in audit.by_budget if r.budget]
    worst = max((r for r in rows if has(r, "immunized")), key=lambda r: r.advantage or 0.0, default=None)
    headroom = max((r for r in rows if has(r, "original")), key=lambda r: r.original_advantage or 0.0, default=None)
    return KeyNumbers(audit.by_budget[-1], worst, headroom)


def has(row: BudgetRow, role: Role) -> bool:
    """Whether this role's advantage is known: both it and scratch have a finite score."""
    return row.best[role].mean is not None and row.best["scratch"].mean is not None


def strongest(audit: AuditResult) -> str:
    """Returns the name of the best adversary on the immunized model, at the last budget or before."""
    return audit.by_budget[-1].best_adversary["immunized"]


CAUSES = (
    "Likely causes: another input normalisation than the weights were trained with (--mean, --std), another image "
    "size, other channels, labels in another order, or weights that were not loaded."
)
"""Why an original may score far too low."""


def doubts(audit: AuditResult) -> list[str]:
    """Returns the reasons to doubt that the original was loaded correctly; shown before everything else."""
    doubts = doubts_of(audit.benign, audit.verdict.thresholds, audit.reported_benign)
    return [reason_texts.reason(each, audit.spoken) for each in doubts]


def reasons(audit: AuditResult) -> list[str]:
    """Returns the reasons of the verdict as sentences."""
    return [reason_texts.reason(each, audit.spoken) for each in audit.verdict.reasons]


def kept(audit: AuditResult) -> str:
    """Says what the benign score is after the best attack on the immunized model; empty if it was not measured."""
    cell = benign_after(audit.curves).get(("immunized", strongest(audit)))
    if cell is None:
        return ""
    score = "a score that is not finite" if cell.mean is None else f"{cell.mean:.1%}"
    return f"After the best attack ({strongest(audit)}) it is {score}."


def benign_keepers(audit: AuditResult) -> str:
    """Describes the adversaries that keep the benign task, and the best of them; empty if no limit was given."""
    keeping = audit.keeping
    if keeping is None:
        return ""
    limit = f"{100 * keeping.limit:g} points"
    if not keeping.by_budget:
        return f"No adversary kept the benign task: each costs the immunized model more than {limit}."
    last = keeping.by_budget[-1]
    mean = last.best["immunized"].mean
    reached = "no finite score" if mean is None else f"{mean:.1%}"
    more = (
        ""
        if last.advantage is None
        else f", {100 * last.advantage:+.1f} points against {audit.spoken.training_control}"
    )
    return (
        f"{len(keeping.adversaries.get('immunized', []))} of {count(len(audit.adversaries), 'adversary')} cost the "
        f"immunized model at most {limit} of its benign score. The best of them is "
        f"{last.best_adversary['immunized']}: {reached} after {count(last.budget, 'step')}{more}. The verdict "
        "counts all adversaries."
    )


@dataclass(frozen=True)
class BoundedBest:
    """A row of the table of the best attacks by benign score lost.

    Attributes:
        may_lose: share of the benign score; "any" in the last row.
        within: how many adversaries are within it on the immunized model, and of how many.
        row: the best of them against the controls; None if there is none.
        benign_after: benign score after the best of them on the immunized model.
    """

    may_lose: str
    within: str
    row: BudgetRow | None
    benign_after: Cell | None


def bounded(audit: AuditResult) -> list[BoundedBest]:
    """Returns the best attack within each bound on the benign score, and the best of all; empty if not measured."""
    if not audit.bounds:
        return []
    of = len(audit.adversaries)
    rows = [
        BoundedBest(
            f"{100 * bound.share:g} %", f"{len(bound.adversaries.get('immunized', []))} of {of}", bound.last,
            bound.benign_after.get("immunized"),
        )
        for bound in audit.bounds
    ]  # fmt: skip
    after = benign_after(audit.curves).get(("immunized", strongest(audit)))
    return [*rows, BoundedBest("any", f"{of} of {of}", audit.by_budget[-1], after)]


def how_to_read_bounds(audit: AuditResult) -> str:
    """Explains the table of `bounded`."""
    return (
        "Each row is the best attack after which the model has lost at most this share of its own benign score: if a "
        "row with a small share reaches almost as much as the last one, an attacker gives up next to nothing. The "
        f"benign score is measured only after the last budget ({count(audit.budgets[-1], 'step')}), so attacks within "
        f"a bound are scored there; the best of all, and {audit.spoken.training_control}, may stop earlier. The "
        "verdict counts all adversaries."
    )


def by_strength(audit: AuditResult) -> list[str]:
    """Returns the adversaries by their best score on the immunized model, strongest first, without a score last."""

    def strength(name: str) -> float:
        curves = [c.scores for c in audit.curves if c.adversary == name and c.role == "immunized"]
        means = [Cell.of(scores).mean for scores in zip(*curves, strict=True)]
        return max((m for m in means if m is not None), default=-math.inf)

    return sorted(audit.adversaries, key=strength, reverse=True)


def replay_command(result: RunResult, folder: Path) -> str | None:
    """Returns the command that repeats the best attack on the immunized model; None if it cannot be replayed."""
    if result.audit is None or (result.job != "run" and "source" not in result.recipe):
        return None
    name, seed = strongest(result.audit), str(result.audit.seeds[0])
    command = ["holdfast", "replay", str(folder), "--adversary", name, "--role", "immunized", "--seed", seed]
    return shlex.join(command) if name in result.audit.adversaries else None


def cost_ratio(audit: AuditResult, quantity: str = "steps", role: Role = "immunized") -> float | None:
    """Returns the cost of the target score with a model, over that from scratch; None: one of them is not known."""
    by_role: dict[Role, Cost] = {c.role: c for c in audit.costs}
    if role not in by_role or "scratch" not in by_role:
        return None
    own, scratch = (getattr(by_role[r], quantity) for r in (role, "scratch"))
    return own / scratch if own is not None and scratch else None


def paper_of_best(result: RunResult) -> dict[tuple[str, int], float]:
    """Returns the paper's numbers for the best of the battery, by role and budget."""
    numbers = {
        (str(row.get("model")), int(match[0])): cell.paper
        for row in (result.tables["best"].rows if "best" in result.tables else [])
        for column, cell in row.items()
        if isinstance(cell, Cell) and cell.paper is not None and (match := re.search(r"\d+$", column))
    }
    for line in result.audit.by_budget if result.audit else []:
        numbers |= {(role, line.budget): c.paper for role, c in line.best.items() if c.paper is not None}
    return numbers


def search_for(audit: AuditResult) -> str:
    """Returns the name of the battery that searches for adversaries against models of this kind."""
    return "adaptive-causal-v1" if audit.language is not None or audit.texts else "adaptive-v2"


def not_covered(audit: AuditResult) -> list[str]:
    """Lists what the audit did not try, as far as its settings show."""
    tried = {key: _values(audit, key) for key in ("optimizer", "learning_rate", "batch_size")}
    lines = [
        f"Longer fine-tuning: more than {audit.budgets[-1]} steps.",
        f"More data: more than {samples(audit)}, or data from elsewhere.",
    ]
    settings = [f"{key.replace('_', ' ')} {_listed(values)}" for key, values in tried.items() if values]
    if settings:
        lines.append(f"Other settings. Tried were only: {'; '.join(settings)}; and not every combination of them.")
    missing = [
        description
        for description, uses in METHODS.items()
        if not any(map(uses, audit.adversaries.values()))
        and not ("probes" in description and not audit.spoken.has_features)
    ]
    if not audit.search:
        missing.append(f"a search for adversaries against this model (battery {search_for(audit)})")
    return [
        *lines,
        f"Other methods, for example {', '.join(missing)}.",
        f"Any other restricted task than {audit.restricted_task}.",
    ]


def caveats(audit: AuditResult) -> list[str]:
    """Says how far the numbers of an audit can be trusted."""
    seeds, tested = len(audit.seeds), audit.test_samples
    lines = [selection(audit) + f" A real adversary has no {audit.spoken.answers} and would choose worse: the "
             "audit favours the adversary, on the controls as well."]  # fmt: skip
    failed = [c for c in audit.curves if c.failure is not None]
    if failed:
        lines.append(
            f"{len(failed)} of {len(audit.curves)} trials ended because the immunized model's code failed, and count "
            f"as attacks without a score; first {failed[0].adversary!r}: {failed[0].failure}."
        )
    lost = [trial for trial in audit.search if trial.failure is not None]
    if lost:
        lines.append(
            f"{len(lost)} of {len(audit.search)} trials of the search have no score; first {lost[0].adversary!r} on "
            f"{lost[0].role}: {lost[0].failure}."
        )
    for effect in audit.side_effects:
        for name, reason in {**effect.not_applicable, **effect.failures}.items():
            lines.append(f"Side effects on {effect.task}: {name} has no score: {reason}.")
    if seeds == 1:
        lines.append("There is only one seed: the spread is not known, there is no confidence band, and the verdict "
                     "can only be invalid.")  # fmt: skip
    else:
        few = "Few seeds: with" if seeds < 5 else "With"
        lines.append(
            f"{few} {seeds} seeds, ± (one standard deviation) is a rough measure of spread. The 95% band is wider for "
            "few seeds, and holds at all budgets at once."
        )
    early = [
        row.budget for row in audit.by_budget
        if row.budget and (reached := row.best["scratch"].mean) is not None and reached < 0
    ]  # fmt: skip
    if early:
        lines.append(
            f"After {_listed(list(map(str, early)))} steps {audit.spoken.training_control} is still below 0%. An "
            "advantage over it there may be worthless, and may exceed 100 points. The verdict counts it; the retained "
            "advantage counts scores below 0% as 0%. Larger budgets say more."
        )
    lines.append(
        "The seeds repeat the attack, not the immunization: the audit describes this one immunized model, whose "
        "SHA-256 is below."
    )
    if tested:
        alone = f" by about ± {100 * math.sqrt(0.25 / tested):.1f} points" if audit.spoken.is_share else ""
        score = "a score near 50%" if alone else "scores"
        lines.append(
            f"The test split has {tested} samples. That alone makes {score} uncertain{alone}"
            + (". The band contains that, ± over seeds does not." if seeds > 1 else ".")
        )
    return lines


def samples(audit: AuditResult) -> str:
    """Returns the number and kind of an adversary's training samples."""
    each = "" if audit.shots is None or not audit.spoken.by_class else f" ({audit.shots} a class)"
    return f"{audit.adversary_samples} {audit.spoken.samples}{each}"


def below(audit: AuditResult) -> str:
    """Says that figures cut off scores below 0; empty if there are none."""
    scores = [s for c in audit.curves for s in c.scores if s is not None]
    return "Scores below 0% are cut off; the tables have them." if min(scores, default=0.0) < 0 else ""


def selection(audit: AuditResult) -> str:
    """Says which part of the test split chose the best adversary, and which scored it."""
    if audit.search:
        return (
            "The search saw one half of the test split. The best adversary and the best number of steps are chosen on "
            "that half, and scored on the other half only."
        )
    return (
        "The best adversary and the best number of steps are chosen on one half of the test split and scored on the "
        "other; then the halves are swapped, and the two scores are averaged. No sample scores what it helped to "
        "choose."
    )


def percent(value: float | None) -> str | None:
    """Formats a share in percent."""
    return None if value is None else f"{value:.1%}".replace("-", MINUS)


def points(value: float | None) -> str | None:
    """Formats a difference of scores in points, with its sign unless it rounds to 0."""
    if value is None:
        return None
    text = f"{100 * value:+.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", MINUS)


def span(interval: Interval | None) -> str | None:
    """Formats a confidence interval of a difference in points."""
    return None if interval is None else f"{points(interval.low)} to {points(interval.high)}"


def share_span(interval: Interval | None) -> str | None:
    """Formats a confidence interval of a share in percent."""
    return None if interval is None else f"{interval.low:.0%} to {interval.high:.0%}".replace("-", MINUS)


def amount(value: float | None) -> str:
    """Formats a cost: steps, samples or operations.

    Example:
        >>> amount(3.46), amount(1234.0), amount(2.5e9), amount(None)
        ('3.5', '1,234', '2.5e9', 'never within the budget')
    """
    if value is None:
        return NEVER
    if value >= 1e6:
        return f"{value:.2g}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def times(value: float | None) -> str:
    """Formats a ratio of costs."""
    return "—" if value is None else f"{value:.2g} ×" if value < 10 else f"{value:.0f} ×"


def setting(value: Any) -> str:
    """Formats a setting."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def stopped(tables: Mapping[str, Table]) -> dict[str, list[str]]:
    """Returns the adversaries by the immunization's effect on them."""
    by_effect: dict[str, list[str]] = {}
    for row in tables["stops"].rows if "stops" in tables else []:
        by_effect.setdefault(str(row["stopped"]), []).append(str(row["method"]))
    return by_effect


def _values(audit: AuditResult, key: str) -> list[Any]:
    """The distinct values of one setting over the battery, numbers in ascending order, then texts."""
    values = dict.fromkeys(s[key] for s in audit.adversaries.values() if isinstance(s.get(key), int | float | str))
    return sorted(values, key=lambda v: (isinstance(v, str), v if not isinstance(v, str) else 0))


def _listed(values: Sequence[Any]) -> str:
    if len(values) > 8 and not isinstance(values[0], str):
        return f"{len(values)} values from {setting(values[0])} to {setting(values[-1])}"
    return ", ".join(map(setting, values))
