"""Lays out what a protocol measured: tables as the SOPHON paper prints them, and figures over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from holdfast.auditing.statistics import Comparison
from holdfast.experiments.findings import findings_of
from holdfast.experiments.setting import ORIGINAL, SCRATCH, role_of
from holdfast.experiments.setting_scores import (
    Row,
    SettingScores,
    about_paper,
    ahead_of_scratch,
    compare,
    first_lost,
    largest_jump,
    mean_of,
    plain,
)
from holdfast.results import ImmunizationResult
from holdfast.results.tables import Cell, Figure, Lines, Outcome, Table

LONG = 12
"""With more attacks than this there is no figure for each."""

TableRow = dict[str, str | Cell]


def tabulate(
    settings: Sequence[SettingScores], rows: Sequence[Row], epochs: Sequence[int], compare_with: str | None = None
) -> Outcome:
    """Lays out what a protocol measured.

    Args:
        settings: the settings.
        rows: of the table of scores.
        epochs: of the protocol; single attacks may have more.
        compare_with: the defense that the others are compared with, if there is one.
    """
    by_scene = {setting.name: [row for row in rows if row.setting == setting.name] for setting in settings}
    compared = {setting.name: compare(by_scene[setting.name], epochs) for setting in settings}
    measure = settings[0].measure  # of all: a protocol has one kind of task
    tables = {"accuracy" if measure.percent else "error": _scores(settings, by_scene)}
    if any(row.curves for row in rows):
        tables["best"] = _best(settings, compared, epochs)
        tables["advantage"] = _advantage(settings, compared, epochs)
        if any(setting.made for setting in settings):
            tables["trade_off"] = _trade_off(settings, compared)
        if compare_with is not None:
            tables["difference"] = _difference(settings, compared, epochs, compare_with)
    if any(setting.made for setting in settings):
        tables["immunization"] = _immunization(settings)
    if len(settings) == 1:
        for table in tables.values():
            for row in table.rows:
                del row["setting"]
    figures: dict[str, Figure] = {}
    findings: list[str] = []
    several = len(settings) > 1
    for i, setting in enumerate(settings):
        mine = by_scene[setting.name], compared[setting.name], epochs
        where = f"{setting.name}: " if several else ""
        figures |= {f"{k}_{i}" if several else k: v for k, v in _figures(setting, *mine, where).items()}
        findings += [where + finding for finding in findings_of(setting, *mine)]
    return Outcome(tables, figures, findings)


def _column(epoch: int) -> str:
    return f"epoch {epoch}"


def _scores(settings: Sequence[SettingScores], rows: Mapping[str, Sequence[Row]]) -> Table:
    found: list[TableRow] = []
    for setting in settings:
        for row in rows[setting.name]:
            cells: TableRow = {"setting": setting.name, "model": row.model, "attack": row.attack}
            cells["benign"] = setting.benign(row.model)
            if row.remark:
                cells["remark"] = row.remark
            else:
                cells |= {_column(e): row.cell(e, setting.measure, setting.paper.get(row.model)) for e in row.epochs}
            found.append(cells)
        if not rows[setting.name]:  # no attacks: how good the models are is still worth a line
            for model in (ORIGINAL, *dict.fromkeys(label for label, _ in setting.made)):
                found.append({"setting": setting.name, "model": model, "benign": setting.benign(model)})
    measure = settings[0].measure
    unit = measure.name.capitalize()
    restricted = ", ".join(dict.fromkeys(setting.restricted for setting in settings))
    steps = sorted({row.steps for each in rows.values() for row in each if row.curves})
    length = f" An epoch has {_listed([str(n) for n in steps])} step{'s' if steps != [1] else ''}." if steps else ""
    note = (
        f"{unit} on the restricted task ({restricted}) after so many epochs of each attack, and on the benign task "
        f"before any; mean ± standard deviation over seeds{', in percent' if measure.percent else ''}."
        f"{'' if measure.percent else ' The smaller, the better the model.'}{length}{about_paper(settings)}"
    )
    title = f"{unit} over epochs" if any(rows.values()) else f"Benign {measure.name}; no attacks"
    return Table(title=title, rows=found, percent=measure.percent, note=note if any(rows.values()) else "")


def _best(
    settings: Sequence[SettingScores], compared: Mapping[str, Mapping[str, Comparison]], epochs: Sequence[int]
) -> Table:
    found: list[TableRow] = []
    for setting in settings:
        for model, comparison in compared[setting.name].items():
            battery = comparison.batteries[role_of(model)]
            scores = comparison.scores[role_of(model)]
            row: TableRow = {"setting": setting.name, "model": model, "attack": battery.best_name(len(epochs) - 1)}
            row["benign"] = setting.benign(model).model_copy(update={"paper": None})
            row["benign drop" if setting.measure.percent else "benign rise"] = setting.lost(model)
            shown = (map(setting.measure.value, plain(each)) for each in scores.T)
            found.append(row | {_column(e): Cell.of(seeds) for e, seeds in zip(epochs, shown, strict=True)})
    note = (
        "The attack that is best at this epoch or before, chosen by mean over seeds on one half of the test split and "
        "scored on the other, both ways; the one that is named is the best on the whole test split at the last epoch."
    )
    return Table(title="Best attack on each model", rows=found, percent=settings[0].measure.percent, note=note)


def _advantage(
    settings: Sequence[SettingScores], compared: Mapping[str, Mapping[str, Comparison]], epochs: Sequence[int]
) -> Table:
    found: list[TableRow] = []
    for setting in settings:
        for model, comparison in compared[setting.name].items():
            ahead = ahead_of_scratch(model, comparison, setting.measure)
            if ahead is None:
                continue
            row: TableRow = {"setting": setting.name, "model": model}
            row |= {_column(e): Cell.of(seed[k] for seed in ahead) for k, e in enumerate(epochs) if e}
            found.append({**row, "area": Cell.of(mean_of(seed[1:]) for seed in ahead)})
    percent = settings[0].measure.percent
    what = (
        "Best attack on the model minus best attack from scratch, seed by seed, in points"
        if percent
        else "Error of the best attack from scratch minus that of the best attack on the model, seed by seed"
    )
    note = (
        f"{what}: mean ± standard error over seeds. At 0 or below, having the model is worth nothing. Area: the mean "
        "over all epochs but 0."
    )
    return Table(title="Advantage over scratch", rows=found, percent=percent, note=note, standard_error=True)


def _trade_off(settings: Sequence[SettingScores], compared: Mapping[str, Mapping[str, Comparison]]) -> Table:
    """What each immunized model gave of its benign score, and what is left of the advantage."""
    found: list[TableRow] = []
    for setting in settings:
        for model, comparison in compared[setting.name].items():
            ahead = ahead_of_scratch(model, comparison, setting.measure)
            if ahead is None:
                continue
            areas = [mean_of(seed[1:]) for seed in ahead]
            own = {seed: made for (label, seed), made in setting.made.items() if label == model}
            if not own:
                found.append({"setting": setting.name, "model": model, "seed": "", "advantage": Cell.of(areas)})
            for seed, made in own.items():
                row: TableRow = {"setting": setting.name, "model": model, "seed": str(seed)}
                row["benign drop" if setting.measure.percent else "benign rise"] = setting.lost_by(made)
                # Attack seed s meets the model of defense seed s mod their number.
                found.append({**row, "advantage": Cell.of(areas[s] for s in range(len(areas)) if s % len(own) == seed)})
    note = (
        "Of each immunized model: what it lost on the benign task, and the mean advantage over scratch that the best "
        "attack still has, over all epochs but 0 (mean ± standard error over seeds)."
    )
    percent = settings[0].measure.percent
    return Table(title="Resistance and its price", rows=found, percent=percent, note=note, standard_error=True)


def _difference(
    settings: Sequence[SettingScores],
    compared: Mapping[str, Mapping[str, Comparison]],
    epochs: Sequence[int],
    base: str,
) -> Table:
    """Each model against one of them: seeds share their batches and samples, so that much of the noise cancels."""
    found: list[TableRow] = []
    for setting in settings:
        models = compared[setting.name]
        for model, comparison in models.items():
            if model in (base, SCRATCH) or base not in models:
                continue
            difference = comparison.scores[role_of(model)] - models[base].scores[role_of(base)]
            seeds = [list(map(setting.measure.difference, plain(seed))) for seed in difference]
            row: TableRow = {"setting": setting.name, "model": model}
            row |= {_column(e): Cell.of(seed[k] for seed in seeds) for k, e in enumerate(epochs) if e}
            row["area"] = Cell.of(mean_of(seed[1:]) for seed in seeds)
            dropped = [setting.made[model, s].benign for label, s in setting.made if label == model]
            own = [setting.made[base, s].benign for label, s in setting.made if label == base]
            if dropped and len(dropped) == len(own):
                pairs = zip(dropped, own, strict=True)
                apart = [a - b if a is not None and b is not None else None for a, b in pairs]
                row["benign"] = Cell.of(map(setting.benign_measure.difference, apart))
            found.append(row)
    percent = settings[0].measure.percent
    what, benign = (
        (f"Best attack on the model minus best attack on {base}, seed by seed, in points",
         f"its own score minus that of {base}")
        if percent
        else (f"Error of the best attack on {base} minus that of the best attack on the model, seed by seed",
              f"the error of {base} minus its own")
    )  # fmt: skip
    note = (
        f"{what}: mean ± standard error over seeds. Below 0, the model resists more than {base}. Area: the mean over "
        f"all epochs but 0. Benign: {benign}."
    )
    return Table(title=f"Against {base}", rows=found, percent=percent, note=note, standard_error=True)


def _ended(result: ImmunizationResult) -> str:
    if result.changed is False:
        return "unchanged"
    return "completed" if result.completed else "gave up"


def _immunization(settings: Sequence[SettingScores]) -> Table:
    found: list[TableRow] = []
    for setting in settings:
        for (label, seed), made in setting.made.items():
            history, losses = made.result.history, made.result.history.get("suppression_loss", [])
            row: TableRow = {
                "setting": setting.name,
                "defense": label,
                "seed": str(seed),
                "ended": _ended(made.result),
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
        "round in which a loss was not finite (a dash: in none)."
    )
    return Table(title="How the models were immunized", rows=found, note=note)


def _figures(
    setting: SettingScores, rows: Sequence[Row], compared: Mapping[str, Comparison], epochs: Sequence[int], where: str
) -> dict[str, Figure]:
    axes = {"x_title": "epoch", "y_title": f"{setting.measure.name} on {setting.restricted}"}
    found: dict[str, Figure] = {}
    attacks = list(dict.fromkeys(r.attack for r in rows if r.model != SCRATCH and r.curves))
    for i, attack in enumerate(attacks if len(attacks) <= LONG else ()):
        mine = [row for row in rows if attack in row.covers and row.curves]
        x = sorted({e for row in mine for e in row.epochs})
        series = {r.model: [r.cell(e, setting.measure).mean if e in r.epochs else None for e in x] for r in mine}
        found[f"attack_{i}"] = Lines(title=f"{where}{attack}", x=list(map(float, x)), series=series, **axes)
    if len(attacks) > 1:
        best = {m: list(map(setting.measure.value, plain(c.scores[role_of(m)].mean(0)))) for m, c in compared.items()}
        title = f"{where}Best attack on each model"
        found["best_attack"] = Lines(title=title, x=list(map(float, epochs)), series=best, **axes)
    return found | _loss_figures(setting, where)


def _loss_figures(setting: SettingScores, where: str) -> dict[str, Figure]:
    """One figure a defense: one that runs away would flatten the others to a line."""
    histories = {
        place: made.result.history["suppression_loss"]
        for place, made in setting.made.items()
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


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _last(values: Sequence[float | int | None]) -> float | None:
    return next((v for v in reversed(values) if v is not None), None)
