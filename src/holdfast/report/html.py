"""The report as one HTML file that contains its figures, style and scripts, and loads nothing."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from holdfast.auditing.retention import BENIGN_AFTER
from holdfast.report import language, wording
from holdfast.report.audit_plots import advantage_plot, adversary_plots, best_plot, search_plot, side_effect_plots
from holdfast.report.plots import STYLES, figure_plot, history_plot, measures_errors, series_title
from holdfast.report.sequential import looks
from holdfast.report.trade_off import trade_off_plots
from holdfast.report.what_would_change import what_would_change
from holdfast.results import ROLES, AuditResult, RunResult
from holdfast.results.image_grid import strips
from holdfast.results.tables import Cell, Pictures, Table, last_known
from holdfast.runtime.storage import write_atomic

LONG_BATTERY, SHOWN_ROWS, SHOWN_PANELS = 12, 6, 8
"""A battery is long from `LONG_BATTERY` adversaries on; then the strongest are shown and the others folded away."""


def write_report(result: RunResult, path: Path) -> None:
    """Writes the report on a result: one HTML file that needs no network.

    Args:
        result: the result of any job.
        path: the file, in the run's folder; it is written atomically.
    """
    write_atomic(path, render(result, path.parent))


def render(result: RunResult, folder: Path) -> str:
    """Returns the report's HTML.

    Args:
        result: see `write_report`.
        folder: the run's folder, for the command that replays a trial.
    """
    audit, immunization = result.audit, result.immunization
    order = [] if audit is None else wording.by_strength(audit)

    return environment().get_template("report.html.j2").render(
        result=result,
        audit=audit,
        **({} if audit is None else _audit_values(result, audit, order, folder)),
        # An audit draws its table `best` in its own section.
        grids=[
            (name, Grid.of_table(name, table, order))
            for name, table in result.tables.items()
            if table.rows and (audit is None or name != "best")
        ],
        figures=[
            *trade_off_plots(result),
            *((f.title, Gallery.of(f) if isinstance(f, Pictures) else figure_plot(name, f))
              for name, f in result.figures.items()),
        ],
        history=None if immunization is None else history_plot(immunization),
        last_benign=None if immunization is None else last_known(immunization.history.get("benign_score", [])),
        errors=immunization is not None and measures_errors(immunization),
        recipe=_recipe(result),
        command=shlex.join(result.provenance.command),
        plotly=Markup(get_plotlyjs()),
    )  # fmt: skip


def _audit_values(result: RunResult, audit: AuditResult, order: Sequence[str], folder: Path) -> dict[str, Any]:
    return {
        "key": wording.key_numbers(audit),
        "best": best_plot(audit),
        "advantage": advantage_plot(audit),
        "paper": wording.paper_of_best(result),
        "panels": adversary_plots(audit, order),
        "shown_panels": SHOWN_PANELS,
        "sides": side_effect_plots(audit),
        "search": search_plot(audit),
        "ratio": {(role, q): wording.cost_ratio(audit, q, role) for role in ROLES for q in ("steps", "flops")},
        "replay": wording.replay_command(result, folder),
        "strongest": wording.strongest(audit),
        "doubts": wording.doubts(audit),
        "reasons": wording.reasons(audit),
        "causes": wording.CAUSES,
        "kept": wording.kept(audit),
        "keepers": wording.benign_keepers(audit),
        "bounded": wording.bounded(audit),
        "reading": wording.how_to_read_bounds(audit),
        "stopped": wording.stopped(result.tables),
        "selection": wording.selection(audit),
        "in_nats": language.in_nats(audit),
        "written": language.written(audit),
        "spoken": audit.spoken,
        "samples": wording.samples(audit),
        "below": wording.below(audit),
        "untried": wording.not_covered(audit),
        "caveats": wording.caveats(audit),
        "changes": what_would_change(audit),
        "looks": looks(audit),
        "strategies": Grid.of_settings({name: audit.adversaries[name] for name in order}),
    }


@dataclass(frozen=True)
class Grid:
    """The layout of a table on the page: rows in groups, text columns first, the best numbers marked.

    Attributes:
        title: its heading.
        texts: names of the text columns.
        numbers: names of the numeric columns.
        groups: heading and rows; each row maps a column to its text or cell.
        best: places of the best cell of each column in each group: (group, row, column).
        percent: whether numbers are shares, to be shown in percent.
        note: what the columns mean.
        shown: rows of each group that are shown before unfolding.
        standard_error: whether to show the standard error after ± instead of the standard deviation.
    """

    title: str
    texts: list[str]
    numbers: list[str]
    groups: list[tuple[str, list[Mapping[str, Any]]]]
    best: set[tuple[int, int, str]]
    percent: bool
    note: str = ""
    shown: int = 10**6
    standard_error: bool = False

    @property
    def length(self) -> int:
        """Rows of the longest group."""
        return max((len(rows) for _, rows in self.groups), default=0)

    @classmethod
    def of_table(cls, name: str, table: Table, order: Sequence[str] = ()) -> Grid:
        """Lays out a table of the result; in the table `battery` the best score of each column is marked.

        Args:
            name: its key in `result.json`.
            table: the table.
            order: the adversaries; tables with one adversary a row follow it, and fold its end away.
        """
        columns = list(dict.fromkeys(key for row in table.rows for key in row))
        numbers = [c for c in columns if any(isinstance(row.get(c), Cell) for row in table.rows)]
        heading = _heading(table)
        texts = [c for c in columns if c not in numbers and c != heading]
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in table.rows:
            groups.setdefault(str(row.get(heading, "")), []).append(row)
        battery = name in ("battery", "stops")
        if battery:
            place = {method: i for i, method in enumerate(order)}
            for rows in groups.values():
                rows.sort(key=lambda row: place.get(str(row.get("method")), len(place)))
                if name == "battery":  # the best adversary on each model must not be folded away
                    rows.sort(key=_top, reverse=True)
        attacked = [column for column in numbers if column != BENIGN_AFTER]
        best = _best(list(groups.values()), attacked) if name == "battery" else set()
        shown = SHOWN_ROWS if battery and len(order) > LONG_BATTERY else cls.shown
        return cls(
            table.title, texts, numbers, list(groups.items()), best, table.percent, table.note, shown,
            table.standard_error,
        )  # fmt: skip

    @classmethod
    def of_settings(cls, settings: Mapping[str, Mapping[str, Any]]) -> Grid:
        """Lays out the settings of several adversaries, one adversary a row."""
        columns = list(dict.fromkeys(key for values in settings.values() for key in values))
        shown = SHOWN_ROWS if len(settings) > LONG_BATTERY else cls.shown
        rows = [
            {"adversary": name, **{k: wording.setting(v) for k, v in values.items()}}
            for name, values in settings.items()
        ]
        return cls("", ["adversary", *columns], [], [("", list(rows))], set(), False, shown=shown)


@dataclass(frozen=True)
class Gallery:
    """The layout of a figure of pictures on the page: one image a row, with its label as text.

    Attributes:
        note: what is shown.
        columns: label of each tile of a line.
        across: tiles in a line.
        width: width of a row in pixels.
        height: height of a row in pixels.
        strips: label, description for screen readers, and PNG in base64, of each row.
    """

    note: str
    columns: list[str]
    across: int
    width: int
    height: int
    strips: list[tuple[str, str, str]]

    @classmethod
    def of(cls, figure: Pictures) -> Gallery:
        """Cuts a figure into its rows."""
        cut = zip(figure.rows, strips(figure), strict=True)
        return cls(
            note=figure.note,
            columns=figure.columns,
            across=figure.across,
            width=figure.across * (figure.tile[0] + figure.gap) - figure.gap,
            height=figure.lines * (figure.tile[1] + figure.gap) - figure.gap,
            strips=[(label, f"Pictures of {figure.title}: {label}.", png) for label, png in cut],
        )


def _heading(table: Table) -> str:
    """The column whose values group the rows: settings, or models if one of them has several rows; else empty."""
    if any("setting" in row for row in table.rows):
        return "setting"
    models = [row["model"] for row in table.rows if "model" in row]
    return "model" if len(set(models)) < len(models) or "method" in table.rows[0] else ""


def _best(groups: Sequence[Sequence[Mapping[str, Any]]], columns: Sequence[str]) -> set[tuple[int, int, str]]:
    best = set()
    for g, rows in enumerate(groups):
        for column in columns:
            means = [cell.mean if isinstance(cell := row.get(column), Cell) else None for row in rows]
            top = max((m for m in means if m is not None), default=None)
            best |= {(g, i, column) for i, m in enumerate(means) if m is not None and m == top}
    return best


def _top(row: Mapping[str, Any]) -> float:
    cells = [cell for column, cell in row.items() if isinstance(cell, Cell) and column != BENIGN_AFTER]
    return max((cell.mean for cell in cells if cell.mean is not None), default=-math.inf)


def _recipe(result: RunResult) -> str:
    """The resolved recipe as YAML; JSON mode leaves plain types only."""
    settings = result.model_dump(mode="json", include={"recipe"})["recipe"]
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)


COLUMNS = {
    "ratio_restricted": "(i) restricted",
    "ratio_benign": "(ii) benign",
    "rir": "RIR",
    "rir_bound": "RIR*",
    "benign_percent": "benign, %",
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
    "restricted_error": "its error",
    "benign_error": "its error ",
    "restricted_kid": "restricted KID",
    "restricted_kid_error": "KID's error",
    "restricted_fid": "restricted FID",
    "benign_kid": "benign KID",
    "benign_kid_error": "KID's error ",
    "benign_fid": "benign FID",
}
"""Headings of columns, by their name in `result.json`."""


def flag_page(name: str) -> str:
    """Returns the link to a red flag's section in the documentation.

    Example:
        >>> flag_page("Poisoned BatchNorm statistics")
        'red-flags.html#poisoned-batchnorm-statistics'
    """
    return "red-flags.html#" + re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", name.lower()).strip())


@cache  # it caches compiled templates
def environment() -> Environment:
    """Returns the environment of the templates, with filters for numbers."""
    environment = Environment(
        loader=PackageLoader("holdfast.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": wording.percent,
        "points": wording.points,
        "span": wording.span,
        "share_span": wording.share_span,
        "amount": wording.amount,
        "times": wording.times,
        "setting": wording.setting,
        "flag_page": flag_page,
        "column": lambda name: COLUMNS.get(name, name.replace("_", " ")),
        "number": lambda value: "never" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
        "series": series_title,
    }
    environment.globals |= {"ROLES": ROLES, "STYLES": STYLES, "has": wording.has}
    return environment
