"""Figure 3 of the ICML 2025 paper: how fast each kind of linear probe learns on each model of a protocol.

A condition number describes gradient descent on raw features. So these figures come first, and the findings say which
probes are slowed and which are not. A probe that whitens or standardises the features, uses Adam, or solves the least
squares in closed form does not depend on that condition number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from holdfast.adversaries import Probe
from holdfast.defenses import IMMA, ConditionNumber, OptKappa, RIllOnly
from holdfast.experiments.measurements.attack_curves import Attack
from holdfast.experiments.measurements.base import MEASUREMENTS, Measured, Measurement
from holdfast.experiments.setting import ORIGINAL
from holdfast.experiments.setting_scores import Row, SettingScores
from holdfast.results.tables import Cell, Figure, Lines, Outcome, Table

MARGIN: Final = 0.03
"""A score counts as lower if the difference exceeds this; smaller ones may be noise of test samples and seeds."""

DESCENTS: Final = ("gd", "line-search")
"""Solvers whose speed depends on the condition number, the simplest first."""

ALGORITHM_1: Final = (ConditionNumber.name, f"deep-{ConditionNumber.name}")
"""Names of the paper's method, for linear and for deep extractors."""

PAPERS: Final = frozenset(
    f"{deep}{defense.name}" for defense in (ConditionNumber, RIllOnly, IMMA, OptKappa) for deep in ("", "deep-")
)
"""Names of the defenses that the paper compares."""

Effect = Literal["held back", "slowed", "not slowed"]


@MEASUREMENTS.register("probe-curves")
class ProbeCurves(Measurement):
    """How fast linear probes learn; empty if no attack of the protocol is a linear probe."""

    def measure(self, protocol: Measured) -> Outcome:
        """Returns figures, the table `probes` and findings."""
        rows = {s.name: [row for row in protocol.rows if row.setting == s.name] for s in protocol.scores}
        return probe_outcome(protocol.plan, protocol.scores, rows)


def probe_outcome(
    plan: Sequence[Attack], settings: Sequence[SettingScores], rows: Mapping[str, Sequence[Row]]
) -> Outcome:
    """Returns figures, the table `probes` and findings; empty if no attack is a linear probe.

    Args:
        plan: the attacks.
        settings: the settings.
        rows: the rows of each setting.
    """
    probes = {a.label: a.adversary for a in plan if isinstance(a.adversary, Probe)}
    outcome = Outcome({}, {}, [])
    if not probes:
        return outcome
    lines: list[dict[str, str | Cell]] = []
    several = len(settings) > 1
    for i, setting in enumerate(settings):
        by_probe = {
            probe: {row.model: row for row in rows[setting.name] if row.attack == probe and row.curves}
            for probe in probes
        }
        by_probe = {probe: models for probe, models in by_probe.items() if ORIGINAL in models}
        first = {"setting": setting.name} if several else {}
        for probe, models in by_probe.items():
            cells = {model: row.cell(row.epochs[-1], setting.measure) for model, row in models.items()}
            lines.append({**first, "probe": probe, **cells})
        prefix = f"{setting.name}: " if several else ""
        figures = _figures(setting, {p: m for p, m in by_probe.items() if p in _shown(probes)}, prefix)
        figures = {f"{key}_{i}" if several else key: figure for key, figure in figures.items()}
        outcome += Outcome({}, figures, [prefix + text for text in _findings(setting, probes, by_probe)])
    measure = settings[0].measure
    if lines:
        note = (
            f"{measure.name.capitalize()} on the restricted task after the last epoch of each linear probe: the frozen "
            "model's features, and a head that trains on all samples at once. Closed forms (ridge) need one step."
        )
        table = Table(title="Linear probes on each model", rows=lines, percent=measure.percent, note=note)
        outcome += Outcome({"probes": table}, {}, [])
    return outcome


def _shown(probes: Mapping[str, Probe]) -> list[str]:
    """The probes with a figure: all iterative ones on raw features, and the first one for each other preparation."""
    iterative = {label: probe for label, probe in probes.items() if probe.solver != "ridge"}
    raw = [label for label, probe in iterative.items() if probe.preparation == "raw"]
    first = {probe.preparation: label for label, probe in reversed(iterative.items()) if probe.preparation != "raw"}
    return [*raw, *(label for label in iterative if label in first.values())]


