"""The trade-off of a protocol as a figure: each immunized model's advantage left, against what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from holdfast.report.plots import CONTROLS, NEUTRAL, PALETTE, SYMBOLS, Plot, figure_of, label_text, plot_of
from holdfast.results import RunResult
from holdfast.results.tables import Cell, Table


@dataclass(frozen=True)
class _Point:
    """One immunized model, or the original: what it cost, and the advantage that is left."""

    model: str
    seed: str
    drop: float
    minutes: float | None
    advantage: float
    error: float | None


def trade_off_plots(result: RunResult) -> list[tuple[str, Plot]]:
    """Returns a figure for each setting of a protocol with defenses, with its title.

    Left, the advantage is drawn over the benign score that was lost; right, over the minutes that the immunization
    took, where they were measured here. A good defense is low and on the left.

    Args:
        result: of any job; without the table `trade_off` there are no figures.
    """
    table = result.tables.get("trade_off")
    if table is None:
        return []
    settings = list(dict.fromkeys(str(row.get("setting", "")) for row in table.rows))
    found = []
    for i, setting in enumerate(settings):
        points = _points(table, setting, result.timing, alone=next(iter(result.recipe.get("settings", {})), ""))
        if any(point.seed for point in points):
            title = table.title + (f": {setting}" if setting else "")
            found.append((title, _plot(f"trade-off-{i}", title, points, percent=table.percent)))
    return found


def _points(table: Table, setting: str, timing: dict[str, float], alone: str) -> list[_Point]:
    """The points of one setting; the table of a single one has no column for its name, which is then `alone`."""
    scale = 100 if table.percent else 1
    points = []
    for row in table.rows:
        advantage = row["advantage"]
        if str(row.get("setting", "")) != setting or not isinstance(advantage, Cell) or advantage.mean is None:
            continue
        model, seed = str(row["model"]), str(row["seed"])
        lost = row.get("benign drop", row.get("benign rise"))
        drop = lost.mean if isinstance(lost, Cell) and lost.n else 0.0  # the original lost nothing
        if drop is None:
            continue
        seconds = timing.get(f"immunize {setting or alone}: {model}, seed {seed}")
        error = advantage.standard_error
        points.append(
            _Point(
                model,
                seed,
                scale * drop,
                None if seconds is None else seconds / 60,
                scale * advantage.mean,
                None if error is None else scale * error,
            )
        )
    return points


def _plot(name: str, title: str, points: list[_Point], *, percent: bool) -> Plot:
    timed = any(point.minutes is not None for point in points)
    models = list(dict.fromkeys(point.model for point in points))
    free = [i for i in range(len(PALETTE)) if i not in CONTROLS.values()]
    looks = {m: CONTROLS.get(m, free[k % len(free)]) for k, m in enumerate(m for m in models)}
    unit = ", points" if percent else ""
    figure = make_subplots(1, 2 if timed else 1, shared_yaxes=True, horizontal_spacing=0.04)
    for column in range(1, 3 if timed else 2):
        for model in models:
            own = [p for p in points if p.model == model and (column == 1 or p.minutes is not None)]
            if own:
                figure.add_trace(_trace(own, looks[model], minutes=column == 2), row=1, col=column)
        figure.add_hline(y=0, line={"color": NEUTRAL, "width": 1, "dash": "dot"}, row=1, col=column)
    plain = figure_of(height=420, legend=True, margin={"l": 64, "r": 12, "t": 12, "b": 48})
    plain.layout.pop("xaxis")
    figure.update_layout(plain.layout)
    figure.update_layout(legend={"y": 1.1})  # clear of the points, also in two rows
    axis = {"zeroline": False, "fixedrange": True}
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    figure.update_xaxes(title={"text": f"benign score lost{unit}"}, col=1)
    figure.update_yaxes(title={"text": f"advantage over scratch{unit}", "standoff": 12}, automargin=True, col=1)
    if timed:
        figure.update_xaxes(title={"text": "minutes of immunization"}, col=2)
    said = ", ".join(f"{p.model} {p.seed}: {p.advantage:.3g} at {p.drop:.3g}" for p in points)
    return plot_of(name, figure, f"Scatter plot: {title}. Advantage over scratch at what was lost: {said}.")


def _trace(points: list[_Point], look: int, *, minutes: bool) -> Any:
    model = label_text(points[0].model)
    return go.Scatter(
        x=[p.minutes if minutes else p.drop for p in points],
        y=[p.advantage for p in points],
        error_y={"array": [p.error or 0.0 for p in points], "thickness": 1, "width": 3},
        name=model,
        legendgroup=model,
        showlegend=not minutes,
        mode="markers",
        marker={"symbol": SYMBOLS[look % len(SYMBOLS)], "size": 11, "color": PALETTE[look]},
        customdata=[p.seed for p in points],
        hovertemplate=f"{model}, seed %{{customdata}}<br>%{{x:.3g}}: %{{y:.3g}}<extra></extra>",
    )
