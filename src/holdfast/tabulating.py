"""What a protocol's curves say: tables as the SOPHON paper prints them, figures over epochs, and sentences."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict

from holdfast.comparison import Comparison
from holdfast.immunizing import Made
from holdfast.results import Cell, Curve, Figure, ImmunizationResult, Lines, Outcome, Role, Table

SCRATCH: Final = "scratch"
ORIGINAL: Final = "original"

BELOW_CHANCE = 0.03
"""By how much a score must be under chance, and under the original's, before the findings wonder at it."""

LONG = 12
"""With more attacks than this there is no figure for each."""

Printed = float | tuple[float, float]
"""A number of the paper in percent, or (mean, standard deviation)."""

TableRow = dict[str, str | Cell]


class PaperSpec(BaseModel):
    """What the paper prints of one model, in percent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benign: float | None = None
    attacks: dict[str, dict[int, Printed]] = {}


@dataclass(frozen=True)
class Row:
    """One row of the table of accuracies: one attack on one model.

    Attributes:
        setting: where.
        model: `scratch`, `original`, or the name of a defense.
        attack: the attack's name.
        covers: attacks that it is compared with, where the model is `scratch`; else the attack itself.
        stands_for: names under which the paper's numbers are found.
        epochs: at which it was scored.
        steps: of an epoch.
        remark: why there are no curves, if there are none.
        curves: one a seed.
    """

    setting: str
    model: str
    attack: str
    covers: tuple[str, ...]
    stands_for: tuple[str, ...]
    epochs: tuple[int, ...]
    steps: int
    remark: str = ""
    curves: tuple[Curve, ...] = ()

    def cell(self, epoch: int, paper: PaperSpec | None = None) -> Cell:
        """Scores over seeds at one of the epochs, with the paper's."""
        k = self.epochs.index(epoch)
        return Cell.of((curve.scores[k] for curve in self.curves), *self._printed(epoch, paper))

    def _printed(self, epoch: int, paper: PaperSpec | None) -> tuple[float | None, float | None]:
        attacks = {} if paper is None else paper.attacks
        found = next((attacks[name][epoch] for name in self.stands_for if epoch in attacks.get(name, {})), None)
        mean, sd = found if isinstance(found, tuple) else (found, None)
        return _share(mean), _share(sd)


@dataclass(frozen=True)
class Scene:
    """What is known of one setting beside its rows.

    Attributes:
        name: of the setting.
        restricted: name of the restricted task.
        unit: what scores are.
        chance: the score of a constant guess.
        original: benign score of the original; None: not finite.
        made: immunized models by label and seed of the defense.
        paper: the paper's numbers by model.
        stands_for: the paper's setting that this one takes the place of, if it is another.
    """

    name: str
    restricted: str
    unit: str
    chance: float
    original: float | None
    made: Mapping[tuple[str, int], Made]
    paper: Mapping[str, PaperSpec]
    stands_for: str | None

    def benign(self, model: str) -> Cell:
        """Benign score of a model over seeds of its defense; empty for scratch, which has no benign task."""
        printed = _share(self.paper[model].benign) if model in self.paper else None
        own = [made.benign for (label, _), made in self.made.items() if label == model]
        return Cell.of([self.original] if model == ORIGINAL else own, printed)

    def drop(self, model: str) -> Cell:
        """What a model lost of the original's benign score, over seeds of its defense; empty for the controls."""
        own = [made.benign for (label, _), made in self.made.items() if label == model]
        known = [self.original - score for score in own if score is not None and self.original is not None]
        return Cell.of(known if len(known) == len(own) else [None])


