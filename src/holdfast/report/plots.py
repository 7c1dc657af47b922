"""Plotly figures of the report, readable on a light and on a dark page."""

from __future__ import annotations

import html
import itertools
import math
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from holdfast.losses import OF_DENOISING
from holdfast.results import Event, ImmunizationResult, Role
from holdfast.results.tables import Lines, Map, last_known


@dataclass(frozen=True)
class RoleStyle:
    """The look of a role; each of colour, dash and marker suffices to tell it from the others.

    Attributes:
        colour: safe for the colour-blind (after Okabe and Ito); at least 3:1 against both pages.
        dash: plotly's name of the line's pattern.
        strokes: the same pattern for SVG, for the keys that the page draws itself.
        symbol: plotly's name of the marker.
    """

    colour: str
    dash: str
    strokes: str
    symbol: str


STYLES: dict[Role, RoleStyle] = {
    "immunized": RoleStyle("#1a85c9", "solid", "none", "circle"),
    "original": RoleStyle("#d55e00", "dash", "5 3", "square"),
    "scratch": RoleStyle("#009e73", "dot", "2 2", "triangle-up"),
}
"""The look of each role, in every figure and table of the report."""

NEUTRAL = "#808590"
"""Readable on both pages: for lines without a role, and for text until the page's script sets the theme."""


@dataclass(frozen=True)
class Plot:
    """A figure, ready for the page.

    Attributes:
        id: id of its element on the page.
        label: description for screen readers.
        json: data and layout, safe inside a script element.
        height: in CSS pixels, so that the page does not jump when the figure is drawn.
    """

    id: str
    label: str
    json: str
    height: int


def history_plot(immunization: ImmunizationResult) -> Plot | None:
    """Returns the defense's record over rounds, one panel a series, with its events marked.

    Returns:
        The figure; None if the defense recorded no finite number.
    """
    history = {
        k: v for k, v in immunization.history.items() if k != "gradient_passes" and any(x is not None for x in v)
    }
    errors = measures_errors(immunization)
    rounds = history.pop("iteration", None) or list(range(1, max(map(len, history.values()), default=0) + 1))
    if not history:
        return None
    panels, strip = len(history), 40 if immunization.events else 0
    figure = figure_of(height=170 * panels + strip + 60, legend=False)
    top = 1 - strip / (170 * panels + strip)
    for i, (name, values) in enumerate(history.items()):
        axis, low = str(i + 1) if i else "", top * (1 - (i + 1) / panels)
        share = name == "validation_score" or (name.endswith("_score") and not errors)
        figure.add_trace(_series(f"y{axis}", share, rounds, values))
        domain = (low, low + 0.84 * top / panels)
        figure.update_layout({f"yaxis{axis}": _series_axis(share, values) | {"domain": domain}})
        figure.add_annotation(
            text=label_text(series_title(name, errors=errors)), x=0, xref="paper", y=domain[1], yref="paper",
            xanchor="left", yanchor="bottom", showarrow=False, font={"size": 12},
        )  # fmt: skip
    if immunization.events:
        _mark_events(figure, str(panels + 1), immunization.events, (min(top + 0.02, 0.99), 1))
    bottom = str(panels) if panels > 1 else ""
    figure.update_xaxes(title={"text": "round"}, anchor=f"y{bottom}")
    titles = ", ".join(series_title(name, errors=errors) for name in history)
    label = f"Line charts over the rounds of {immunization.defense}: {titles}. Events: {len(immunization.events)}."
    return plot_of("history", figure, label)


