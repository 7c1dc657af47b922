"""Tables of a protocol, as the SOPHON paper prints them, and figures over epochs."""

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
from holdfast.results.tables import Cell, Figure, Lines, Outcome, Table, last_known

LONG = 12
"""Up to this many attacks, each has its own figure."""

TableRow = dict[str, str | Cell]


def tabulate(
    settings: Sequence[SettingScores], rows: Sequence[Row], epochs: Sequence[int], compare_with: str | None = None
) -> Outcome:
    """Returns tables, figures and findings of a protocol.

    Args:
        settings: the settings.
        rows: rows of the table of scores.
        epochs: epochs of the protocol; single attacks may have more.
        compare_with: the defense that the others are compared with; None: no such table.
    """
    by_setting = {setting.name: [row for row in rows if row.setting == setting.name] for setting in settings}
    compared = {setting.name: compare(by_setting[setting.name], epochs) for setting in settings}
    measure = settings[0].measure  # the same for all settings: a protocol has one kind of task
    tables = {"accuracy" if measure.percent else "error": _scores(settings, by_setting)}
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
        measured = by_setting[setting.name], compared[setting.name], epochs
        prefix = f"{setting.name}: " if several else ""
        figures |= {f"{k}_{i}" if several else k: v for k, v in _figures(setting, *measured, prefix).items()}
        findings += [prefix + finding for finding in findings_of(setting, *measured)]
    return Outcome(tables, figures, findings)


def _scores(settings: Sequence[SettingScores], rows: Mapping[str, Sequence[Row]]) -> Table:
    lines: list[TableRow] = []
    for setting in settings:
        for row in rows[setting.name]:
            cells: TableRow = {"setting": setting.name, "model": row.model, "attack": row.attack}
            cells["benign"] = setting.benign(row.model)
            if row.remark:
                cells["remark"] = row.remark
            else:
                paper = setting.paper.get(row.model)
                cells |= {f"epoch {e}": row.cell(e, setting.measure, paper) for e in row.epochs}
            lines.append(cells)
        if not rows[setting.name]:  # no attacks: show the benign scores at least
            for model in (ORIGINAL, *setting.labels):
                lines.append({"setting": setting.name, "model": model, "benign": setting.benign(model)})
    measure = settings[0].measure
    unit = measure.name.capitalize()
    restricted = ", ".join(dict.fromkeys(setting.restricted for setting in settings))
    steps = sorted({row.steps for each in rows.values() for row in each if row.curves})
    length = f" An epoch has {' or '.join(map(str, steps))} step{'s' if steps != [1] else ''}." if steps else ""
    note = (
        f"{unit} on the restricted task ({restricted}) after the epochs of each attack, and on the benign task before "
        f"it; mean ± standard deviation over seeds{', in percent' if measure.percent else ''}."
        f"{'' if measure.percent else ' The smaller, the better the model.'}{length}{about_paper(settings)}"
    )
    title = f"{unit} over epochs" if any(rows.values()) else f"Benign {measure.name}; no attacks"
    return Table(title=title, rows=lines, percent=measure.percent, note=note if any(rows.values()) else "")


def _best(
    settings: Sequence[SettingScores], compared: Mapping[str, Mapping[str, Comparison]], epochs: Sequence[int]
) -> Table:
    rows: list[TableRow] = []
    for setting in settings:
        for model, comparison in compared[setting.name].items():
            battery, scores = comparison.batteries[role_of(model)], comparison.scores[role_of(model)]
            row: TableRow = {"setting": setting.name, "model": model, "attack": battery.best_name(len(epochs) - 1)}
            row["benign"] = setting.benign(model).model_copy(update={"paper": None})
            row["benign drop" if setting.measure.percent else "benign rise"] = setting.lost(model)
            shown = (map(setting.measure.value, plain(each)) for each in scores.T)
            rows.append(row | {f"epoch {e}": Cell.of(seeds) for e, seeds in zip(epochs, shown, strict=True)})
    note = (
        "The best attack at this epoch or before, chosen by mean over seeds on one half of the test split and scored "
        "on the other, both ways. The name is that of the best attack on the whole test split at the last epoch."
    )
    return Table(title="Best attack on each model", rows=rows, percent=settings[0].measure.percent, note=note)


def _advantage(
    settings: Sequence[SettingScores], compared: Mapping[str, Mapping[str, Comparison]], epochs: Sequence[int]
) -> Table:
    rows: list[TableRow] = []
    for setting in settings:
        for model, comparison in compared[setting.name].items():
            ahead = ahead_of_scratch(model, comparison, setting.measure)
            if ahead is not None:
                rows.append({"setting": setting.name, "model": model, **_over_epochs(ahead, epochs)})
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
    return Table(title="Advantage over scratch", rows=rows, percent=percent, note=note, standard_error=True)


