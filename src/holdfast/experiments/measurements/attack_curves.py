"""What a protocol attacks with: strategies as a recipe writes them, epochs in steps, and the scratch control."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from holdfast.adversaries import Adversary, FineTuning
from holdfast.models import SplitModel
from holdfast.results import Curve
from holdfast.tasks import Task
from holdfast.training import Gradient, Initialisation, Precision, Scope, Strategy


class AttackSpec(BaseModel):
    """One attack: a fine-tuning strategy; by default the SOPHON paper's (section 5.1.1)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    initialisation: Initialisation = "direct"
    scope: Scope = "all"
    optimizer: str = "momentum"
    learning_rate: float = 1e-4
    batch_size: int = 200
    weight_decay: float = 1e-4
    gradient: Gradient = "raw"
    rank: int = 8
    more_epochs: tuple[int, ...] = Field((), description="Epochs after the protocol's last, for this attack alone.")
    stands_for: str | None = Field(
        None, description="The attack of `paper` that this one takes the place of; null: the one of the same name."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.adversary("float32")
        return self

    def adversary(self, precision: Precision) -> FineTuning:
        """Returns the attack; its random choices derive from its settings, not from the recipe's name for it."""
        settings = self.model_dump(exclude={"more_epochs", "stands_for"})
        return FineTuning(Strategy(**settings, precision=precision))


@dataclass(frozen=True)
class Attack:
    """One attack of a protocol.

    Attributes:
        label: the recipe's name for it.
        adversary: what runs.
        epochs: at which it is scored.
        stands_for: under which name the paper's numbers are found.
    """

    label: str
    adversary: Adversary
    epochs: tuple[int, ...]
    stands_for: str


def in_precision(adversary: Adversary, precision: Precision) -> Adversary:
    """Returns a battery's adversary, its training in another precision, and its name spelled accordingly."""
    if not isinstance(adversary, FineTuning) or adversary.strategy.precision == precision:
        return adversary
    return dataclasses.replace(
        adversary, strategy=dataclasses.replace(adversary.strategy, precision=precision), name=""
    )


def scratch_plan(plan: Sequence[Attack], model: SplitModel, task: Task) -> list[tuple[Attack, tuple[Attack, ...]]]:
    """Returns training from scratch once for all attacks that do the same to fresh weights, and those attacks.

    Whether a model was released plays no part from scratch, so attacks that differ only in where they start are one.
    Training the head alone on random features is no way to train a model, nor is a probe: for them there is none.

    Args:
        plan: the attacks.
        model: whose architecture is trained; its head stays as the architecture initialises it, unless it is for
            another number of classes.
        task: what is learned.
    """
    start: Initialisation = "direct" if model.num_outputs == task.num_outputs else "head"
    groups: dict[FineTuning, list[Attack]] = {}
    for attack in plan:
        adversary = attack.adversary
        if isinstance(adversary, FineTuning) and adversary.strategy.scope != "head":
            strategy = dataclasses.replace(adversary.strategy, initialisation=start)
            groups.setdefault(FineTuning(strategy, burn_in=adversary.burn_in), []).append(attack)
    found = []
    for adversary, covered in groups.items():
        labels = [a.label for a in covered]
        label = " / ".join(labels) if len(labels) <= 3 else f"{labels[0]} and {len(labels) - 1} more"
        epochs = tuple(sorted({e for a in covered for e in a.epochs}))
        found.append((Attack(label, adversary, epochs, covered[0].stands_for), tuple(covered)))
    return found


def steps_per_epoch(samples: int, batch_size: int, cap: int | None = None) -> int:
    """Returns the steps of an epoch: each sample once, the last batch filled up from the next; at most `cap`.

    Example:
        >>> steps_per_epoch(25_000, 200), steps_per_epoch(25_000, 150), steps_per_epoch(25_000, 200, cap=2)
        (125, 167, 2)
    """
    steps = math.ceil(samples / min(batch_size, samples))
    return steps if cap is None else min(steps, cap)


def kept_curve(attack: Attack, seed: int, budgets: tuple[int, ...], task: str, entry: Any) -> Curve:
    """Makes the curve of a trial of its entry in a journal.

    Args:
        attack: that was run.
        seed: which repetition.
        budgets: at which it was scored.
        task: what was learned, as in `Curve.task`.
        entry: of the journal.

    Raises:
        ValueError: if the entry is no curve, or another trial's.
    """
    curve = Curve.model_validate(entry)
    if (curve.adversary, curve.seed, tuple(curve.budgets), curve.task) != (attack.adversary.name, seed, budgets, task):
        raise ValueError(f"it is of {curve.adversary!r} on {curve.task}, seed {curve.seed}, budgets {curve.budgets}")
    return curve


def rescaled(curve: Curve, ratio: float) -> Curve:
    """Returns a curve of 1 - error / chance with a chance that is 1 / `ratio` times as large.

    A guess knows the learner's samples, so that chance is another one for each half and each seed. Errors of several
    seeds have one mean, and can be shown, only if one chance is behind all of their scores.
    """

    def moved(score: float | None) -> float | None:
        return None if score is None else 1 - (1 - score) * ratio

    folds = [None if each is None else [1 - (1 - fold) * ratio for fold in each] for each in curve.folds]
    return curve.model_copy(update={"scores": list(map(moved, curve.scores)), "folds": folds})