def tabulate(
    scenes: Sequence[Scene], rows: Sequence[Row], epochs: Sequence[int], compare_with: str | None = None
) -> Outcome:
    """Lays out what a protocol measured.

    Args:
        scenes: the settings.
        rows: of the table of accuracies.
        epochs: of the protocol; single attacks may have more.
        compare_with: the defense that the others are compared with, if there is one.
    """
    by_scene = {scene.name: [row for row in rows if row.setting == scene.name] for scene in scenes}
    compared = {scene.name: _compared(by_scene[scene.name], epochs) for scene in scenes}
    tables = {"accuracy": _accuracy(scenes, by_scene, epochs)}
    if any(row.curves for row in rows):
        tables["best"] = _best(scenes, compared, epochs)
        tables["advantage"] = _advantage(scenes, compared, epochs)
        if compare_with is not None:
            tables["difference"] = _difference(scenes, compared, epochs, compare_with)
    if any(scene.made for scene in scenes):
        tables["immunization"] = _immunization(scenes)
    if len(scenes) == 1:
        for table in tables.values():
            for row in table.rows:
                del row["setting"]
    figures: dict[str, Figure] = {}
    findings: list[str] = []
    several = len(scenes) > 1
    for i, scene in enumerate(scenes):
        mine = by_scene[scene.name], compared[scene.name], epochs
        where = f"{scene.name}: " if several else ""
        figures |= {f"{k}_{i}" if several else k: v for k, v in _figures(scene, *mine, where).items()}
        findings += [where + finding for finding in _findings(scene, *mine)]
    return Outcome(tables, figures, findings)


def _column(epoch: int) -> str:
    return f"epoch {epoch}"


def _accuracy(scenes: Sequence[Scene], rows: Mapping[str, Sequence[Row]], epochs: Sequence[int]) -> Table:
    found: list[TableRow] = []
    for scene in scenes:
        for row in rows[scene.name]:
            cells: TableRow = {"setting": scene.name, "model": row.model, "attack": row.attack}
            cells["benign"] = scene.benign(row.model)
            if row.remark:
                cells["remark"] = row.remark
            else:
                cells |= {_column(e): row.cell(e, scene.paper.get(row.model)) for e in row.epochs}
            found.append(cells)
        if not rows[scene.name]:  # no attacks: how good the models are is still worth a line
            for model in (ORIGINAL, *dict.fromkeys(label for label, _ in scene.made)):
                found.append({"setting": scene.name, "model": model, "benign": scene.benign(model)})
    unit = scenes[0].unit
    restricted = ", ".join(dict.fromkeys(scene.restricted for scene in scenes))
    steps = sorted({row.steps for each in rows.values() for row in each if row.curves})
    length = f" An epoch has {_listed([str(n) for n in steps])} steps." if steps else ""
    note = (
        f"{unit.capitalize()} on the restricted task ({restricted}) after so many epochs of each attack, and on the "
        f"benign task before any; mean ± standard deviation over seeds, in percent.{length}{_about_paper(scenes)}"
    )
    title = f"{unit.capitalize()} over epochs" if any(rows.values()) else f"Benign {unit}; no attacks"
    return Table(title=title, rows=found, percent=True, note=note if any(rows.values()) else "")


def _about_paper(scenes: Sequence[Scene]) -> str:
    if not any(scene.paper for scene in scenes):
        return ""
    instead = [f"{scene.name} for its {scene.stands_for}" for scene in scenes if scene.stands_for and scene.paper]
    return " Small: what the paper prints." + (
        f" The paper's setting is another, and larger: here stands {'; '.join(instead)}." if instead else ""
    )


def _compared(rows: Sequence[Row], epochs: Sequence[int]) -> dict[str, Comparison]:
    """Each model's best attacks, beside those from scratch and on the original, at the protocol's epochs."""
    curves: dict[str, list[Curve]] = {}
    for row in rows:
        kept = [row.epochs.index(e) for e in epochs]
        for curve in row.curves:
            cut = {k: [getattr(curve, k)[i] for i in kept] for k in ("scores", "losses", "folds")}
            named = {"adversary": row.attack, "budgets": list(epochs), **cut}
            curves.setdefault(row.model, []).append(curve.model_copy(update=named))
    controls = curves.get(SCRATCH, []) + curves.get(ORIGINAL, [])
    return {
        model: Comparison.of(controls if model in (SCRATCH, ORIGINAL) else controls + own)
        for model, own in curves.items()
    }


def _role(model: str) -> Role:
    return "scratch" if model == SCRATCH else "original" if model == ORIGINAL else "immunized"


def _ahead(model: str, comparison: Comparison) -> list[list[float | None]] | None:
    """Advantage over scratch of each seed at each epoch; None where there is none."""
    if model == SCRATCH or SCRATCH not in comparison.batteries:
        return None
    difference = comparison.scores[_role(model)] - comparison.scores[SCRATCH]
    return [[float(v) if math.isfinite(v) else None for v in seed] for seed in difference]


