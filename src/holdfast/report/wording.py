"""What report, card, leaderboard and terminal say alike: key numbers, formats, commands and caveats."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.auditing.retention import benign_after
from holdfast.auditing.verdict import doubts as doubts_of
from holdfast.results import AuditResult, BudgetRow, Cost, Interval, Role, RunResult, reason_texts
from holdfast.results.tables import Cell, Table
from holdfast.results.terms import count

MINUS = "\N{MINUS SIGN}"
NEVER = "never within the budget"

METHODS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "low-rank adapters (LoRA)": lambda config: config.get("scope") == "lora",
    "linear probes on prepared features": lambda config: config.get("kind") == "probe",
    "undoing the defense before fine-tuning (rescaling, recalibration, revived units, ...)": lambda config: bool(
        config.get("undo")
    ),
    "distillation": lambda config: config.get("kind") == "distillation",
}
"""What a battery may lack, and how an adversary's settings show that it has it."""


@dataclass(frozen=True)
class KeyNumbers:
    """What a reader in a hurry needs of an audit.

    Attributes:
        last: the largest budget.
        worst: the budget with the largest advantage; as in the verdict, budget 0 does not count. None: no
            budget has finite scores on both sides.
        headroom: the budget at which the original had the largest advantage; None likewise.
    """

    last: BudgetRow
    worst: BudgetRow | None
    headroom: BudgetRow | None


def key_numbers(audit: AuditResult) -> KeyNumbers:
    """Picks the key numbers of an audit."""
    rows = [r for r in audit.by_budget if r.budget]
    return KeyNumbers(
        last=audit.by_budget[-1],
        worst=max((r for r in rows if has(r, "immunized")), key=lambda r: r.advantage or 0.0, default=None),
        headroom=max((r for r in rows if has(r, "original")), key=lambda r: r.original_advantage or 0.0, default=None),
    )


def has(row: BudgetRow, role: Role) -> bool:
    """Whether this role has an advantage at all: both it and scratch have a finite score."""
    return row.best[role].mean is not None and row.best["scratch"].mean is not None


def strongest(audit: AuditResult) -> str:
    """The name of the best adversary on the immunized model, at the last budget or before."""
    return audit.by_budget[-1].best_adversary["immunized"]


CAUSES = (
    "Likely causes: another input normalisation than the weights were trained with (--mean, --std), another image "
    "size, other channels, labels in another order, or weights that were not loaded."
)
"""Why an original may score far below what it should."""


def doubts(audit: AuditResult) -> list[str]:
    """Why the original may not be the model that its owner means; shown before everything else."""
    found = doubts_of(audit.benign, audit.verdict.thresholds, audit.reported_benign)
    return [reason_texts.reason(each, audit.spoken) for each in found]


def reasons(audit: AuditResult) -> list[str]:
    """The reasons of the verdict as sentences."""
    return [reason_texts.reason(each, audit.spoken) for each in audit.verdict.reasons]


def kept(audit: AuditResult) -> str:
    """What the best attack on the immunized model leaves of its benign score; empty if that was not measured."""
    cell = benign_after(audit.curves).get(("immunized", strongest(audit)))
    if cell is None:
        return ""
    score = "a score that is not finite" if cell.mean is None else f"{cell.mean:.1%}"
    return f"After the best attack ({strongest(audit)}) it is {score}."


def benign_keepers(audit: AuditResult) -> str:
    """What is best among the adversaries who keep the benign task; empty if no limit was given."""
    found = audit.keeping
    if found is None:
        return ""
    names = found.adversaries.get("immunized", [])
    limit = f"at most {100 * found.limit:g} points of its benign score"
    if not found.by_budget:
        return (
            f"No adversary kept the benign task: each costs the immunized model more than {100 * found.limit:g} points."
        )
    last = found.by_budget[-1]
    mean = last.best["immunized"].mean
    reached = "no finite score" if mean is None else f"{mean:.1%}"
    more = "" if last.advantage is None else f", {100 * last.advantage:+.1f} points against training from scratch"
    return (
        f"{len(names)} of {count(len(audit.adversaries), 'adversary')} cost the immunized model {limit}. The best of "
        f"them is {last.best_adversary['immunized']}: {reached} after {count(last.budget, 'step')}{more}. The verdict "
        "counts all adversaries."
    )