def _figures(setting: SettingScores, probes: Mapping[str, Mapping[str, Row]], prefix: str) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for i, (probe, models) in enumerate(probes.items()):
        row = models[ORIGINAL]
        epochs = [e for e in row.epochs if e]  # without step 0, a constant guess: the axis is logarithmic
        figures[f"probe_{i}"] = Lines(
            title=f"{prefix}{probe[:1].upper()}{probe[1:]}, step by step",
            x_title="step",
            y_title=f"{setting.measure.name} on {setting.restricted}",
            log_x=True,
            x=[float(e * row.steps) for e in epochs],
            series={m: [r.cell(e, setting.measure).mean for e in epochs] for m, r in models.items()},
        )
    return figures


def effect(own: Row, original: Row) -> Effect | None:
    """Returns the effect of a defense on a probe; None if a score is not finite.

    Held back: after the last epoch, the score is lower than on the original by more than `MARGIN`. Slowed: only after
    an earlier epoch. Not slowed: after no epoch.
    """
    pairs = [(own.score(e), original.score(e)) for e in own.epochs if e]
    lower = [a < b - MARGIN for a, b in pairs if a is not None and b is not None]
    if len(lower) < len(pairs):
        return None
    return "held back" if lower[-1] else "slowed" if any(lower) else "not slowed"


def _findings(
    setting: SettingScores, probes: Mapping[str, Probe], by_probe: Mapping[str, Mapping[str, Row]]
) -> list[str]:
    known = {model for models in by_probe.values() for model in models}
    texts = [_about(label, setting, probes, by_probe) for label in setting.labels if label in known]
    descents = {probes[p].solver: p for p in by_probe if probes[p].preparation == "raw"}
    descent = next((descents[solver] for solver in DESCENTS if solver in descents), None)
    if descent is not None and setting.labels:
        texts.append(_order(descent, setting, by_probe[descent]))
    return texts


def _about(
    label: str, setting: SettingScores, probes: Mapping[str, Probe], by_probe: Mapping[str, Mapping[str, Row]]
) -> str:
    groups: dict[Effect | None, list[str]] = {}
    gaps: dict[str, float] = {}
    for probe, models in by_probe.items():
        if label not in models:
            continue
        own, original = models[label], models[ORIGINAL]
        measured = effect(own, original)
        groups.setdefault(measured, []).append(probe)
        if measured == "held back":
            gaps[probe] = (original.score(original.epochs[-1]) or 0.0) - (own.score(own.epochs[-1]) or 0.0)
    parts = [
        f"{text} {_named(groups[group], probes) if len(groups) > 1 else 'every one'}"
        for group, text in (
            ("held back", "still lower at the end than on the original:"),
            ("slowed", "slower at first, and as good in the end:"),
            ("not slowed", "not slowed:"),
            (None, "without a finite score:"),
        )
        if group in groups
    ]
    text = f"Linear probes on {label}: {'; '.join(parts)}."
    if not gaps:
        return text
    most = max(gaps, key=lambda probe: gaps[probe])
    own, original = by_probe[most][label], by_probe[most][ORIGINAL]
    ends = [setting.measure.text(row.cell(row.epochs[-1], setting.measure).mean) for row in (own, original)]
    return f"{text} The most: {most}, {ends[0]} against {ends[1]} after step {own.epochs[-1] * own.steps}."


def _named(labels: Sequence[str], probes: Mapping[str, Probe]) -> str:
    """Probes by solver, with the preparations of the features: `gd (raw, whitened), ridge (raw)`."""
    by_solver: dict[str, list[str]] = {}
    for label in labels:
        probe = probes[label]
        solver = f"{probe.solver} {probe.learning_rate:g}" if probe.solver == "adam" else probe.solver
        by_solver.setdefault(solver, []).append(probe.preparation)
    return ", ".join(f"{solver} ({', '.join(prepared)})" for solver, prepared in by_solver.items())


def _order(probe: str, setting: SettingScores, models: Mapping[str, Row]) -> str:
    """Says which models end lowest under a probe, and whether Algorithm 1 does, as in Figure 3."""
    ends = {model: row.score(row.epochs[-1]) for model, row in models.items()}
    known = {model: score for model, score in ends.items() if score is not None and math.isfinite(score)}
    order = sorted(known, key=lambda model: known[model])
    listed = ", ".join(f"{m} {setting.measure.text(setting.measure.value(known[m]))}" for m in order)
    text = f"After the last epoch of {probe}, slowest first: {listed}."
    ours = [model for model in order if setting.defense(model) in ALGORITHM_1]
    if not ours:
        return text
    theirs = [model for model in order if model == ORIGINAL or setting.defense(model) in PAPERS]
    if theirs[0] in ours:
        return f"{text} Of the paper's methods Algorithm 1 is the slowest, as in its Figure 3."
    return f"{text} In the paper's Figure 3 Algorithm 1 is the slowest of its methods; here {theirs[0]} is."