def _best(scenes: Sequence[Scene], compared: Mapping[str, Mapping[str, Comparison]], epochs: Sequence[int]) -> Table:
    found: list[TableRow] = []
    for scene in scenes:
        for model, comparison in compared[scene.name].items():
            battery = comparison.batteries[_role(model)]
            scores = comparison.scores[_role(model)]
            row: TableRow = {"setting": scene.name, "model": model, "attack": battery.best_name(len(epochs) - 1)}
            row["benign"] = scene.benign(model).model_copy(update={"paper": None})
            row["benign drop"] = scene.drop(model)
            found.append(row | {_column(e): Cell.of(_plain(scores[:, k])) for k, e in enumerate(epochs)})
    note = (
        "The attack that is best at this epoch or before, chosen by mean over seeds on one half of the test split and "
        "scored on the other, both ways; the one that is named is the best on the whole test split at the last epoch."
    )
    return Table(title="Best attack on each model", rows=found, percent=True, note=note)


def _advantage(
    scenes: Sequence[Scene], compared: Mapping[str, Mapping[str, Comparison]], epochs: Sequence[int]
) -> Table:
    found: list[TableRow] = []
    for scene in scenes:
        for model, comparison in compared[scene.name].items():
            ahead = _ahead(model, comparison)
            if ahead is None:
                continue
            row: TableRow = {"setting": scene.name, "model": model}
            row |= {_column(e): Cell.of(seed[k] for seed in ahead) for k, e in enumerate(epochs) if e}
            found.append({**row, "area": Cell.of(_mean(seed[1:]) for seed in ahead)})
    note = (
        "Best attack on the model minus best attack from scratch, seed by seed, in points: mean ± standard error over "
        "seeds. At 0 or below, having the model is worth nothing. Area: the mean over all epochs but 0."
    )
    return Table(title="Advantage over scratch", rows=found, percent=True, note=note, standard_error=True)


def _difference(
    scenes: Sequence[Scene], compared: Mapping[str, Mapping[str, Comparison]], epochs: Sequence[int], base: str
) -> Table:
    """Each model against one of them: seeds share their batches and samples, so that much of the noise cancels."""
    found: list[TableRow] = []
    for scene in scenes:
        models = compared[scene.name]
        for model, comparison in models.items():
            if model in (base, SCRATCH) or base not in models:
                continue
            difference = comparison.scores[_role(model)] - models[base].scores[_role(base)]
            seeds = [_plain(seed) for seed in difference]
            row: TableRow = {"setting": scene.name, "model": model}
            row |= {_column(e): Cell.of(seed[k] for seed in seeds) for k, e in enumerate(epochs) if e}
            row["area"] = Cell.of(_mean(seed[1:]) for seed in seeds)
            dropped = [scene.made[model, s].benign for label, s in scene.made if label == model]
            own = [scene.made[base, s].benign for label, s in scene.made if label == base]
            if dropped and len(dropped) == len(own):
                pairs = zip(dropped, own, strict=True)
                row["benign"] = Cell.of(a - b if a is not None and b is not None else None for a, b in pairs)
            found.append(row)
    note = (
        f"Best attack on the model minus best attack on {base}, seed by seed, in points: mean ± standard error over "
        f"seeds. Below 0, the model resists more than {base}. Area: the mean over all epochs but 0. Benign: its own "
        f"score minus that of {base}."
    )
    return Table(title=f"Against {base}", rows=found, percent=True, note=note, standard_error=True)


def _immunization(scenes: Sequence[Scene]) -> Table:
    found: list[TableRow] = []
    for scene in scenes:
        for (label, seed), made in scene.made.items():
            history, losses = made.result.history, made.result.history.get("suppression_loss", [])
            row: TableRow = {
                "setting": scene.name,
                "defense": label,
                "seed": str(seed),
                "ended": "completed" if made.result.completed else "gave up",
                "from": f"reused from {made.reused_from}" if made.reused_from else "here",
                "rounds": Cell.of([len(history.get("iteration", []))]),
                "rollbacks": Cell.of([made.result.rollbacks]),
                "held-out benign": Cell.of([_last(history.get("benign_score", []))]),
            }
            if losses:
                row |= {
                    "last loss": Cell.of([losses[-1]]),
                    "largest jump": Cell.of([largest_jump(losses)]),
                    "non-finite from": Cell.of([] if (at := first_lost(made.result)) is None else [at]),
                }
            if "gradient_passes" in history:
                row["gradient passes"] = Cell.of([sum(v for v in history["gradient_passes"] if v is not None)])
            found.append(row)
    note = (
        "Of each immunization: rounds done, how often the guard went back, the benign score on data that the defense "
        "kept back, and its suppression loss: the last, the largest change from one round to the next, and the first "
        "round in which it was not finite (a dash: in none)."
    )
    return Table(title="How the models were immunized", rows=found, note=note)


