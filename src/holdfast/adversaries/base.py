"""The contract of an adversary: authors write `run`; the framework copies, counts steps and scores."""

from __future__ import annotations

import copy
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, both_splits
from holdfast.results import Curve, Role
from holdfast.runtime.run import Run
from holdfast.tasks import Task


class Adversary(ABC):
    """One way to fine-tune a released model.

    Attributes:
        name: unique in its battery.
        batch_size: samples a step, so that curves can be read in samples.
        frozen_body: whether only the head learns. The framework then computes every feature once, in float64, and hands
            over a model that is a head alone and a task whose inputs are the features.
    """

    name: str
    batch_size: int
    frozen_body: ClassVar[bool] = False

    @property
    def trains_head_in_place(self) -> bool:
        """Whether the head in the end is the released one, trained: then it may still know the benign task."""
        return False

    @abstractmethod
    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        """Trains `model` in place, for ever: yields once where it starts from, then after every step.

        Args:
            model: a copy that belongs to this adversary.
            task: what it may learn from; its training split only.
            benign: the model's own task, for who wants to mix in its training data; None if there is none to be had.
            generator: for its random choices; torch's global generators are seeded as well.
            device: where model and data are.

        Yields:
            First a scalar that is ignored, then the training loss of each step, detached.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Returns every setting: what somebody needs to repeat this attack."""

    def not_applicable(self, model: SplitModel, task: Task) -> str | None:
        """Says why this adversary cannot start on a model and a task, or None if it can."""
        return None

    @final
    def attack(
        self,
        model: SplitModel,
        task: Task,
        *,
        budgets: Sequence[int],
        run: Run,
        role: Role = "immunized",
        seed: int = 0,
        benign: Task | None = None,
        pruning_thresholds: Sequence[float | None] = (),
        keep: Callable[[SplitModel], object] | None = None,
        score_benign: bool = False,
    ) -> Curve:
        """Runs the adversary against a copy of a model and scores it at every budget.

        An adversary never declares its own success: scores are computed here, on the test split. Random choices depend
        on the run's seed, the adversary and `seed`, not on the role: the controls see the same batches.

        Args:
            model: the released model; left as it is.
            task: the restricted task with the adversary's training data.
            budgets: steps at which to score, ascending; 0 is the adversary's starting point.
            run: seed and device.
            role: whose curve this is.
            seed: repetition.
            benign: the model's own task, whose training data the adversary may use.
            pruning_thresholds: a score for each budget, below which the attack is given up; None, or none given: never.
                The score on every second fold is compared, as a search sees it.
            keep: is given the attacked copy in the end, for who wants more of it than scores.
            score_benign: whether `benign` is scored in the end, see `benign_score_after`.

        Returns:
            Scores and mean training losses at the budgets, up to the one at which it was given up.
        """
        if score_benign and benign is None:
            raise HoldfastError(f"{self.name}: the benign score after the attack needs the benign task (`benign`).")
        victim = model.clone().to(run.device)
        keep_head(victim)
        if self.frozen_body:
            victim, task = _head_on_features(victim, task)
        trace = Trace()
        since: list[Tensor] = []
        with run.seeded("attack", self.name, seed) as generator:
            work = self.run(victim, task, benign=benign, generator=generator, device=run.device)
            for step, loss in enumerate(work):
                if step:
                    since.append(loss)
                if step in budgets:
                    trace.note(task.audit_outcomes(victim), torch.stack(since) if since else None)
                    since = []
                    floor = pruning_thresholds[len(trace.scores) - 1] if pruning_thresholds else None
                    if floor is not None and _seen(trace.folds[-1]) < floor:
                        break
                if step >= budgets[-1]:
                    break
            # Last of all, so that whatever foreign code draws here changes no score.
            after = benign_score_after(self, model, victim, benign) if score_benign and benign else None
        if keep is not None:
            keep(victim)
        return trace.curve(self, task, role, seed, budgets, after)

    @final
    def flops_per_step(self, model: SplitModel, task: Task, *, run: Run, benign: Task | None = None) -> float | None:
        """Counts the floating-point operations of the first step; None if torch cannot count one of them.

        Convolutions, matrix products and attention count; element-wise work, optimizers and decompositions do not.
        """
        victim = model.clone().to(run.device)
        if self.frozen_body:
            victim, task = _head_on_features(victim, task)
        with run.seeded("attack", self.name, 0) as generator, FlopCounterMode(display=False) as counter:
            work = self.run(victim, task, benign=benign, generator=generator, device=run.device)
            try:
                next(work)
                before = counter.get_total_flops()
                next(work)
            except (RuntimeError, NotImplementedError):
                return None
            return float(counter.get_total_flops() - before)