def by_strength(audit: AuditResult) -> list[str]:
    """The adversaries by their best score on the immunized model, the strongest first; not finite: last."""

    def strength(name: str) -> float:
        mine = [c.scores for c in audit.curves if c.adversary == name and c.role == "immunized"]
        means = [Cell.of(scores).mean for scores in zip(*mine, strict=True)]
        return max((m for m in means if m is not None), default=-math.inf)

    return sorted(audit.adversaries, key=strength, reverse=True)


def replay_command(result: RunResult, folder: Path) -> str | None:
    """The command that repeats the best adversary on the immunized model; None where a folder does not suffice."""
    if result.audit is None or strongest(result.audit) not in result.audit.adversaries:
        return None
    if result.job != "run" and "source" not in result.recipe:
        return None
    name = strongest(result.audit)
    return shlex.join(["holdfast", "replay", str(folder), "--adversary", name, "--role", "immunized", "--seed",
                       str(result.audit.seeds[0])])  # fmt: skip


def cost_ratio(audit: AuditResult, quantity: str = "steps", role: Role = "immunized") -> float | None:
    """What the target costs with a model, as a multiple of what it costs from scratch; None: one is not known."""
    by_role: dict[Role, Cost] = {c.role: c for c in audit.costs}
    if role not in by_role or "scratch" not in by_role:
        return None
    own, scratch = (getattr(by_role[r], quantity) for r in (role, "scratch"))
    return own / scratch if own is not None and scratch else None


def paper_of_best(result: RunResult) -> dict[tuple[str, int], float]:
    """The paper's numbers for the best of the battery, by role and budget, wherever the result holds them."""
    found = {
        (str(row.get("model")), int(match[0])): cell.paper
        for row in (result.tables["best"].rows if "best" in result.tables else [])
        for column, cell in row.items()
        if isinstance(cell, Cell) and cell.paper is not None and (match := re.search(r"\d+$", column))
    }
    for line in result.audit.by_budget if result.audit else []:
        found |= {(role, line.budget): c.paper for role, c in line.best.items() if c.paper is not None}
    return found


def not_covered(audit: AuditResult) -> list[str]:
    """Says in plain words what the audit did not try, as far as its settings show."""
    tried = {key: _values(audit, key) for key in ("optimizer", "learning_rate", "batch_size")}
    found = [
        f"Longer fine-tuning: more than {audit.budgets[-1]} steps.",
        f"More data: more than {samples(audit)}, or data from elsewhere.",
    ]
    settings = [f"{key.replace('_', ' ')} {_listed(values)}" for key, values in tried.items() if values]
    if settings:
        found.append(f"Other settings. Tried were only: {'; '.join(settings)}; and not every combination of them.")
    missing = [
        description
        for description, uses in METHODS.items()
        if not any(map(uses, audit.adversaries.values()))
        and not ("probes" in description and not audit.spoken.has_features)
    ]
    if not audit.search:
        missing.append("a search for adversaries against this very model (battery adaptive-v1)")
    found.append(f"Other methods, for example {', '.join(missing)}.")
    found.append(f"Any other restricted task than {audit.restricted_task}.")
    return found


