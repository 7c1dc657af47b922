"""Results on a terminal: best of the battery at each budget, verdict and findings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from holdfast.report import wording
from holdfast.report.sequential import looks
from holdfast.report.what_would_change import what_would_change
from holdfast.results import AuditResult, Curve, Interval, RunResult
from holdfast.results.tables import Cell
from holdfast.results.tables import Table as Tabular
from holdfast.runtime.distributed import speaks

LEAST = 14
"""Least width of a column of names; longer names continue in the next line."""

RATIOS = {
    "ratio_restricted": "(i)", "ratio_benign": "(ii)", "rir": "RIR", "rir_bound": "RIR*", "benign_percent": "benign, %",
}  # fmt: skip
"""Headings of columns, by their name in `result.json`."""


def show(result: RunResult, folder: Path) -> None:
    """Prints a result and the path of its report; of several processes, only the main one prints.

    Args:
        result: the result of any job.
        folder: the run's folder.
    """
    if not speaks():
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    _show_making(result, console)
    if result.audit is not None:
        _show_audit(result.audit, console)
        for word, names in wording.stopped(result.tables).items():
            console.print(f"{word.capitalize()}: {_some(names)}.")
    if result.feasibility is not None:
        console.print(f"{result.feasibility.label.upper()}. {result.feasibility.sentence}")
        for reason in result.feasibility.reasons:
            console.print(f"  - {reason}")
    if result.job == "study":
        _show_study(result, console)
    if result.job == "protocol":
        _show_protocol(result, console)
    if result.job == "attack":
        for finding in result.findings:
            console.print(f"- {finding}")
    replay = wording.replay_command(result, folder)
    if replay is not None:
        console.print(f"The best adversary again: {replay}")
    console.print(f"Report: {folder / 'report.html'}")


def _show_making(result: RunResult, console: Console) -> None:
    """Prints notes on the models, and the events of the defense."""
    for role, model in result.provenance.models.items():
        for note in model.notes:
            console.print(f"Note on the {role} model: {note}")
    made = result.immunization
    if made is None:
        return
    for event in made.events:
        console.print(f"Note: round {event.iteration}: {event.message}.")
    if made.nothing is not None:
        console.print(made.nothing)
    elif not made.completed:
        console.print("The defense gave up early: the immunized model is its last good state.")


def show_replay(recorded: Curve, repeated: Curve) -> None:
    """Prints a trial's recorded and repeated scores, and whether they are the same."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{recorded.adversary} on {recorded.role}, seed {recorded.seed}")
    table = Table(pad_edge=False)
    table.add_column("steps", justify="right")
    for heading in ("recorded", "repeated"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for budget, then, now in zip(recorded.budgets, recorded.scores, repeated.scores, strict=True):
        table.add_row(str(budget), _digits(then), _digits(now), "" if then == now else "differs")
    Console().print(table)
    if recorded.scores != repeated.scores:
        console.print("NOT the same: another machine, number of threads or version adds up in another order.")
        return
    losses = [(a, b) for a, b in zip(recorded.losses, repeated.losses, strict=True) if a is not None and b is not None]
    console.print(
        "The same scores, to the last digit"
        + (", and the same training losses." if recorded.losses == repeated.losses else
           f"; training losses differ by up to {max(abs(a - b) for a, b in losses):.1e}.")
    )  # fmt: skip


def _digits(score: float | None) -> str:
    return "not finite" if score is None else f"{score:.6f}"


def _show_study(result: RunResult, console: Console) -> None:
    """Prints the tables of ratios; the others are in the report."""
    for each in result.tables.values():
        columns = {key: RATIOS[key] for key in ("ratio_restricted", "ratio_benign", "rir", "rir_bound")}
        if not all(c in row for row in each.rows for c in columns):
            continue
        table = Table(title=each.title, title_justify="left")
        table.add_column("method", no_wrap=True)
        for heading in (*columns.values(), "paper"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in each.rows:
            cells = [row[c] for c in columns]
            paper = next(c.paper for c in cells[2:3] if isinstance(c, Cell))
            numbers = ["not finite" if c.mean is None else f"{c.mean:.3g}" for c in cells if isinstance(c, Cell)]
            table.add_row(str(row["method"]), *numbers, "" if paper is None else f"{paper:g}")
        Console().print(table)
    for finding in result.findings:
        console.print(f"- {finding}")


def _show_protocol(result: RunResult, console: Console) -> None:
    """Prints condition numbers and scores, one table for each setting; the others are in the report."""
    scores = "accuracy" if "accuracy" in result.tables else "error"
    probes = {row["probe"] for row in result.tables["probes"].rows} if "probes" in result.tables else set()
    if all(row.get("attack") in probes for row in result.tables[scores].rows):
        scores = "probes"  # a line for each, with all models in it
    for name in ("conditioning", scores):
        if name in result.tables:
            _show_by_setting(result.tables[name])
    for finding in result.findings:
        console.print(f"- {finding}")


def _show_by_setting(each: Tabular) -> None:
    show = _percent if each.percent else _value
    for setting in dict.fromkeys(str(row.get("setting", "")) for row in each.rows):
        rows = [row for row in each.rows if row.get("setting", "") == setting]
        title = setting if setting and not RATIOS.keys() & rows[0].keys() else f"{setting}: {each.title}".lstrip(": ")
        title = f"{title}, in %" if each.percent else title
        table, screen = _scores(title, rows, show), Console()
        if _least(table) > screen.width:
            title += " (spreads are in the report)"
            table = _scores(title, rows, lambda cell: show(cell).partition(" ± ")[0])
        # Rich cuts off digits that do not fit, and a cut number is wrong.
        Console(width=max(screen.width, _least(table))).print(table)


def _scores(title: str, rows: Sequence[Mapping[str, str | Cell]], show: Callable[[Cell], str]) -> Table:
    columns = list(dict.fromkeys(c for row in rows for c in row))
    numbers = [c for c in columns if any(isinstance(row.get(c), Cell) for row in rows)]
    texts = [c for c in columns if c not in (*numbers, "setting", "remark")]
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in texts:
        table.add_column(column, min_width=LEAST)
    for column in numbers:
        table.add_column(
            RATIOS.get(column, column), justify="right", no_wrap=True, min_width=_widest(rows, column, show)
        )
    for row in rows:
        cells = [show(cell) if isinstance(cell := row.get(c), Cell) else "" for c in numbers]
        table.add_row(*(str(row.get(c, "")) for c in texts), *cells)
    return table


def _widest(rows: Sequence[Mapping[str, str | Cell]], column: str, show: Callable[[Cell], str]) -> int:
    return max(len(column), *(len(show(cell)) for row in rows if isinstance(cell := row.get(column), Cell)))


def _least(table: Table) -> int:
    """The width at which no column is cut."""
    return sum((column.min_width or 0) + 3 for column in table.columns)


def _some(names: Sequence[str]) -> str:
    """The first names of a long list, and how many there are more."""
    shown = 8 if len(names) > 10 else len(names)
    return "; ".join(names[:shown]) + (f" and {len(names) - shown} more" if shown < len(names) else "")


def _show_audit(audited: AuditResult, console: Console) -> None:
    doubts = wording.doubts(audited)
    for line in [*doubts, wording.CAUSES] if doubts else []:
        console.print(line)
    console.print(f"Best of {audited.battery} on {audited.restricted_task}, {audited.unit} in %")
    table = Table(pad_edge=False)
    table.add_column("model", no_wrap=True)
    for row in audited.by_budget:
        table.add_column(f"{row.budget} steps", justify="right", no_wrap=True)
    for role in audited.by_budget[0].best:
        table.add_row(role, *(_percent(row.best[role]) for row in audited.by_budget))
    table.add_section()
    table.add_row("advantage", *(_points(row.advantage) for row in audited.by_budget))
    table.add_row("95 % band", *(_band(row.interval) for row in audited.by_budget))
    Console().print(table)
    if note := audited.spoken.note:
        console.print(note)
    before, after = (_percent(Cell.of([score])) for score in (audited.benign.original, audited.benign.immunized))
    kept = f"{before} % before, {after} % after. {wording.kept(audited)}".rstrip()
    console.print(f"Benign task {audited.benign_task}: {kept}")
    if audited.keeping is not None:
        console.print(wording.benign_keepers(audited))
    _show_bounds(audited, console)
    _show_costs(audited, console)
    for effect in audited.side_effects:
        which = "Benign task learned anew" if effect.task_role == "benign" else "Transfer task"
        lost = "not finite" if effect.lost is None else f"{_points(effect.lost)} points{_within(effect.interval)}"
        console.print(f"{which} ({effect.task}): lost against the original: {lost}.")
        for name, reason in {**effect.not_applicable, **effect.failures}.items():
            console.print(f"  - without a score: {name}: {reason}.")
    _show_measured(audited, console)
    for flag in audited.flags:
        console.print(f"Red flag ({flag.severity}): {flag.name}. {flag.found} {flag.remedy}")
    _show_verdict(audited, console)
    for name, reason in audited.not_applicable.items():
        console.print(f"Not tried: {name}: {reason}.")
    console.print(f"Threat model: {audited.verdict.threat_model}\n")


def _show_verdict(audited: AuditResult, console: Console) -> None:
    verdict = audited.verdict
    console.print(f"\nVerdict: {verdict.label.upper()}. {verdict.sentence}")
    if verdict.label == "invalid":
        for reason in wording.reasons(audited):
            console.print(f"  - {reason}")
    elif verdict.retained is not None:
        of = "" if verdict.retained_interval is None else f" (95 %: {wording.share_span(verdict.retained_interval)})"
        console.print(f"Retained of the original's advantage: {verdict.retained:.0%}{of}.")
    if (staged := looks(audited)) is not None:
        console.print(staged)
    for line in what_would_change(audited):
        console.print(f"What would change it: {line}")


def _show_measured(audited: AuditResult, console: Console) -> None:
    for each in audited.measured:
        after = f" after {each.adversary}" if each.adversary else ""
        score = "not finite" if each.score is None else f"{each.score:.4g}"
        console.print(f"Measure {each.measure}, {each.metric}: {each.role}{after} {score}.")


def _show_bounds(audited: AuditResult, console: Console) -> None:
    """Prints the best attack by the share of the benign score that it may lose."""
    rows = wording.bounded(audited)
    if not rows:
        return
    table = Table(title="Best attacks by benign score lost, in %", title_justify="left", pad_edge=False)
    table.add_column("may lose", no_wrap=True)
    for heading in ("adversaries", "benign after", "restricted", "advantage"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("best", overflow="fold")
    for each in rows:
        after = "" if each.benign_after is None else _percent(each.benign_after).partition(" ± ")[0]
        reached = ["", "", "", "none"]
        if each.row is not None:
            restricted = _percent(each.row.best["immunized"]).partition(" ± ")[0]
            reached = [after, restricted, _points(each.row.advantage), each.row.best_adversary["immunized"]]
        table.add_row(each.may_lose, each.within, *reached)
    screen = Console()
    # Rich cuts off digits that do not fit, and a cut number is wrong.
    Console(width=max(screen.width, 80)).print(table)
    console.print(wording.how_to_read_bounds(audited))


def _show_costs(audited: AuditResult, console: Console) -> None:
    if audited.cost_target is None or not audited.costs:
        return
    parts = []
    for cost in audited.costs:
        ratio = wording.cost_ratio(audited, role=cost.role)
        times = "" if ratio is None or cost.role == "scratch" else f" ({ratio:.2g} times {audited.spoken.control})"
        parts.append(f"{cost.role} {wording.amount(cost.steps)}{times}")
    console.print(f"Steps to {100 * audited.cost_target:.1f} %: {', '.join(parts)}.")


def _within(interval: Interval | None) -> str:
    return "" if interval is None else f" ({_band(interval)})"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _band(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval.low:+.0f} to {100 * interval.high:+.0f}"


def _value(cell: Cell, factor: float = 1, digits: str = ".4g", sd_digits: str = ".2g") -> str:
    if cell.mean is None:
        return "not finite" if cell.n else "-"
    return f"{factor * cell.mean:{digits}}" + (f" ± {factor * cell.sd:{sd_digits}}" if cell.sd is not None else "")


def _percent(cell: Cell) -> str:
    return _value(cell, 100, ".1f", ".1f")
