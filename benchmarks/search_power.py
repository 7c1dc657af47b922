"""Measures how many trials a search needs to undo shams of the test suite's zoo, and to recover what defenses took.

    python benchmarks/search_power.py ROWS.jsonl [--trials 48] [--runs RUN ... --data DIR] [--part 1/2]
    python benchmarks/search_power.py ROWS.jsonl --out PAGE.md

Compares `adaptive-v1`, `adaptive-v2`, random points of the space of `adaptive-v2`, and batteries. A score is that of
the best trial so far, chosen on half of the test folds and scored on the other half. Each victim is a line of
ROWS.jsonl, and one that is there is not done again; `--runs` are finished runs of the recipe trajectory-erasure/mnist.

- A sham is undone once the score is within ten points of the best that `adaptive-v1` finds on the original with all of
  its trials.
- Of a defended model the points above a fresh network count: above the best that `adaptive-v1` finds on that.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from victims import defended, mnist, zoo

from holdfast.adversaries import BATTERIES, SEARCHES, Search
from holdfast.adversaries.search_space import Searcher
from holdfast.auditing.red_flags import red_flags
from holdfast.auditing.search import RoleSearch
from holdfast.auditing.trials import SEARCH_SEED, Trial, TrialContext, TrialRunner
from holdfast.models import SplitModel, architecture_differences, transplant
from holdfast.results import Curve
from holdfast.runtime import executors
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run, derive_seed
from holdfast.tasks import Task

MARGIN = 0.1
SHOWN = (6, 12, 24, 36, 48)
FIXED = ("quick-v2", "standard-v1", "standard-v2")
KINDS = {"sham": "shams", "held out": "shams that no battery was chosen with", "real": "defended models"}
Row = dict[str, Any]


class Random(Search):
    """Random points of the space."""

    def begin(self, seed: int) -> Searcher:
        """See `Search.begin`."""
        sampler = optuna.samplers.RandomSampler(seed=seed % 2**32)
        return Searcher(optuna.create_study(direction="maximize", sampler=sampler), self)


def searches() -> dict[str, Search]:
    """What is compared, by name."""
    first, second = SEARCHES["adaptive-v1"], SEARCHES["adaptive-v2"]
    points = Random((), batch=second.batch, space=second.space, default=second.default, make=second.make)
    return {"adaptive-v1": first, "adaptive-v2": second, "random": points}


@dataclass(frozen=True)
class Target:
    """A model to attack, and what the adversary has.

    Attributes:
        name: of a sham, or of a defense.
        kind: of `KINDS`.
        like: name of the tasks and the original, which several targets have in common.
        build: makes the model; inside the original's code if its own code is another one.
        original: what it was made from.
        benign: the original's task.
        restricted: the adversary's half.
        shots: samples a class.
        budgets: steps.
    """

    name: str
    kind: str
    like: str
    build: Callable[[], SplitModel]
    original: SplitModel
    benign: Task
    restricted: Task
    shots: int
    budgets: tuple[int, ...]

    def context(self, model: SplitModel) -> TrialContext:
        """What trials against a model share."""
        run = Run(quiet=True)
        few = self.restricted.few_shot(self.shots, derive_seed(run.seed, "shots", SEARCH_SEED))
        return TrialContext(
            model, self.original, None, {("restricted", SEARCH_SEED): few}, self.benign, self.budgets, run
        )


def targets(runs: list[Path], data: Path | None) -> Iterator[Target]:
    """Shams of images, and defended models."""
    for name, row in zoo.ZOO.items():
        if row.domain == "vision":
            setting = zoo.SETTINGS[row.setting]
            yield Target(
                name, "held out" if row.held_out else "sham", row.setting, lambda name=name: _inside(name),
                setting.original, setting.benign, setting.restricted, setting.shots, setting.budgets,
            )  # fmt: skip
    real = [*defended(), *mnist(runs, data)]
    originals = {"batch": zoo.SETTINGS["batch"].original}
    for victim in real:
        if victim.name == "control: original, MNIST":
            originals["MNIST"] = victim.model
        if victim.name.startswith("real: "):
            like = "MNIST" if "MNIST" in victim.name else "batch"
            yield Target(
                victim.name.removeprefix("real: "), "real", like, lambda model=victim.model: model, originals[like],
                victim.benign, victim.restricted, victim.shots, victim.budgets,
            )  # fmt: skip


def _inside(name: str) -> SplitModel:
    """A sham, or its weights inside the original's code where these fit."""
    case = zoo.case(name)
    inside = transplant(case.model, case.original) if architecture_differences(case.model, case.original) else None
    return inside or case.model