def caveats(audit: AuditResult) -> list[str]:
    """Says how far the numbers of an audit can be trusted."""
    seeds, tested = len(audit.seeds), audit.test_samples
    found = [selection(audit) + f" A real adversary has no {audit.spoken.answers} and would choose worse: the "
             "audit errs on the adversary's side, on the controls as well."]  # fmt: skip
    failed = [c for c in audit.curves if c.failure is not None]
    if failed:
        found.append(
            f"{len(failed)} of {len(audit.curves)} trials ended because the immunized model's code failed, and count "
            f"as attacks without a score; first {failed[0].adversary!r}: {failed[0].failure}."
        )
    lost = [trial for trial in audit.search if trial.failure is not None]
    if lost:
        found.append(
            f"{len(lost)} of {len(audit.search)} trials of the search have no score; first {lost[0].adversary!r} on "
            f"{lost[0].role}: {lost[0].failure}."
        )
    for effect in audit.side_effects:
        for name, reason in {**effect.not_applicable, **effect.failures}.items():
            found.append(f"Side effects on {effect.task}: {name} has no score: {reason}.")
    if seeds == 1:
        found.append("There is one seed only: nothing is known about the spread, there is no confidence band, and no "
                     "verdict but invalid.")  # fmt: skip
    else:
        few = "Few seeds: with" if seeds < 5 else "With"
        found.append(
            f"{few} {seeds} seeds, ± (one standard deviation) is a rough measure of spread. The 95% band is made wider "
            "for few seeds, and holds at all budgets at once."
        )
    early = [
        row.budget for row in audit.by_budget
        if row.budget and (reached := row.best["scratch"].mean) is not None and reached < 0
    ]  # fmt: skip
    if early:
        found.append(
            f"After {_listed(list(map(str, early)))} steps training from scratch is still below 0%. An advantage over "
            "it there need not be worth anything, and may be of more than 100 points; the verdict counts it, what is "
            "retained counts scores below 0% as 0%. Larger budgets say more."
        )
    found.append(
        "The seeds repeat the attack, not the immunization: the audit speaks of this one immunized model, "
        "whose SHA-256 is below."
    )
    if tested:
        alone = f" by about ± {100 * math.sqrt(0.25 / tested):.1f} points" if audit.spoken.is_share else ""
        score = "a score near 50%" if alone else "scores"
        found.append(
            f"The test split has {tested} samples. That alone makes {score} uncertain{alone}"
            + (". The band contains that, ± over seeds does not." if seeds > 1 else ".")
        )
    return found


def samples(audit: AuditResult) -> str:
    """What an adversary had to train on."""
    each = "" if audit.shots is None or not audit.spoken.by_class else f" ({audit.shots} a class)"
    return f"{audit.adversary_samples} {audit.spoken.samples}{each}"


def below(audit: AuditResult) -> str:
    """Says that a figure of scores ends at 0 although there are worse ones; empty where there are none."""
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
        "other; then the halves change places, and the two scores are averaged. No sample scores what it helped to "
        "choose."
    )


def percent(value: float | None) -> str | None:
    """A share, in percent."""
    return None if value is None else f"{value:.1%}".replace("-", MINUS)


def points(value: float | None) -> str | None:
    """A difference of scores, in points and with its sign; what rounds to nothing has none."""
    if value is None:
        return None
    text = f"{100 * value:+.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", MINUS)


def span(interval: Interval | None) -> str | None:
    """A confidence interval of a difference, in points."""
    return None if interval is None else f"{points(interval.low)} to {points(interval.high)}"


def share_span(interval: Interval | None) -> str | None:
    """A confidence interval of a share, in percent."""
    return None if interval is None else f"{interval.low:.0%} to {interval.high:.0%}".replace("-", MINUS)


def amount(value: float | None) -> str:
    """A cost: steps, samples or operations.

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
    """A ratio of costs."""
    return "—" if value is None else f"{value:.2g} ×" if value < 10 else f"{value:.0f} ×"


def setting(value: Any) -> str:
    """A setting, as people write it."""
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
    """The adversaries by what the immunization does to each of them."""
    found: dict[str, list[str]] = {}
    for row in tables["stops"].rows if "stops" in tables else []:
        found.setdefault(str(row["stopped"]), []).append(str(row["method"]))
    return found


def _values(audit: AuditResult, key: str) -> list[Any]:
    """The distinct values of one setting over the battery, numbers in ascending order."""
    values = list(
        dict.fromkeys(s[key] for s in audit.adversaries.values() if isinstance(s.get(key), (int, float, str)))
    )
    return sorted(values, key=lambda v: (isinstance(v, str), v if not isinstance(v, str) else 0))


def _listed(values: Sequence[Any]) -> str:
    if len(values) > 8 and not isinstance(values[0], str):
        return f"{len(values)} values from {setting(values[0])} to {setting(values[-1])}"
    return ", ".join(map(setting, values))
