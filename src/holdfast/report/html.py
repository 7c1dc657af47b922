"""The page: one HTML file with its figures, style and script inside; nothing is loaded from anywhere."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from holdfast.execution import write_atomic
from holdfast.report.plots import STYLES, adversary_plots, best_plot, figure_plot, history_plot, series_title
from holdfast.results import ROLES, AuditResult, BudgetRow, Cell, Role, RunResult, Table

MINUS = "\N{MINUS SIGN}"

METHODS = {
    "lora": "low-rank adapters (LoRA)",
    "distil": "distillation",
    "closed": "closed-form probes",
    "adaptive": "adversaries made for this defense",
}
"""What a battery may lack, by a word that an adversary's name or settings would contain if it had it."""


def write_report(result: RunResult, path: Path) -> None:
    """Writes the report on a result: one HTML file that needs no network and can be sent as it is.

    Args:
        result: of any kind; what it lacks is said in the report, not left out in silence.
        path: the file; it appears whole or not at all.
    """
    write_atomic(path, render(result))


def render(result: RunResult) -> str:
    """Returns the report's HTML; see `write_report`."""
    audit, immunization = result.audit, result.immunization
    return _environment().get_template("report.html.j2").render(
        result=result,
        audit=audit,
        key=None if audit is None else key_numbers(audit),
        best=None if audit is None else best_plot(audit),
        paper=None if audit is None else _paper_of_best(result),
        adversaries=[] if audit is None else adversary_plots(audit),
        untried=[] if audit is None else not_covered(audit),
        caveats=[] if audit is None else caveats(audit),
        strategies=None if audit is None else Grid.of_settings(audit.adversaries),
        grids=[(name, Grid.of_table(name, t)) for name, t in result.tables.items() if name != "best"],
        figures=[figure_plot(name, figure) for name, figure in result.figures.items()],
        history=None if immunization is None else history_plot(immunization),
        last_benign=None if immunization is None else _last(immunization.history.get("benign_score", [])),
        recipe=_recipe(result),
        command=shlex.join(result.provenance.command),
        plotly=Markup(get_plotlyjs()),
    )  # fmt: skip


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
        worst=max((r for r in rows if _has(r, "immunized")), key=lambda r: r.advantage or 0.0, default=None),
        headroom=max((r for r in rows if _has(r, "original")), key=lambda r: r.original_advantage or 0.0, default=None),
    )


def not_covered(audit: AuditResult) -> list[str]:
    """Says in plain words what the audit did not try, as far as its settings show."""
    each = "" if audit.shots is None else f" ({audit.shots} a class)"
    tried = {key: _values(audit, key) for key in ("optimizer", "learning_rate", "batch_size")}
    found = [
        f"Longer fine-tuning: more than {audit.budgets[-1]} steps.",
        f"More data: more than {audit.adversary_samples} labelled samples{each}, or data from elsewhere.",
    ]
    settings = [
        f"{key.replace('_', ' ')} {', '.join(map(_setting, values))}" for key, values in tried.items() if values
    ]
    if settings:
        found.append(f"Other settings. Tried were only: {'; '.join(settings)}; and not every combination of them.")
    words = json.dumps([audit.adversaries], default=str).lower()
    missing = [description for word, description in METHODS.items() if word not in words]
    if missing:
        found.append(f"Other methods, for example {', '.join(missing)}.")
    found.append(f"Any other restricted task than {audit.restricted_task}.")
    return found


def caveats(audit: AuditResult) -> list[str]:
    """Says how far the numbers of an audit can be trusted."""
    seeds, samples = len(audit.seeds), audit.test_samples
    found = [
        "Test scores choose the best adversary and the best number of steps. A real adversary without test "
        "labels would choose worse, so this favours the adversary. The best on each control is chosen in the "
        "same way."
    ]
    if seeds == 1:
        found.append("There is one seed only: nothing is known about the spread, and small differences mean nothing.")
    else:
        few = "Few seeds: with" if seeds < 5 else "With"
        found.append(
            f"{few} {seeds} seeds, ± is a rough measure of spread. Do not rely on differences that are not "
            "clearly larger."
        )
    found.append(
        "The seeds repeat the attack, not the immunization: the audit speaks of this one immunized model, "
        "whose SHA-256 is below."
    )
    if samples:
        error = 100 * math.sqrt(0.25 / samples)
        found.append(
            f"The test split has {samples} samples. That alone makes a score near 50% uncertain by about "
            f"± {error:.1f} points, beside the spread over seeds."
        )
    return found


