"""A search for adversaries against each model, with the same number of trials for all."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from holdfast.adversaries import Adversary, Search
from holdfast.auditing.trials import SEARCH_SEED, Trial, TrialContext, TrialRunner
from holdfast.results import ROLES, Curve, Role, SearchTrial
from holdfast.runtime.run import derive_seed


def search(plan: Search, trials: int, runner: TrialRunner) -> tuple[list[SearchTrial], list[Adversary]]:
    """Searches for adversaries against each model separately.

    A search has its own samples and batches, and is scored on every second fold of the test split; the adversaries that
    are repeated afterwards are scored on the other folds. A trial stops at a budget where it is worse than half of the
    trials of earlier batches, unless it is one of the first `unpruned` of the plan.

    Args:
        plan: the search.
        trials: number of trials for each model.
        runner: runs and stores them.

    Returns:
        All trials, and the best few adversaries of each model without duplicates.
    """
    searches = [RoleSearch(role, plan, runner.context) for role in ROLES]
    for done in range(0, trials, plan.batch):
        proposed = [each.propose(min(plan.batch, trials - done)) for each in searches]
        curves = iter(runner.run([t for batch in proposed for t in batch], f"Searching ({done} of {trials} done)"))
        for each, batch in zip(searches, proposed, strict=True):
            each.learn(list(itertools.islice(curves, len(batch))))
    best: dict[str, Adversary] = {}
    for each in searches:
        best |= each.best(plan.repeated)
    return [trial for each in searches for trial in each.marked(plan.repeated)], list(best.values())


class RoleSearch:
    """The search against one model."""

    def __init__(self, role: Role, plan: Search, context: TrialContext) -> None:
        self.role, self.budgets, self.plan = role, len(context.budgets), plan
        self.searcher = plan.begin(derive_seed(context.run.seed, "search", role))
        self.task = context.samples["restricted", SEARCH_SEED]
        self.victim = context.model(role, SEARCH_SEED)
        self.proposed: list[Adversary] = []
        self.reasons: dict[str, str | None] = {}
        self.known: dict[str, Adversary] = {}
        self.trials: list[SearchTrial] = []
        self.curves: list[Curve] = []

    def propose(self, count: int) -> list[Trial]:
        """Returns the trials of new adversaries; those that cannot start, and duplicates in a batch, have none."""
        whole = len(self.trials) + count <= self.plan.unpruned
        self.proposed = self.searcher.ask(count)
        self.reasons = {a.name: a.not_applicable(self.victim, self.task) for a in self.proposed}
        fit = {a.name: a for a in self.proposed if self.reasons[a.name] is None}
        self.known |= fit
        pruning_thresholds = () if whole else _pruning_thresholds(self.curves, self.budgets)
        return [Trial(self.role, a, SEARCH_SEED, pruning_thresholds=pruning_thresholds) for a in fit.values()]

    def learn(self, curves: Sequence[Curve]) -> None:
        """Reports the curves of the last proposals to the search."""
        done = {c.adversary: c for c in curves}
        scores = [
            _value(done[a.name], self.budgets, self.plan.floor) if a.name in done else None for a in self.proposed
        ]
        self.searcher.tell(scores)
        self.curves += curves
        for a, score in zip(self.proposed, scores, strict=True):
            curve = done.get(a.name)
            self.trials.append(
                SearchTrial(
                    role=self.role, number=len(self.trials), adversary=a.name, config=a.config(), score=score,
                    steps=0 if curve is None else curve.budgets[-1],
                    benign_after=None if curve is None else curve.benign_after, confirmed=False,
                    failure=self.reasons[a.name] if curve is None else curve.failure,
                )
            )  # fmt: skip

    def best(self, count: int) -> dict[str, Adversary]:
        """Returns the adversaries with the highest scores, by name."""
        ranked = sorted((t for t in self.trials if t.score is not None), key=lambda t: -(t.score or 0.0))
        return {name: self.known[name] for name in list(dict.fromkeys(t.adversary for t in ranked))[:count]}

    def marked(self, count: int) -> list[SearchTrial]:
        """Returns all trials, with those of the best adversaries marked as confirmed."""
        chosen = self.best(count)
        return [t.model_copy(update={"confirmed": t.adversary in chosen}) for t in self.trials]


def _running_best(curve: Curve) -> list[float]:
    """Best score so far at each budget above 0, on the folds that a search may see."""
    best, running = float("-inf"), []
    for budget, folds in zip(curve.budgets, curve.folds, strict=True):
        if folds is not None:
            best = max(best, statistics.fmean(folds[::2]))
        if budget:
            running.append(best)
    return running


def _value(curve: Curve, budgets: int, floor: float = 0.0) -> float | None:
    """What the search maximises: the best score so far, averaged over budgets; a stopped trial keeps its last one."""
    best = _running_best(curve)
    if not best or best[-1] == float("-inf"):
        return None
    return statistics.fmean(max(b, floor) for b in best + [best[-1]] * (budgets - 1 - len(best)))


def _pruning_thresholds(curves: Sequence[Curve], budgets: int) -> tuple[float | None, ...]:
    """Median at each budget of the trials that reached it; None at budget 0 and for fewer than four trials."""
    thresholds: list[float | None] = [None]
    for k in range(budgets - 1):
        reached = [b[k] for c in curves if len(b := _running_best(c)) > k]
        thresholds.append(statistics.median(reached) if len(reached) >= 4 else None)
    return tuple(thresholds)