def measured(target: Target, trials: int) -> Row:
    """The best so far of each search, and the best of each battery."""
    model = target.build()
    context = target.context(model)
    with context.run.seeded("scratch", 0):
        fresh = target.original.fresh()
    tasks = {"benign": target.benign, "restricted": target.restricted}
    raised = [flag.name for flag in red_flags(model, target.original, fresh, run=context.run, **tasks)]
    found = {label: best_by_trial(plan.reading(raised), context, trials) for label, plan in searches().items()}
    fixed = {name: best_of_battery(name, context) for name in FIXED}
    return {"name": target.name, "kind": target.kind, "like": target.like, "found": found, "fixed": fixed}


def controls(target: Target, trials: int) -> Row:
    """The best on the original and on a fresh network."""
    search, context = SEARCHES["adaptive-v1"], target.context(target.original)
    with context.run.seeded("scratch", 0):
        fresh = target.original.fresh()
    best = {
        role: best_by_trial(search, target.context(model), trials)[-1]
        for role, model in (("original", target.original), ("scratch", fresh))
    }
    return {"name": target.like, "kind": "controls", **best}


def best_by_trial(plan: Search, context: TrialContext, trials: int) -> list[float]:
    """The score on unseen folds of the best trial so far, after each trial."""
    search, runner = (
        RoleSearch("immunized", plan, context),
        TrialRunner(context, Journal(None, {}, "audit"), executors.executor("serial")),
    )
    for done in range(0, trials, plan.batch):
        search.learn(runner.run(search.propose(min(plan.batch, trials - done)), ""))
    curves = {c.adversary: c for c in search.curves}
    found, best, score = [], float("-inf"), 0.0
    for trial in search.trials:
        if trial.score is not None and trial.score > best:
            best, score = trial.score, unseen(curves[trial.adversary])
        found.append(score)
    return found


def best_of_battery(name: str, context: TrialContext) -> float:
    """The same for a battery: chosen on half of the folds, scored on the other half."""
    model, task = context.model("immunized", SEARCH_SEED), context.samples["restricted", SEARCH_SEED]
    fit = [a for a in BATTERIES[name] if a.not_applicable(model, task) is None]
    runner = TrialRunner(context, Journal(None, {}, "audit"), executors.executor("serial"))
    curves = runner.run([Trial("immunized", a, SEARCH_SEED) for a in fit], "")
    return unseen(max(curves, key=lambda curve: best_on(curve, 0)))


def best_on(curve: Curve, first: int) -> float:
    """The best score at any budget on every second fold, from the first or the second on."""
    scored = [statistics.fmean(folds[first::2]) for folds in curve.folds[1:] if folds is not None]
    return max(scored, default=0.0)


def unseen(curve: Curve) -> float:
    """The best score on the folds with which nothing was chosen."""
    return best_on(curve, 1)


def needed(row: Row, base: Row, label: str) -> int | None:
    """Trials until a sham is undone; 1 for a battery that undoes it; None: it is not undone."""
    goal = base["original"] - MARGIN
    scores = row["found"].get(label) or [row["fixed"][label]]
    return next((i + 1 for i, score in enumerate(scores) if score >= goal), None)


def points(score: float, base: Row) -> float:
    """How far a score is above the best on a fresh network."""
    return 100 * (score - base["scratch"])