@dataclass(frozen=True)
class Grid:
    """A table as the page draws it: rows in groups, text columns first, the best numbers marked.

    Attributes:
        title: its heading.
        texts: names of the text columns.
        numbers: names of the numeric columns.
        groups: heading and rows; each row maps a column to its text or cell.
        best: places of the best cell of each column in each group: (group, row, column).
        percent: whether numbers are shares, to be shown in percent.
        note: what the columns mean.
    """

    title: str
    texts: list[str]
    numbers: list[str]
    groups: list[tuple[str, list[Mapping[str, Any]]]]
    best: set[tuple[int, int, str]]
    percent: bool
    note: str = ""

    @classmethod
    def of_table(cls, name: str, table: Table) -> Grid:
        """Lays out a table of the result; of `battery` the best score of each column is marked."""
        columns = list(dict.fromkeys(key for row in table.rows for key in row))
        numbers = [c for c in columns if any(isinstance(row.get(c), Cell) for row in table.rows)]
        texts = [c for c in columns if c not in numbers and c != "model"]
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in table.rows:
            groups.setdefault(str(row.get("model", "")), []).append(row)
        best = _best(list(groups.values()), numbers) if name == "battery" else set()
        return cls(table.title, texts, numbers, list(groups.items()), best, table.percent, table.note)

    @classmethod
    def of_settings(cls, settings: Mapping[str, Mapping[str, Any]]) -> Grid:
        """Lays out the settings of several adversaries, one a row."""
        columns = list(dict.fromkeys(key for values in settings.values() for key in values))
        rows = [{"adversary": name, **{k: _setting(v) for k, v in values.items()}} for name, values in settings.items()]
        return cls("", ["adversary", *columns], [], [("", list(rows))], set(), False)


def _best(groups: Sequence[Sequence[Mapping[str, Any]]], columns: Sequence[str]) -> set[tuple[int, int, str]]:
    found = set()
    for g, rows in enumerate(groups):
        for column in columns:
            means = [cell.mean if isinstance(cell := row.get(column), Cell) else None for row in rows]
            top = max((m for m in means if m is not None), default=None)
            found |= {(g, i, column) for i, m in enumerate(means) if m is not None and m == top}
    return found


def _has(row: BudgetRow, role: Role) -> bool:
    """Whether this role has an advantage at all: both it and scratch have a finite score."""
    return row.best[role].mean is not None and row.best["scratch"].mean is not None


def _paper_of_best(result: RunResult) -> dict[tuple[str, int], float]:
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


def _values(audit: AuditResult, key: str) -> list[Any]:
    """The distinct values of one setting over the battery, numbers in ascending order."""
    values = list(
        dict.fromkeys(s[key] for s in audit.adversaries.values() if isinstance(s.get(key), (int, float, str)))
    )
    return sorted(values, key=lambda v: (isinstance(v, str), v if not isinstance(v, str) else 0))


def _last(values: Sequence[float | None]) -> float | None:
    return next((v for v in reversed(values) if v is not None), None)


def _recipe(result: RunResult) -> str:
    """The resolved recipe as YAML; through JSON first, for plain types only."""
    settings = result.model_dump(mode="json", include={"recipe"})["recipe"]
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}".replace("-", MINUS)


def _points(value: float | None) -> str | None:
    """A difference of scores, in points and with its sign; what rounds to nothing has none."""
    if value is None:
        return None
    text = f"{100 * value:+.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", MINUS)


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_setting, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, default=str)


COLUMNS = {
    "ratio_restricted": "(i) restricted",
    "ratio_benign": "(ii) benign",
    "rir": "RIR",
    "rir_bound": "RIR*",
    "held_out_ratio_restricted": "(i) held out",
    "held_out_ratio_benign": "(ii) held out",
    "published_ratio_restricted": "(i) restricted",
    "published_ratio_benign": "(ii) benign",
    "published_rir": "RIR",
    "tau_restricted": "restricted tau",
    "tau_restricted_measured": "measured",
    "tau_restricted_ratio": "ratio",
    "tau_benign": "benign tau",
    "tau_benign_measured": "measured ",
    "tau_benign_ratio": "ratio ",
}
"""Headings of columns whose name in `result.json` is not one for people."""


def _column(name: str) -> str:
    return COLUMNS.get(name, name.replace("_", " "))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("holdfast.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "setting": _setting,
        "column": _column,
        "number": lambda value: "never" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
        "series": series_title,
    }
    environment.globals |= {"ROLES": ROLES, "STYLES": STYLES, "has": _has}
    return environment
