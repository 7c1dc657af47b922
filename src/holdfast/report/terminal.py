"""The verdict on a terminal: best of the battery at each budget, and the sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from holdfast.results import AuditResult, Cell, Interval, RunResult


def show(result: RunResult, folder: Path) -> None:
    """Prints the verdict of a run and where its report is.

    Args:
        result: any `RunResult`; without an audit only the place of the report is printed.
        folder: the run's folder.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if result.immunization is not None:
        for event in result.immunization.events:
            console.print(f"Note: round {event.iteration}: {event.message}.")
    if result.audit is not None:
        _show_audit(result.audit, console)
        if "stops" in result.tables:
            _show_stops(result.tables["stops"].rows, console)
    if result.feasibility is not None:
        console.print(f"{result.feasibility.label.upper()}. {result.feasibility.sentence}")
        for reason in result.feasibility.reasons:
            console.print(f"  - {reason}")
    if result.kind == "study":
        _show_study(result, console)
    console.print(f"Report: {folder / 'report.html'}")


def _show_study(result: RunResult, console: Console) -> None:
    """The tables that hold the ratios; the others are in the report."""
    for each in result.tables.values():
        columns = {"ratio_restricted": "(i)", "ratio_benign": "(ii)", "rir": "RIR", "rir_bound": "RIR*"}
        if not all(c in row for row in each.rows for c in columns):
            continue
        table = Table(title=each.title, title_justify="left")
        table.add_column("method", no_wrap=True)
        for heading in (*columns.values(), "paper"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in each.rows:
            cells = [row[c] for c in columns]
            paper = next(c.paper for c in cells[2:3] if isinstance(c, Cell))
            numbers = [_number(c) for c in cells if isinstance(c, Cell)]
            table.add_row(str(row["method"]), *numbers, "" if paper is None else f"{paper:g}")
        Console().print(table)
    for finding in result.findings:
        console.print(f"- {finding}")


def _show_stops(rows: Sequence[Mapping[str, str | Cell]], console: Console) -> None:
    """The adversaries by what the immunization does to them, each compared with itself on the controls."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(str(row["stopped"]), []).append(str(row["method"]))
    for word, names in found.items():
        console.print(f"{word.capitalize()}: {', '.join(names)}.")


def _number(cell: Cell) -> str:
    if cell.mean is None:
        return "not finite"
    return f"{cell.mean:.3g}"


def _show_audit(audited: AuditResult, console: Console) -> None:
    table = Table(
        title=f"Best of {audited.battery} on {audited.restricted_task}, {audited.unit} in %",
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    for row in audited.by_budget:
        table.add_column(f"{row.budget} steps", justify="right", no_wrap=True)
    for role in audited.by_budget[0].best:
        table.add_row(role, *(_percent(row.best[role]) for row in audited.by_budget))
    table.add_section()
    table.add_row("advantage", *(_points(row.advantage) for row in audited.by_budget))
    table.add_row("95 % band", *(_band(row.interval) for row in audited.by_budget))
    Console().print(table)
    before, after = (Cell.of([score]) for score in (audited.benign.original, audited.benign.immunized))
    console.print(f"Benign task {audited.benign_task}: {_percent(before)} % before, {_percent(after)} % after.")
    verdict = audited.verdict
    console.print(f"\nVerdict: {verdict.label.upper()}. {verdict.sentence}")
    if verdict.label == "invalid":
        for reason in verdict.reasons:
            console.print(f"  - {reason}")
    for name, reason in audited.not_applicable.items():
        console.print(f"Not tried: {name}: {reason}.")
    console.print(f"Threat model: {verdict.threat_model}\n")


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _band(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval.low:+.0f} to {100 * interval.high:+.0f}"


def _percent(cell: Cell) -> str:
    if cell.mean is None:
        return "not finite"
    return f"{100 * cell.mean:.1f}" + (f" ± {100 * cell.sd:.1f}" if cell.sd is not None else "")