def largest_jump(losses: Sequence[float | None]) -> float | None:
    """Returns the largest change between two consecutive values; None where no two are finite.

    Example:
        >>> largest_jump([0.5, 2.0, None, 9.0, 8.0])
        1.5
    """
    pairs = itertools.pairwise(losses)
    return max((abs(b - a) for a, b in pairs if a is not None and b is not None), default=None)


def first_lost(result: ImmunizationResult) -> int | None:
    """Returns the first round whose suppression loss is not finite, if there is one."""
    losses = result.history.get("suppression_loss", [])
    return next((i + 1 for i, loss in enumerate(losses) if loss is None), None)


def _figures(
    scene: Scene, rows: Sequence[Row], compared: Mapping[str, Comparison], epochs: Sequence[int], where: str
) -> dict[str, Figure]:
    axes = {"x_title": "epoch", "y_title": f"{scene.unit} on {scene.restricted}"}
    found: dict[str, Figure] = {}
    attacks = list(dict.fromkeys(r.attack for r in rows if r.model != SCRATCH and r.curves))
    for i, attack in enumerate(attacks if len(attacks) <= LONG else ()):
        mine = [row for row in rows if attack in row.covers and row.curves]
        x = sorted({e for row in mine for e in row.epochs})
        series = {r.model: [r.cell(e).mean if e in r.epochs else None for e in x] for r in mine}
        found[f"attack_{i}"] = Lines(title=f"{where}{attack}", x=list(map(float, x)), series=series, **axes)
    if len(attacks) > 1:
        best = {m: _plain(c.scores[_role(m)].mean(0)) for m, c in compared.items()}
        title = f"{where}Best attack on each model"
        found["best_attack"] = Lines(title=title, x=list(map(float, epochs)), series=best, **axes)
    return found | _loss_figures(scene, where)


def _loss_figures(scene: Scene, where: str) -> dict[str, Figure]:
    """One figure a defense: one that runs away would flatten the others to a line."""
    histories = {
        place: made.result.history["suppression_loss"]
        for place, made in scene.made.items()
        if any(v is not None for v in made.result.history.get("suppression_loss", []))
    }
    labels = list(dict.fromkeys(label for label, _ in histories))
    found: dict[str, Figure] = {}
    for i, label in enumerate(labels):
        own = {seed: history for (name, seed), history in histories.items() if name == label}
        longest = max(map(len, own.values()))
        found["suppression" + (f"_{i}" if len(labels) > 1 else "")] = Lines(
            title=f"{where}Suppression loss" + (f" of {label}" if len(labels) > 1 else ""),
            x_title="round",
            y_title="suppression loss",
            x=[float(k + 1) for k in range(longest)],
            series={
                label if seed == 0 else f"{label}, seed {seed}": [*values, *([None] * (longest - len(values)))]
                for seed, values in own.items()
            },
        )
    return found


def _findings(
    scene: Scene, rows: Sequence[Row], compared: Mapping[str, Comparison], epochs: Sequence[int]
) -> list[str]:
    labels = list(dict.fromkeys(label for label, _ in scene.made))
    found = [_about_original(scene, compared, epochs)] if SCRATCH in compared and ORIGINAL in compared else []
    for label in labels:
        if label in compared:
            found.append(_about_defense(label, scene, rows, compared, epochs))
        found += _about_immunization(label, scene.made)
    refused = {row.attack: row.remark for row in rows if row.remark}
    found += [f"{attack} is {remark}." for attack, remark in refused.items()]
    return found


def _about_original(scene: Scene, compared: Mapping[str, Comparison], epochs: Sequence[int]) -> str:
    """What there is to protect."""
    ahead = _ahead(ORIGINAL, compared[ORIGINAL])
    assert ahead is not None
    last = Cell.of(seed[-1] for seed in ahead)
    text = (
        f"After epoch {epochs[-1]}, the best attack on the original is at {_score(compared, ORIGINAL)}, "
        f"from scratch at {_score(compared, SCRATCH)}; chance is {_percent(scene.chance)}."
    )
    if last.mean is not None and last.mean <= 0:
        text += " The original is worth nothing to the adversary there, so that there is nothing to protect."
    return text


