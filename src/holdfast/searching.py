"""Running a search for adversaries against each model, with the same number of trials for all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from holdfast.adversaries import Adversary, Search
from holdfast.execution import Journal, derive_seed
from holdfast.results import ROLES, Curve, Role, SearchTrial
from holdfast.trials import SEARCH_SEED, Bench, Trial, run_trials


def search(plan: Search, trials: int, bench: Bench, journal: Journal) -> tuple[list[SearchTrial], list[Adversary]]:
    """Searches for adversaries against each model by itself.

    A search has samples and batches of its own, and sees every second fold of the test split only: what is repeated
    afterwards is scored on others. A trial is given up where, at a budget, it is worse than half of the trials
    before its batch.

    Args:
        plan: what is searched, and how.
        trials: for each model.
        bench: models and data.
        journal: keeps every finished trial.

    Returns:
        All trials, and the best few of each model without repetitions.
    """
    found: list[SearchTrial] = []
    best: dict[str, Adversary] = {}
    for role in ROLES:
        mine, adversaries = _against(role, plan, trials, bench, journal)
        ranked = sorted((t for t in mine if t.score is not None), key=lambda t: -(t.score or 0.0))
        chosen = list(dict.fromkeys(t.adversary for t in ranked))[: plan.repeated]
        best |= {name: adversaries[name] for name in chosen}
        found += [t.model_copy(update={"confirmed": t.adversary in chosen}) for t in mine]
    return found, list(best.values())


def _against(
    role: Role, plan: Search, trials: int, bench: Bench, journal: Journal
) -> tuple[list[SearchTrial], dict[str, Adversary]]:
    searcher = plan.begin(derive_seed(bench.run.seed, "search", role))
    task = bench.samples["restricted", SEARCH_SEED]
    victim = bench.model(role, SEARCH_SEED)
    known: dict[str, Adversary] = {}
    found: list[SearchTrial] = []
    curves: list[Curve] = []
    while len(found) < trials:
        proposed = searcher.ask(min(plan.batch, trials - len(found)))
        fit = {a.name: a for a in proposed if a.not_applicable(victim, task) is None}
        known |= fit
        floors = _floors(curves, len(bench.budgets))
        batch = [Trial(role, a, SEARCH_SEED, floors=floors) for a in fit.values()]
        title = f"Searching, {role}, {len(found) + 1} to {len(found) + len(proposed)} of {trials}"
        done = {c.adversary: c for c in run_trials(batch, bench, journal, title)}
        scores = [_value(done[a.name], len(bench.budgets)) if a.name in done else None for a in proposed]
        searcher.tell(scores)
        curves += done.values()
        for a, score in zip(proposed, scores, strict=True):
            steps = done[a.name].budgets[-1] if a.name in done else 0
            found.append(
                SearchTrial(
                    role=role, number=len(found), adversary=a.name, config=a.config(), score=score, steps=steps,
                    confirmed=False,
                )
            )  # fmt: skip
    return found, known


def _running_best(curve: Curve) -> list[float]:
    """Best so far at each budget above 0, on the folds that a search may see."""
    best, found = float("-inf"), []
    for budget, folds in zip(curve.budgets, curve.folds, strict=True):
        if folds is not None:
            best = max(best, statistics.fmean(folds[::2]))
        if budget:
            found.append(best)
    return found


def _value(curve: Curve, budgets: int) -> float | None:
    """What the search maximises: best so far, averaged over budgets; one that was given up keeps its last value."""
    best = _running_best(curve)
    if not best or best[-1] == float("-inf"):
        return None
    return statistics.fmean([max(b, 0.0) for b in best] + [max(best[-1], 0.0)] * (budgets - 1 - len(best)))


def _floors(curves: Sequence[Curve], budgets: int) -> tuple[float | None, ...]:
    """The median at each budget of those that got there; the first budget, 0, and few trials give none."""
    found: list[float | None] = [None]
    for k in range(budgets - 1):
        there = [b[k] for c in curves if len(b := _running_best(c)) > k]
        found.append(statistics.median(there) if len(there) >= 4 else None)
    return tuple(found)
