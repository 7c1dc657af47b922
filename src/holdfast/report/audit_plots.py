"""Figures of an audit: scores, advantages with their bands, side effects and searches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from holdfast.report.plots import NEUTRAL, STYLES, Plot, figure_of, label_text, plot_of
from holdfast.report.wording import below, points, span
from holdfast.results import ROLES, AuditResult, BudgetRow, Curve, Interval, Role, SideEffect
from holdfast.results.tables import Cell

BANDS: dict[Role, str] = {"immunized": "rgba(26,133,201,0.22)", "original": "rgba(213,94,0,0.16)"}
"""The colours of `STYLES`, for areas."""


def best_plot(audit: AuditResult) -> Plot:
    """Returns the best of the battery against fine-tuning steps, for the model and both controls.

    Bars show the standard deviation over seeds.
    """
    figure = figure_of(height=440, legend=True)
    _best_traces(figure, audit.by_budget)
    figure.add_trace(_chance(audit))
    _score_axes(figure, audit)
    ends = _ends(audit.by_budget)
    label = (
        f"Line chart: {audit.unit} of the best adversary on {audit.restricted_task} against fine-tuning steps. "
        f"After {audit.budgets[-1]} steps: {ends}. {audit.spoken.chance.capitalize()}: {_percent(audit.chance)}."
    )
    return plot_of("best", figure, label)


def advantage_plot(audit: AuditResult) -> Plot:
    """Returns the advantage over scratch against steps, of the model and its original, with confidence bands."""
    figure = figure_of(height=340, legend=True)
    rows = audit.by_budget
    advantages: dict[Role, list[float | None]] = {
        "original": [r.original_advantage for r in rows],
        "immunized": [r.advantage for r in rows],
    }
    bands: dict[Role, list[Interval | None]] = {
        "original": [r.original_interval for r in rows],
        "immunized": [r.interval for r in rows],
    }
    for role in advantages:
        _band(figure, role, audit.budgets, bands[role])
    for role, values in advantages.items():
        style = STYLES[role]
        figure.add_trace(
            go.Scatter(
                x=list(audit.budgets),
                y=[None if v is None else 100 * v for v in values],
                mode="lines+markers",
                name=role,
                line={"color": style.colour, "width": 2.4, "dash": style.dash},
                marker={"symbol": style.symbol, "size": 8},
                customdata=[
                    f"<b>{role}</b> after {k} steps: {points(v) or 'not finite'} points"
                    + ("" if b is None else f"<br>95% band: {span(b)}")
                    for k, v, b in zip(audit.budgets, values, bands[role], strict=True)
                ],
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    limit = 100 * audit.verdict.thresholds.max_advantage
    figure.add_hline(y=0, line={"color": NEUTRAL, "width": 1.4})
    figure.add_hline(y=limit, line={"color": NEUTRAL, "width": 1.2, "dash": "dot"})
    # The band of two or three seeds may extend far beyond 100 points.
    edges = [edge for band in bands.values() for b in band if b is not None for edge in (b.low, b.high)]
    known = [0, limit, *(100 * v for v in [*edges, *advantages["original"], *advantages["immunized"]] if v is not None)]
    scale = [max(min(known), -100) - 4, min(max(known), 100) + 4]
    _step_axis(figure, audit.budgets)
    figure.update_xaxes(title={"text": "fine-tuning steps"})
    figure.update_yaxes(
        title={"text": f"points over {audit.spoken.control}"}, range=scale, zeroline=False, fixedrange=True, nticks=7
    )
    ends = ", ".join(f"{role} {points(values[-1]) or 'not finite'}" for role, values in advantages.items())
    label = (
        f"Line chart: advantage over {audit.spoken.training_control}, in points, against fine-tuning steps. "
        f"After {rows[-1].budget} steps: {ends}."
    )
    return plot_of("advantage", figure, label)


def _band(figure: Any, role: Role, budgets: Sequence[int], band: Sequence[Interval | None]) -> None:
    inside = [(k, b) for k, b in zip(budgets, band, strict=True) if b is not None]
    if inside:
        figure.add_trace(
            go.Scatter(
                x=[k for k, _ in inside] + [k for k, _ in inside[::-1]],
                y=[100 * b.high for _, b in inside] + [100 * b.low for _, b in inside[::-1]],
                fill="toself",
                fillcolor=BANDS[role],
                mode="lines",
                line={"width": 0},
                name=f"{role}: 95% band",
                showlegend=False,
                hoverinfo="skip",
            )
        )


def adversary_plots(audit: AuditResult, names: Sequence[str]) -> list[tuple[str, Plot]]:
    """Returns a small figure for each adversary, with its name: mean curves on the model and on both controls.

    All have the same axes, so that they can be compared at a glance.

    Args:
        audit: the audit.
        names: the adversaries, in the order of the figures.
    """
    plots = []
    for i, name in enumerate(names):
        figure = figure_of(height=230, legend=False)
        ends = []
        for role in ROLES:
            curves = [c for c in audit.curves if c.adversary == name and c.role == role]
            cells = [Cell.of(c.scores[k] for c in curves) for k in range(len(audit.budgets))]
            losses = [f"mean training loss: {_loss(curves, k)}" for k in range(len(audit.budgets))]
            figure.add_trace(_role_trace(role, audit.budgets, cells, losses))
            ends.append(f"{role} {_percent(cells[-1].mean)}")
        figure.add_trace(_chance(audit))
        _score_axes(figure, audit, titles=False)
        figure.update_layout(margin={"l": 42, "r": 8, "t": 8, "b": 28})
        label = f"Line chart for adversary {name}. After {audit.budgets[-1]} steps: {', '.join(ends)}."
        plots.append((name, plot_of(f"adversary-{i}", figure, label)))
    return plots


def side_effect_plots(audit: AuditResult) -> list[tuple[SideEffect, Plot]]:
    """Returns a small figure for each harmless task: how well the models still learn it."""
    plots = []
    for effect in audit.side_effects:
        figure = figure_of(height=250, legend=False)
        _best_traces(figure, effect.by_budget)
        _score_axes(figure, audit, titles=False)
        figure.update_layout(margin={"l": 42, "r": 8, "t": 8, "b": 28})
        label = (
            f"Line chart: learning the harmless task {effect.task}. After {effect.by_budget[-1].budget} steps: "
            f"{_ends(effect.by_budget)}."
        )
        plots.append((effect, plot_of(f"side-{effect.task_role}", figure, label)))
    return plots


def search_plot(audit: AuditResult) -> Plot | None:
    """Returns the best score so far against the number of trials, for each model; None without a search."""
    if not audit.search:
        return None
    figure = figure_of(height=340, legend=True)
    ends = []
    for role in ROLES:
        trials = [t for t in audit.search if t.role == role]
        best: float | None = None
        so_far: list[float | None] = []
        for trial in trials:
            if trial.score is not None:
                best = trial.score if best is None else max(best, trial.score)
            so_far.append(best)
        style = STYLES[role]
        figure.add_trace(
            go.Scatter(
                x=[t.number + 1 for t in trials],
                y=so_far,
                mode="lines+markers",
                name=role,
                line={"color": style.colour, "width": 2.2, "dash": style.dash, "shape": "hv"},
                marker={"symbol": style.symbol, "size": [11 if t.confirmed else 3 for t in trials]},
                customdata=[
                    f"<b>{role}</b>, trial {t.number + 1}: {_percent(t.score)}"
                    f"{', repeated with every seed' if t.confirmed else ''}<br>{label_text(t.adversary)}"
                    for t in trials
                ],
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
        ends.append(f"{role} {_percent(best)}")
    figure.update_xaxes(title={"text": "trials"}, nticks=8, rangemode="tozero")
    figure.update_yaxes(title={"text": "best so far"}, tickformat=".0%", zeroline=False, fixedrange=True, nticks=7)
    if below(audit):
        figure.update_yaxes(range=[0, 1.03])
    return plot_of("search", figure, f"Line chart: best score so far against trials. In the end: {', '.join(ends)}.")


def _best_traces(figure: Any, rows: Sequence[BudgetRow]) -> None:
    for role in ROLES:
        names = [f"best: {label_text(row.best_adversary[role])}" for row in rows]
        figure.add_trace(_role_trace(role, [r.budget for r in rows], [row.best[role] for row in rows], names))


def _ends(rows: Sequence[BudgetRow]) -> str:
    return ", ".join(f"{role} {_percent(rows[-1].best[role].mean)}" for role in ROLES)


def _step_axis(figure: Any, budgets: Sequence[int]) -> None:
    edge = 0.03 * (budgets[-1] - budgets[0])
    figure.update_xaxes(range=[budgets[0] - edge, budgets[-1] + edge], nticks=8)


def _role_trace(role: Role, budgets: Sequence[int], cells: Sequence[Cell], notes: Sequence[str]) -> Any:
    style = STYLES[role]
    hover = [
        f"<b>{role}</b> after {k} steps: {_percent(c.mean)}{_spread(c)}<br>{note}"
        for k, c, note in zip(budgets, cells, notes, strict=True)
    ]
    return go.Scatter(
        x=list(budgets),
        y=[c.mean for c in cells],
        error_y={"type": "data", "array": [c.sd for c in cells], "thickness": 1.2, "width": 4},
        mode="lines+markers",
        name=role,
        meta={"role": role},
        line={"color": style.colour, "width": 2.4, "dash": style.dash},
        marker={"symbol": style.symbol, "size": 8},
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )


def _chance(audit: AuditResult) -> Any:
    name = audit.spoken.chance
    return go.Scatter(
        x=[audit.budgets[0], audit.budgets[-1]],
        y=[audit.chance, audit.chance],
        mode="lines",
        name=f"{name} ({_percent(audit.chance)})",
        line={"color": NEUTRAL, "width": 1.4, "dash": "longdashdot"},
        hovertemplate=f"{name}: {_percent(audit.chance)}<extra></extra>",
    )


def _score_axes(figure: Any, audit: AuditResult, *, titles: bool = True) -> None:
    _step_axis(figure, audit.budgets)
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%", dtick=0.2, zeroline=False, fixedrange=True)
    if titles:
        figure.update_xaxes(title={"text": "fine-tuning steps"})
        figure.update_yaxes(title={"text": f"{audit.unit} on the restricted task"})


def _percent(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1%}"


def _spread(cell: Cell) -> str:
    return "" if cell.sd is None else f" ± {100 * cell.sd:.1f} ({cell.n} seeds)"


def _loss(curves: Sequence[Curve], index: int) -> str:
    if index == 0:
        return "none before the first step"
    mean = Cell.of(c.losses[index] for c in curves).mean
    return "not finite" if mean is None else f"{mean:.3g}"