PALETTE = ("#1a85c9", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#7a6fd0", "#808590", "#c0392b", "#2aa198", "#6c8e3a")
"""After Okabe and Ito, for series without a role; combined with dashes, so that no two look alike."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
FEW = 8
"""Up to this many values on a logarithmic axis, each has a tick."""
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross", "x", "star", "triangle-down", "pentagon", "hexagram")


def figure_plot(name: str, figure: Lines | Map) -> Plot:
    """Returns a figure of a study, protocol or feasibility analysis.

    Args:
        name: its key in `result.json`.
        figure: curves, or matrices side by side.
    """
    return _lines(name, figure) if isinstance(figure, Lines) else _map(name, figure)


def _lines(name: str, lines: Lines) -> Plot:
    look = {"exponentformat": "power", "minorloglabels": "none", "zeroline": False, "fixedrange": True}
    xaxis = {"title": {"text": lines.x_title}, "type": "log" if lines.log_x else "linear", **look}
    if lines.log_x and 1 < len(lines.x) <= FEW and lines.x[0] > 0:  # plotly leaves out a tick at the end of an axis
        ends = math.log10(lines.x[0]), math.log10(lines.x[-1])
        room = 0.02 * (ends[1] - ends[0])
        xaxis |= {"range": [ends[0] - room, ends[1] + room], "tickvals": lines.x}
        xaxis["ticktext"] = [f"{x:,g}" for x in lines.x]
    yaxis = {
        "title": {"text": lines.y_title, "standoff": 12},
        "type": "log" if lines.log_y else "linear",
        "automargin": True,
        **look,
    }
    margin = {"l": 64, "r": 12, "t": 12, "b": 48}
    figure = figure_of(height=460, legend=True, margin=margin, xaxis=xaxis, yaxis=yaxis)
    figure.add_traces(
        [
            go.Scatter(
                x=lines.x,
                y=values,
                name=label_text(series),
                mode="markers" if sum(v is not None for v in values) == 1 else "lines",
                line={"color": PALETTE[i % len(PALETTE)], "width": 2, "dash": DASHES[i % len(DASHES)]},
                marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 11, "color": PALETTE[i % len(PALETTE)]},
                hovertemplate=f"{label_text(series)}<br>%{{x:.4g}}: %{{y:.4g}}<extra></extra>",
            )
            for i, (series, values) in zip(_looks(lines.series), lines.series.items(), strict=True)
        ]
    )
    last = {series: last_known(values) for series, values in lines.series.items()}
    texts = [f"{series}: {'no value' if end is None else f'{end:.3g}'}" for series, end in last.items()]
    return plot_of(name, figure, f"Line chart: {lines.title}. At the right end: {', '.join(texts)}.")


CONTROLS = {"original": 1, "scratch": 2}
"""Their places in `PALETTE`, which begins with the colours of `STYLES`."""


def _looks(names: Collection[str]) -> list[int]:
    """Places in the palette: controls look the same in every figure; other series take the free places."""
    reserved = set(CONTROLS.values()) if CONTROLS.keys() & set(names) else set()
    free = (i for i in itertools.count() if i not in reserved)
    return [CONTROLS[name] if name in CONTROLS else next(free) for name in names]


def _map(name: str, maps: Map) -> Plot:
    across = min(3, len(maps.panels))
    down = -(-len(maps.panels) // across)
    figure = make_subplots(down, across, subplot_titles=[label_text(p) for p in maps.panels], horizontal_spacing=0.07)
    values = [v for panel in maps.panels.values() for row in panel for v in row if v is not None]
    signed = any(v < 0 for v in values) or maps.value_title.startswith("log")
    reach = max((abs(v) for v in values), default=1.0) or 1.0
    for i, (panel, grid) in enumerate(maps.panels.items()):
        figure.add_trace(
            go.Heatmap(
                z=grid,
                x=maps.columns,
                y=maps.rows,
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                hovertemplate=f"{label_text(panel)} {maps.column_title} %{{x}}, {maps.row_title} %{{y}}: "
                f"{maps.value_title} %{{z:.3g}}<extra></extra>",
            ),
            row=i // across + 1,
            col=i % across + 1,
        )
    plain = figure_of(height=340 * down + 30, legend=False)
    plain.layout.pop("xaxis")
    figure.update_layout(plain.layout)
    figure.update_layout(
        margin={"l": 56, "r": 12, "t": 36, "b": 44},
        coloraxis={
            # Blue: immunized; red: not; as in the paper's Figure 2. A single hue if no value is negative.
            "colorscale": "RdBu" if signed else "Blues",
            "cmin": -reach if signed else 0,
            "cmax": reach,
            "colorbar": {"title": {"text": maps.value_title}, "thickness": 12},
        },
    )
    figure.update_xaxes(fixedrange=True, type="category", title={"text": maps.column_title}, showgrid=False)
    figure.update_yaxes(fixedrange=True, type="category", showgrid=False, autorange="reversed")
    figure.update_yaxes(title={"text": maps.row_title}, col=1)
    shares = [
        f"{p or 'all'}: {sum(v > 0 for r in g for v in r if v is not None)} above 0" for p, g in maps.panels.items()
    ]
    return plot_of(name, figure, f"Heat map: {maps.title}. {', '.join(shares)}.")


def measures_errors(immunization: ImmunizationResult) -> bool:
    """Whether a defense recorded errors, as for denoisers: smaller is better, and they may exceed 1."""
    return immunization.config.get("loss") in OF_DENOISING


def series_title(name: str, *, errors: bool = False) -> str:
    """Returns the title of a series of a defense's history.

    Args:
        name: its key in the history.
        errors: see `measures_errors`.

    Example:
        >>> series_title("suppression_loss"), series_title("benign_score", errors=True)
        ('Suppression loss', 'Held-out benign error')
    """
    known = {
        "benign_score": "Held-out benign error" if errors else "Held-out benign score",
        "simulated_score": "Simulated adversaries' error" if errors else "Simulated adversaries' accuracy",
        "validation_score": "Best of the defender's own attacks",
    }
    return known.get(name, name.replace("_", " ").capitalize())


def _series(axis: str, share: bool, rounds: Sequence[float | None], values: Sequence[float | None]) -> Any:
    # Some series are measured only in some rounds: markers show which.
    sparse = any(v is None for v in values)
    return go.Scatter(
        x=rounds,
        y=values,
        yaxis=axis,
        mode="lines+markers" if sparse else "lines",
        connectgaps=sparse,
        line={"color": STYLES["immunized"].colour, "width": 1.6},
        marker={"size": 5},
        hovertemplate=f"round %{{x}}: %{{y:{'.1%' if share else '.4g'}}}<extra></extra>",
    )


def _series_axis(share: bool, values: Sequence[float | None]) -> dict[str, Any]:
    axis = {"fixedrange": True, "zeroline": False, "nticks": 5}
    if not share:
        return axis | {"tickformat": "~g"}
    # A score that moves by a tenth of a percent must not look like a collapse.
    low = min(v for v in values if v is not None)
    return axis | {"tickformat": ".0%", "range": [max(0.0, min(low - 0.05, 0.8)), 1.01]}


def _mark_events(figure: Any, axis: str, events: Sequence[Event], domain: tuple[float, float]) -> None:
    for event in events:
        figure.add_shape(
            type="line", x0=event.iteration, x1=event.iteration, y0=0, y1=1, xref="x", yref="paper",
            line={"color": NEUTRAL, "width": 1, "dash": "dot"},
        )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=[e.iteration for e in events],
            y=[0] * len(events),
            yaxis=f"y{axis}",
            mode="markers",
            marker={"symbol": "triangle-down", "size": 11, "color": STYLES["original"].colour},
            customdata=["<br>".join(map(label_text, textwrap.wrap(e.message, 48))) for e in events],
            name="events",
            hovertemplate="round %{x}<br>%{customdata}<extra></extra>",
        )
    )
    look = {"tickvals": [0], "ticktext": ["events"], "showgrid": False, "zeroline": False, "fixedrange": True}
    figure.update_layout({f"yaxis{axis}": {"domain": domain, "range": [-1, 1], **look}})


def figure_of(*, height: int, legend: bool, **layout: Any) -> Any:
    """Returns an empty figure in the report's look.

    Args:
        height: in pixels.
        legend: whether there is one.
        layout: further settings of plotly, which replace the defaults.
    """
    # Made in one call: plotly takes three times as long to change a figure as to make it.
    settings: dict[str, Any] = {
        # plotly's default template has a white page and its own palette.
        "template": "none",
        "height": height,
        "autosize": True,
        "showlegend": legend,
        # Dragging must scroll the page on a phone, not zoom the figure.
        "dragmode": False,
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": NEUTRAL},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        "hoverlabel": {"align": "left"},
        "xaxis": {"zeroline": False, "fixedrange": True},
    }
    return go.Figure(layout=settings | layout)


def plot_of(name: str, figure: Any, label: str) -> Plot:
    """Returns a figure in the form that the page needs."""
    return Plot(f"plot-{name}", label, str(figure.to_json()), int(figure.layout.height))


def label_text(raw: str) -> str:
    """Escapes a label, because plotly interprets some HTML."""
    return html.escape(raw, quote=False)