def page(rows: list[Row]) -> str:
    """The page."""
    base = {row["name"]: row for row in rows if row["kind"] == "controls"}
    trials = max(len(found) for row in rows for found in row.get("found", {}).values())
    sections = [
        "# How much searches find",
        "",
        "Made by `benchmarks/search_power.py`. One seed; the samples and steps of each setting. Weights that fit are",
        "attacked inside the original's code. A score is that of the best trial so far, chosen on half of the test",
        f"folds and scored on the other half. A sham is undone once it is within {100 * MARGIN:.0f} points of the best",
        "of `adaptive-v1` on the original. Of a defended model the points above a fresh network count, on which",
        f"`adaptive-v1` has as many trials ({trials}).",
    ]
    for kind, title in KINDS.items():
        own = [row for row in rows if row["kind"] == kind]
        if own:
            sections += ["", f"## {len(own)} {title}", "", *_summary(own, base, trials), "", *_each(own, base, trials)]
    return "\n".join(sections) + "\n"


def _summary(rows: list[Row], base: dict[str, Row], trials: int) -> list[str]:
    """By trials, how many shams are undone, or the mean points above a fresh network."""
    shown = [n for n in SHOWN if n <= trials]
    real = rows[0]["kind"] == "real"

    def cell(label: str, limit: int) -> str:
        if real:
            scores = [(r["found"][label][limit - 1] if label in r["found"] else r["fixed"][label], r) for r in rows]
            return f"{statistics.fmean(points(score, base[r['like']]) for score, r in scores):+.1f}"
        counts = [needed(row, base[row["like"]], label) for row in rows]
        return str(sum(n is not None and n <= limit for n in counts))

    what = "points above a fresh network, mean, after" if real else "undone after"
    lines = [f"| {what} | {' | '.join(f'{n} trials' for n in shown)} |", f"|---|{'---|' * len(shown)}"]
    lines += [f"| `{label}` | {' | '.join(cell(label, n) for n in shown)} |" for label in rows[0]["found"]]
    batteries = "; ".join(f"`{label}` ({len(BATTERIES[label])}): {cell(label, trials)}" for label in rows[0]["fixed"])
    more = []
    if real:
        mean = statistics.fmean(points(base[r["like"]]["original"], base[r["like"]]) for r in rows)
        more = [f"The originals themselves are {mean:+.1f} points above, on average."]
    return [*lines, "", f"Batteries, with their number of adversaries: {batteries}.", *more]


def _each(rows: list[Row], base: dict[str, Row], trials: int) -> list[str]:
    """One line a victim."""
    labels, fixed = [*rows[0]["found"]], [*rows[0]["fixed"]]
    real = rows[0]["kind"] == "real"
    controls = ["scratch", "original"] if real else []
    first = (
        "The best score of all trials, in %" if real else "Trials until it is undone, and the best score of all in %"
    )
    columns = " | ".join([f"`{n}`" for n in (*labels, *fixed)] + controls)
    lines = [first + ":", "", f"| | {columns} |", f"|---|{'---|' * (len(labels) + len(fixed) + len(controls))}"]
    for row in rows:
        own = base[row["like"]]
        scores = {n: row["found"][n][trials - 1] if n in labels else row["fixed"][n] for n in (*labels, *fixed)}
        if real:
            cells = [f"{100 * score:.0f}" for score in (*scores.values(), *(own[c] for c in controls))]
        else:
            cells = [f"{needed(row, own, n) or 'more'} ({100 * scores[n]:.0f})" for n in labels]
            cells += [f"{100 * scores[n]:.0f}{'' if needed(row, own, n) else ', not undone'}" for n in fixed]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="finished runs of trajectory-erasure/mnist")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--part", default="1/1", help="such as 1/2: this half of the victims")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    if options.out:
        options.out.write_text(page(rows))
        return
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = {(row["kind"], row["name"]) for row in rows}
    at, of = map(int, options.part.split("/"))
    chosen = [t for t in targets(options.runs, options.data) if not options.only or t.name in options.only]
    for target in chosen[at - 1 :: of]:
        for key, measure in ((("controls", target.like), controls), ((target.kind, target.name), measured)):
            if key not in known:
                row = measure(target, options.trials)
                known.add(key)
                with options.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(*key, flush=True)


if __name__ == "__main__":
    main()