def _over_epochs(seeds: Sequence[Sequence[float | None]], epochs: Sequence[int]) -> TableRow:
    """Cells of the differences at each epoch but 0, and of their mean."""
    cells: TableRow = {f"epoch {e}": Cell.of(seed[k] for seed in seeds) for k, e in enumerate(epochs) if e}
    return {**cells, "area": Cell.of(mean_of(seed[1:]) for seed in seeds)}


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
            place: TableRow = {"setting": setting.name, "model": model}
            lost = "benign drop" if setting.measure.percent else "benign rise"
            if not own:
                found.append({**place, "seed": "", lost: Cell.of([]), "advantage": Cell.of(areas)})
            for seed, made in own.items():
                # Attack seed s meets the model of defense seed s mod their number.
                met = Cell.of(areas[s] for s in range(len(areas)) if s % len(own) == seed)
                found.append({**place, "seed": str(seed), lost: setting.lost_by(made), "advantage": met})
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
    """Compares each model with one of them; seeds share their batches and samples, so much of the noise cancels."""
    rows: list[TableRow] = []
    for setting in settings:
        models = compared[setting.name]
        for model, comparison in models.items():
            if model in (base, SCRATCH) or base not in models:
                continue
            difference = comparison.scores[role_of(model)] - models[base].scores[role_of(base)]
            seeds = [list(map(setting.measure.difference, plain(seed))) for seed in difference]
            row: TableRow = {"setting": setting.name, "model": model, **_over_epochs(seeds, epochs)}
            own, other = ([m.benign for (label, _), m in setting.made.items() if label == one] for one in (model, base))
            if own and len(own) == len(other):
                pairs = zip(own, other, strict=True)
                gaps = [a - b if a is not None and b is not None else None for a, b in pairs]
                row["benign"] = Cell.of(map(setting.benign_measure.difference, gaps))
            rows.append(row)
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
    return Table(title=f"Against {base}", rows=rows, percent=percent, note=note, standard_error=True)


def _immunization(settings: Sequence[SettingScores]) -> Table:
    rows: list[TableRow] = []
    for setting in settings:
        for (label, seed), made in setting.made.items():
            history, losses = made.result.history, made.result.history.get("suppression_loss", [])
            ended = "completed" if made.result.completed else "gave up"
            row: TableRow = {
                "setting": setting.name,
                "defense": label,
                "seed": str(seed),
                "ended": "unchanged" if made.result.changed is False else ended,
                "from": f"reused from {made.reused_from}" if made.reused_from else "here",
                "rounds": Cell.of([len(history.get("iteration", []))]),
                "rollbacks": Cell.of([made.result.rollbacks]),
                "held-out benign": Cell.of([last_known(history.get("benign_score", []))]),
            }
            if losses:
                row |= {
                    "last loss": Cell.of([losses[-1]]),
                    "largest jump": Cell.of([largest_jump(losses)]),
                    "non-finite from": Cell.of([] if (at := first_lost(made.result)) is None else [at]),
                }
            if "gradient_passes" in history:
                row["gradient passes"] = Cell.of([sum(v for v in history["gradient_passes"] if v is not None)])
            rows.append(row)
    note = (
        "For each immunization: its rounds, the rollbacks of the guard, the benign score on the defense's held-out "
        "data, and the suppression loss: the last one, the largest change from one round to the next, and the first "
        "round in which a loss was not finite (a dash: never)."
    )
    return Table(title="How the models were immunized", rows=rows, note=note)


def _figures(
    setting: SettingScores, rows: Sequence[Row], compared: Mapping[str, Comparison], epochs: Sequence[int], prefix: str
) -> dict[str, Figure]:
    axes = {"x_title": "epoch", "y_title": f"{setting.measure.name} on {setting.restricted}"}
    figures: dict[str, Figure] = {}
    attacks = list(dict.fromkeys(r.attack for r in rows if r.model != SCRATCH and r.curves))
    for i, attack in enumerate(attacks if len(attacks) <= LONG else ()):
        own = [row for row in rows if attack in row.covers and row.curves]
        x = sorted({e for row in own for e in row.epochs})
        series = {r.model: [r.cell(e, setting.measure).mean if e in r.epochs else None for e in x] for r in own}
        figures[f"attack_{i}"] = Lines(title=f"{prefix}{attack}", x=list(map(float, x)), series=series, **axes)
    if len(attacks) > 1:
        best = {m: list(map(setting.measure.value, plain(c.scores[role_of(m)].mean(0)))) for m, c in compared.items()}
        title = f"{prefix}Best attack on each model"
        figures["best_attack"] = Lines(title=title, x=list(map(float, epochs)), series=best, **axes)
    return figures | _loss_figures(setting, prefix)


def _loss_figures(setting: SettingScores, prefix: str) -> dict[str, Figure]:
    """One figure for each defense, since a diverging loss would flatten the others."""
    histories = {
        place: made.result.history["suppression_loss"]
        for place, made in setting.made.items()
        if any(v is not None for v in made.result.history.get("suppression_loss", []))
    }
    labels = list(dict.fromkeys(label for label, _ in histories))
    figures: dict[str, Figure] = {}
    for i, label in enumerate(labels):
        own = {seed: history for (name, seed), history in histories.items() if name == label}
        longest = max(map(len, own.values()))
        figures["suppression" + (f"_{i}" if len(labels) > 1 else "")] = Lines(
            title=f"{prefix}Suppression loss" + (f" of {label}" if len(labels) > 1 else ""),
            x_title="round",
            y_title="suppression loss",
            x=[float(k + 1) for k in range(longest)],
            series={
                label if seed == 0 else f"{label}, seed {seed}": [*values, *([None] * (longest - len(values)))]
                for seed, values in own.items()
            },
        )
    return figures