def _about_defense(
    label: str, scene: Scene, rows: Sequence[Row], compared: Mapping[str, Comparison], epochs: Sequence[int]
) -> str:
    comparison = compared[label]
    best = comparison.batteries["immunized"].best_name(len(epochs) - 1)
    text = f"After epoch {epochs[-1]}, {label} under its best attack, {best}, is at {_score(compared, label)}"
    ahead = _ahead(label, comparison)
    if ahead is not None:
        last, area = Cell.of(seed[-1] for seed in ahead), Cell.of(_mean(seed[1:]) for seed in ahead)
        text += f": {_points(last)} over scratch, and {_points(area)} on average over epochs"
        pairs = [(r, s) for r in rows for s in rows if r.model == label and s.model == SCRATCH and r.attack in s.covers]
        ends = [(r.cell(epochs[-1]).mean, s.cell(epochs[-1]).mean) for r, s in pairs if r.curves and s.curves]
        below = sum(own is not None and scratch is not None and own <= scratch for own, scratch in ends)
        text += f"; {below} of {len(ends)} attacks end no higher than the same from scratch"
    low = _below_chance(label, rows, epochs[-1], scene.chance)
    if low:
        text += (
            f". Below chance ({_percent(scene.chance)}) after {', '.join(low)}: the model avoids the right answers, "
            "which is not the same as not knowing them"
        )
    benign = scene.benign(label)
    if benign.mean is not None and scene.original is not None:
        text += f". Benign {scene.unit} was {_percent(scene.original)} before, and is {_percent(benign.mean)}"
    return text + "."


def _below_chance(label: str, rows: Sequence[Row], epoch: int, chance: float) -> list[str]:
    """Attacks that leave the model clearly under chance, where they do not leave the original there as well."""
    ends = {(r.model, r.attack): r.cell(epoch).mean for r in rows if r.curves}
    found = []
    for (model, attack), end in ends.items():
        known = [v for v in (ends.get((ORIGINAL, attack)),) if v is not None]
        if model == label and end is not None and end < min([chance, *known]) - BELOW_CHANCE:
            found.append(attack)
    return found


def _about_immunization(label: str, every: Mapping[tuple[str, int], Made]) -> list[str]:
    """What went wrong, or was taken from elsewhere."""
    own = {seed: made for (name, seed), made in every.items() if name == label}
    found = []
    lost = {seed: at for seed, made in own.items() if (at := first_lost(made.result)) is not None}
    if lost:
        rounds = ", ".join(map(str, lost.values()))
        found.append(f"{label}: in {len(lost)} of {len(own)} seeds a suppression loss was not finite (round {rounds}).")
    unfinished = [seed for seed, made in own.items() if not made.result.completed]
    if unfinished:
        seeds = ", ".join(map(str, unfinished))
        found.append(f"{label} did not complete with seed {seeds}: it gave up early, and its last state was attacked.")
    jumps = [jump for made in own.values() if (jump := _jump_of(made)) is not None]
    if jumps:
        found.append(f"{label}: the largest jump of its suppression loss between two rounds is {max(jumps):.3g}.")
    for owner in dict.fromkeys(made.reused_from for made in own.values() if made.reused_from):
        found.append(f"{label} was not immunized here, but reused from {owner}.")
    return found


def _jump_of(made: Made) -> float | None:
    return largest_jump(made.result.history.get("suppression_loss", []))


def _score(compared: Mapping[str, Comparison], model: str) -> str:
    value = float(compared[model].scores[_role(model)][:, -1].mean())
    return _percent(value) if math.isfinite(value) else "no finite score"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _points(cell: Cell) -> str:
    if cell.mean is None:
        return "a number of points that is not finite"
    error = "" if cell.standard_error is None else f" ± {100 * cell.standard_error:.1f}"
    return f"{100 * cell.mean:+.1f}{error} points"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _share(percent: float | None) -> float | None:
    return None if percent is None else round(percent / 100, 12)  # 96.2 % is 0.962, as it is written


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(v) if math.isfinite(v) else None for v in values]


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [v for v in values if v is not None]
    return statistics.fmean(finite) if finite and len(finite) == len(values) else None


def _last(values: Sequence[float | int | None]) -> float | None:
    return next((v for v in reversed(values) if v is not None), None)