@dataclass
class Trace:
    """What an attack has reached so far: scores, by fold as well, and losses, at each budget."""

    scores: list[float | None] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    folds: list[list[float] | None] = field(default_factory=list)

    def note(self, outcomes: Tensor, losses: Tensor | None) -> None:
        """Adds a budget.

        Args:
            outcomes: the task's `audit_outcomes` of the model there.
            losses: training losses of the steps since the budget before; None if there were none.
        """
        score = _finite(float(outcomes.mean()))
        self.scores.append(score)
        self.folds.append(by_fold(outcomes) if score is not None else None)
        self.losses.append(_finite(float(losses.mean())) if losses is not None else None)

    def curve(
        self,
        adversary: Adversary,
        task: Task,
        role: Role,
        seed: int,
        budgets: Sequence[int],
        benign_after: float | None = None,
    ) -> Curve:
        """Returns the curve of an attack that may have ended before its last budget."""
        return Curve(
            adversary=adversary.name, role=role, seed=seed, budgets=list(budgets[: len(self.scores)]),
            scores=self.scores, losses=self.losses, folds=self.folds,
            batch_size=min(adversary.batch_size, task.size("train")), benign_after=benign_after,
        )  # fmt: skip


_KEPT = "_kept_head"


def keep_head(model: SplitModel) -> None:
    """Notes the head as it is now, as the one that an attacker can put back; see `benign_score_after`.

    An adversary that changes what the head gets without changing the outputs (a map before it, other scales) calls it
    again when that is done, and before it trains or replaces the head.
    """
    # Past nn.Module, which would make a layer of it that optimizers see.
    model.__dict__[_KEPT] = copy.deepcopy(model.head).requires_grad_(False)


def benign_score_after(adversary: Adversary, released: SplitModel, attacked: SplitModel, benign: Task) -> float | None:
    """Returns the benign score that somebody has who attacked a model.

    The attacked body is scored with the head that the model was released with, which the attacker can always keep. If
    the attack trained that head in place, the network as it is may be better: then the better of the two counts. An
    attack that leaves the body alone leaves the benign score alone.

    Args:
        adversary: who attacked.
        released: the model before the attack.
        attacked: the copy that was attacked; left as it is.
        benign: the model's own task.

    Returns:
        The score on its test split; None if it is not finite, or the model's code cannot be scored any more.
    """
    try:
        if adversary.frozen_body:
            return _finite(benign.audit_score(released.clone().to(attacked.device)))
        found = [_finite(benign.audit_score(attacked))] if adversary.trains_head_in_place else []
        own, kept = attacked.head, attacked.__dict__[_KEPT]
        attacked.put_head(kept)
        try:
            found.append(_finite(benign.audit_score(attacked)))
        finally:
            attacked.put_head(own)
    except Exception:  # the model's code is anybody's; the curve that it has up to here counts all the same
        return None
    return max((score for score in found if score is not None), default=None)


FOLDS = 20
"""Parts of the test split whose scores are kept apart, so that selection and scoring need not share samples."""


def by_fold(outcomes: Tensor) -> list[float]:
    """Returns the mean of each fold; which sample is in which depends on the number of samples alone.

    Args:
        outcomes: shape (N,), one number a sample.

    Returns:
        `FOLDS` means of folds that differ by at most one sample in size; N means if there are fewer samples.

    Example:
        >>> len(by_fold(torch.rand(100))), len(by_fold(torch.rand(7)))
        (20, 7)
    """
    order = torch.randperm(len(outcomes), generator=torch.Generator().manual_seed(0))
    return [float(outcomes[order[k::FOLDS]].mean()) for k in range(min(FOLDS, len(outcomes)))]


def _seen(folds: list[float] | None) -> float:
    return -math.inf if folds is None else statistics.fmean(folds[::2])


def _head_on_features(model: SplitModel, task: Task) -> tuple[SplitModel, Task]:
    """A fresh head, all zero, and the task it sees."""
    train, test = both_splits(model, task)
    head = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, train.shape[1], task.num_outputs, dtype=train.dtype, device=train.device
    )
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return SplitModel(nn.Sequential(head), "0", name=model.name), task.with_inputs(train, test)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
