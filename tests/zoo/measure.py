"""What the zoo claims of a sham, measured: its benign score, what plain attacks reach on it, and what its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.adversaries import Adversary
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.runtime.run import Run
from zoo.registry import Case
from zoo.settings import CPU, Setting


@dataclass(frozen=True)
class Best:
    """The best of several attacks: its name, and its best mean score over the seeds at any budget."""

    name: str
    score: float


def best(
    attacks: Sequence[Adversary],
    model: SplitModel,
    setting: Setting,
    seeds: int,
    budgets: Sequence[int] | None = None,
) -> Best:
    """Runs attacks on a model; a budget at which one diverged, or the model's code failed, counts as chance.

    Args:
        attacks: those to run.
        model: the victim.
        setting: with the adversary's data.
        seeds: how many repetitions.
        budgets: steps at which to score; None: all of the setting's.
    """
    found = [
        Best(a.name, _score(a, model, setting, seeds, setting.budgets if budgets is None else budgets))
        for a in attacks
        if not a.not_applicable(model, setting.restricted)
    ]
    return max(found, key=lambda each: each.score, default=Best("none", setting.restricted.audit_chance))


def _score(adversary: Adversary, model: SplitModel, setting: Setting, seeds: int, budgets: Sequence[int]) -> float:
    chance = setting.restricted.audit_chance
    curves: list[list[float]] = []
    for seed in range(seeds):
        try:
            curve = adversary.attack(
                model, setting.few(seed), budgets=budgets, run=Run(0, CPU), seed=seed, benign=setting.benign
            )
            scores = [chance if score is None else score for score in curve.scores]
        except HoldfastError:  # the sham's code fails in training
            scores = []
        curves.append(scores + [chance] * (len(budgets) - len(scores)))
    return max(sum(column) / seeds for column in zip(*curves, strict=True))


@dataclass(frozen=True)
class Measured:
    """Scores of a sham; `share` is the answer's part of what the plain attacks lose.

    Attributes:
        benign: scores of the original and of the sham on the benign task.
        plain: the best plain attack on the original and on the sham.
        answer: the score of the answer.
    """

    benign: tuple[float, float]
    plain: tuple[Best, Best]
    answer: Best

    @property
    def lost(self) -> float:
        """What plain attacks lose by the sham."""
        return self.plain[0].score - self.plain[1].score

    @property
    def share(self) -> float:
        """The part of it that the answer recovers; above 1 if it is better than plain attacks on the original."""
        return (self.answer.score - self.plain[1].score) / self.lost if self.lost else float("nan")


def measure(
    case: Case, on_original: Best, seeds: int, plain: Sequence[Adversary], budgets: Sequence[int] | None = None
) -> Measured:
    """Measures a sham, given plain attacks and the best of them on its original; see `best` for the budgets."""
    benign = case.setting.benign
    return Measured(
        benign=(benign.audit_score(case.original), benign.audit_score(case.model)),
        plain=(on_original, best(plain, case.model, case.setting, seeds, budgets)),
        answer=best([case.sham.answer], case.victim(), case.setting, seeds, budgets),
    )
