"""Measures how many trials a search needs to undo the sham defenses of the test suite's zoo.

    python benchmarks/search_power.py [--trials 48] [--only NAME ...] [--out PAGE.md]

Compares `adaptive-v1`, `adaptive-v2` and random points of the space of `adaptive-v2`. A sham is undone once the best
trial so far, chosen on half of the test folds and scored on the other half, is within ten points of the best that
`adaptive-v1` finds on the original with all of its trials. The best of `standard-v1` is given beside.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import optuna
import torch

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from zoo import SETTINGS, ZOO, Setting, case  # the zoo belongs to the tests
from zoo.settings import BUDGETS, SHOTS

MARGIN = 0.1
SHOWN = (6, 12, 24, 36, 48)


class Random(Search):
    """Random points of the space."""

    def begin(self, seed: int) -> Searcher:
        """See `Search.begin`."""
        sampler = optuna.samplers.RandomSampler(seed=seed % 2**32)
        return Searcher(optuna.create_study(direction="maximize", sampler=sampler), self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first, second = SEARCHES["adaptive-v1"], SEARCHES["adaptive-v2"]
    plans = {
        "adaptive-v1": first,
        "adaptive-v2": second,
        "random": Random((), batch=second.batch, space=second.space, default=second.default, make=second.make),
    }
    base = {
        norm: best_by_trial(first, zoo_context(SETTINGS[norm].original, SETTINGS[norm]), options.trials)[-1]
        for norm in ("batch", "none")
    }
    print("original:", {norm: round(100 * score) for norm, score in base.items()}, flush=True)
    needed: dict[str, list[int | None]] = {name: [] for name in (*plans, "standard-v1")}
    rows = []
    for name in options.only or [name for name, sham in ZOO.items() if sham.setting in base]:
        built = case(name)
        original, released, setting = built.original, built.model, built.setting
        inside = transplant(released, original) if architecture_differences(released, original) else None
        context = zoo_context(inside or released, setting)
        with context.run.seeded("scratch", 0):
            fresh = original.fresh()
        tasks = {"benign": setting.benign, "restricted": setting.restricted}
        raised = [flag.name for flag in red_flags(released, original, fresh, run=context.run, **tasks)]
        goal = base[built.sham.setting] - MARGIN
        cells = []
        for label, plan in plans.items():
            found = best_by_trial(plan.reading(raised), context, options.trials)
            needed[label].append(next((i + 1 for i, score in enumerate(found) if score >= goal), None))
            cells.append(f"{needed[label][-1] or 'more'} ({100 * found[-1]:.0f})")
        fixed = best_of_battery("standard-v1", context)
        needed["standard-v1"].append(1 if fixed >= goal else None)
        rows.append(f"| {name} | {' | '.join(cells)} | {100 * fixed:.0f} |")
        print(rows[-1], flush=True)
    text = page(options.trials, base, rows, needed)
    print(text)
    if options.out:
        options.out.write_text(text)


def zoo_context(model: SplitModel, setting: Setting) -> TrialContext:
    """What trials of the zoo share; few steps, as in the other measurements of the zoo."""
    run = Run(quiet=True)
    few = {("restricted", SEARCH_SEED): setting.few(derive_seed(run.seed, "shots", SEARCH_SEED))}
    return TrialContext(model, setting.original, None, few, setting.benign, setting.budgets, run)


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
    curves = [context.curve(Trial("immunized", a, SEARCH_SEED)) for a in fit]
    return unseen(max(curves, key=lambda curve: best_on(curve, 0)))


def best_on(curve: Curve, first: int) -> float:
    """The best score at any budget on every second fold, from the first or the second on."""
    scored = [statistics.fmean(folds[first::2]) for folds in curve.folds[1:] if folds is not None]
    return max(scored, default=0.0)


def unseen(curve: Curve) -> float:
    return best_on(curve, 1)


def page(trials: int, base: dict[str, float], rows: list[str], needed: dict[str, list[int | None]]) -> str:
    """The page."""
    shown = [n for n in SHOWN if n <= trials]
    shares = [
        f"| {label} | "
        + " | ".join(f"{sum(n is not None and n <= limit for n in found)}" for limit in shown)
        + f" | of {len(found)} |"
        for label, found in needed.items()
        if label != "standard-v1"
    ]
    fixed = sum(n is not None for n in needed["standard-v1"])
    goals = ", ".join(f"{100 * score:.0f} % ({norm})" for norm, score in base.items())
    return "\n".join(
        [
            "# Sham defenses, searched",
            "",
            f"How many sham defenses of `tests/zoo` a search undoes, by its trials. {SHOTS} samples a",
            f"class, {BUDGETS[-1]} steps, one seed. A sham is undone if the best trial so far is within",
            f"{100 * MARGIN:.0f} points of the best of `adaptive-v1` on the original: {goals}.",
            "",
            f"| search | {' | '.join(f'{n} trials' for n in shown)} | |",
            f"|---|{'---|' * (len(shown) + 1)}",
            *shares,
            "",
            f"`standard-v1`, which has {len(BATTERIES['standard-v1'])} adversaries, undoes {fixed} of {len(rows)}.",
            "",
            "Trials until each sham was undone, and in brackets the best after all of them in %:",
            "",
            "| sham | adaptive-v1 | adaptive-v2 | random | standard-v1, best in % |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Made by `benchmarks/search_power.py`; verdicts are by `benchmarks/shams.py`.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
