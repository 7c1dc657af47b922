"""The contract of an adversary: its author writes `run`; the framework copies the model, counts steps and scores."""

from __future__ import annotations

import copy
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Final, Self, final

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError, unknown
from holdfast.models import SplitModel, both_splits
from holdfast.results import Curve, Role
from holdfast.runtime.registry import Registry
from holdfast.runtime.run import Run
from holdfast.tasks import Task
from holdfast.training import Strategy


class Adversary(ABC):
    """One way to fine-tune a released model.

    Attributes:
        name: unique in its battery.
        batch_size: samples per step, so that curves can be read in samples.
        frozen_body: whether only the head is trained. The framework then computes every feature once, in float64, and
            passes `run` a model that is only a head, and a task whose inputs are the features.
    """

    name: str
    batch_size: int
    frozen_body: ClassVar[bool] = False

    @property
    def trains_head_in_place(self) -> bool:
        """Whether the attack trains the released head, which may then still solve the benign task."""
        return False

    @abstractmethod
    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        """Trains `model` in place, endlessly: yields once before the first step, then after every step.

        Args:
            model: a copy that this adversary may change.
            task: the restricted task; only its training split may be used.
            benign: the model's own task, whose training data may be mixed in; None if it is not available.
            generator: for random choices; torch's global generators are seeded as well.
            device: where model and data are.

        Yields:
            First a scalar that is ignored, then the training loss of each step, detached.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Returns every setting that the attack depends on, and as `kind` the registered name of the class."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Returns the adversary that has this `config`; works for dataclasses whose fields are the settings.

        Raises:
            HoldfastError: for an unknown setting or value.
        """
        if not is_dataclass(cls):
            raise HoldfastError(f"{cls.__name__} cannot be built from its settings; give the class a `from_config`.")
        known = [f.name for f in fields(cls) if f.init]
        for key in config:
            if key not in (*known, "kind"):
                raise unknown(f"setting of {cls.__name__}", key, known)
        return cls(**{key: value for key, value in config.items() if key != "kind"})

    def not_applicable(self, model: SplitModel, task: Task) -> str | None:
        """Returns why this adversary cannot start on a model and a task, or None if it can."""
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
        after_step: Callable[[], object] | None = None,
    ) -> Curve:
        """Runs the adversary against a copy of a model and scores it at every budget.

        Scores are computed here, on the test split; an adversary cannot report its own. Random choices depend on the
        run's seed, the adversary and `seed`, but not on the role: the controls get the same batches.

        Args:
            model: the released model; not changed.
            task: the restricted task with the adversary's training data.
            budgets: steps at which to score, ascending; 0 is the adversary's starting point.
            run: seed and device.
            role: role of `model` in the audit.
            seed: number of the repetition.
            benign: the model's own task, whose training data the adversary may use.
            pruning_thresholds: for each budget, the score below which the attack stops early; None: it never does.
                The score on every second fold is compared, as in a search.
            keep: called with the attacked copy at the end, to save or measure more than scores.
            score_benign: whether `benign` is scored at the end, see `benign_score_after`.
            after_step: called after each step, to show progress.

        Returns:
            Scores and mean training losses at the budgets, up to the one at which the attack stopped.
        """
        if score_benign and benign is None:
            raise HoldfastError(f"{self.name}: the benign score after the attack needs the benign task (`benign`).")
        victim, task = self._prepared(model, task, run.device)
        trace = Trace()
        with run.seeded("attack", self.name, seed) as generator:
            losses = self.run(victim, task, benign=benign, generator=generator, device=run.device)
            losses = losses if after_step is None else _counted(losses, after_step)
            trace.follow(losses, lambda: task.audit_outcomes(victim), budgets, pruning_thresholds)
            # This comes last, so that random draws of the model's own code change no score.
            after = benign_score_after(self, model, victim, benign) if score_benign and benign else None
        if keep is not None:
            keep(victim)
        return trace.curve(self, task, role, seed, budgets, after)

    @final
    def flops_per_step(self, model: SplitModel, task: Task, *, run: Run, benign: Task | None = None) -> float | None:
        """Counts the floating-point operations of the first step; None if torch cannot count one of them.

        Convolutions, matrix products and attention count; element-wise work, optimizers and decompositions do not.
        """
        from torch.utils.flop_counter import FlopCounterMode  # slow to import, and few audits count operations

        victim, task = self._prepared(model, task, run.device)
        with run.seeded("attack", self.name, 0) as generator, FlopCounterMode(display=False) as counter:
            work = self.run(victim, task, benign=benign, generator=generator, device=run.device)
            try:
                next(work)
                before = counter.get_total_flops()
                next(work)
            except (RuntimeError, NotImplementedError):
                return None
            return float(counter.get_total_flops() - before)

    def _prepared(self, model: SplitModel, task: Task, device: torch.device) -> tuple[SplitModel, Task]:
        """Returns a copy of the model and the task that the copy is trained on."""
        victim = model.clone().to(device).eval()  # independent of the caller's mode, so that a replay is the same
        keep_head(victim)
        return _head_on_features(victim, task) if self.frozen_body else (victim, task)


def _counted(losses: Iterator[Tensor], after_step: Callable[[], object]) -> Iterator[Tensor]:
    for step, loss in enumerate(losses):
        if step:
            after_step()
        yield loss


@dataclass
class Trace:
    """Score, scores of the folds and training loss of an attack at each budget so far."""

    scores: list[float | None] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    folds: list[list[float] | None] = field(default_factory=list)

    def follow(
        self,
        losses: Iterator[Tensor],
        outcomes: Callable[[], Tensor],
        budgets: Sequence[int],
        thresholds: Sequence[float | None] = (),
    ) -> None:
        """Runs an attack to its last budget, or to the first budget at which its score is below the threshold.

        Args:
            losses: what `Adversary.run` yields.
            outcomes: returns the task's `audit_outcomes` for the current model.
            budgets: steps at which to score, ascending.
            thresholds: see `pruning_thresholds` of `Adversary.attack`.
        """
        since: list[Tensor] = []
        for step, loss in enumerate(losses):
            if step:
                since.append(loss)
            if step in budgets:
                self.note(outcomes(), torch.stack(since) if since else None)
                since = []
                folds, threshold = self.folds[-1], thresholds[len(self.scores) - 1] if thresholds else None
                seen_by_search = -math.inf if folds is None else statistics.fmean(folds[::2])
                if threshold is not None and seen_by_search < threshold:
                    return
            if step >= budgets[-1]:
                return

    def note(self, outcomes: Tensor, losses: Tensor | None) -> None:
        """Adds a budget.

        Args:
            outcomes: the task's `audit_outcomes` of the model there.
            losses: training losses of the steps since the previous budget; None if there were none.
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
    """Keeps a copy of the current head, with which the benign task can be scored later; see `benign_score_after`.

    An adversary that changes the inputs of the head but not its outputs (by a map before it, or other scales) must call
    this again afterwards, before it trains or replaces the head.
    """
    # Not as an attribute: nn.Module would make it a layer, which optimizers see.
    model.__dict__[_KEPT] = copy.deepcopy(model.head).requires_grad_(False)


def benign_score_after(adversary: Adversary, released: SplitModel, attacked: SplitModel, benign: Task) -> float | None:
    """Returns the benign score of a model after an attack.

    The attacked body is scored with the head of the released model, which the adversary can always keep. If the attack
    trained that head in place, the attacked network is scored too, and the better of the two counts. An attack on a
    frozen body does not change the benign score.

    Args:
        adversary: the adversary that ran.
        released: the model before the attack.
        attacked: the copy that was attacked; not changed.
        benign: the model's own task.

    Returns:
        The score on its test split; None if it is not finite, or the model's code fails.
    """
    try:
        if adversary.frozen_body:
            return _finite(benign.audit_score(released.clone().to(attacked.device)))
        scores = [_finite(benign.audit_score(attacked))] if adversary.trains_head_in_place else []
        own, kept = attacked.head, attacked.__dict__[_KEPT]
        attacked.put_head(kept)
        try:
            scores.append(_finite(benign.audit_score(attacked)))
        finally:
            attacked.put_head(own)
    except Exception:  # code of another package may raise anything; the curve is valid without this score
        return None
    return max((score for score in scores if score is not None), default=None)


FOLDS = 20
"""Parts of the test split with separate scores, so that selection and scoring can use different samples."""


def by_fold(outcomes: Tensor) -> list[float]:
    """Returns the mean of each fold; which sample is in which fold depends only on the number of samples.

    Args:
        outcomes: shape (N,), one number per sample.

    Returns:
        `FOLDS` means of folds that differ by at most one sample in size; N means if there are fewer samples.

    Example:
        >>> len(by_fold(torch.rand(100))), len(by_fold(torch.rand(7)))
        (20, 7)
    """
    order = torch.randperm(len(outcomes), generator=torch.Generator().manual_seed(0))
    return [float(outcomes[order[k::FOLDS]].mean()) for k in range(min(FOLDS, len(outcomes)))]


def _head_on_features(model: SplitModel, task: Task) -> tuple[SplitModel, Task]:
    """Returns a head of zeros, and the task whose inputs are the features."""
    train, test = both_splits(model, task)
    head = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, train.shape[1], task.num_outputs, dtype=train.dtype, device=train.device
    )
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return SplitModel(nn.Sequential(head), "0", name=model.name), task.with_inputs(train, test)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class StrategyAdversary(Adversary):
    """An adversary that does something beside fine-tuning by a strategy: its settings are the strategy's and its own.

    A subclass is a frozen dataclass with further fields before `name`. It sets `kind`, its registered name.
    """

    kind: ClassVar[str]

    strategy: Strategy

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Restricted samples per step."""
        return self.strategy.batch_size

    @property
    def trains_head_in_place(self) -> bool:
        """See `Adversary.trains_head_in_place`."""
        return self.strategy.initialisation == "direct"

    @classmethod
    def _own(cls) -> list[str]:
        """Names of the settings besides the strategy's."""
        return [f.name for f in fields(cls) if f.name not in ("strategy", "name")]

    def config(self) -> dict[str, Any]:
        """See `Adversary.config`."""
        own = {name: getattr(self, name) for name in self._own()}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        return {"kind": self.kind, **own, **self.strategy.settings()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Returns the adversary that has this `config`.

        Raises:
            HoldfastError: for an unknown setting.
        """
        own = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in cls._own()}
        rest = {k: v for k, v in config.items() if k not in own and k != "kind"}
        for key in rest:
            if key not in Strategy.__dataclass_fields__:
                raise unknown(f"setting of {cls.kind}", key, [*Strategy.__dataclass_fields__, *cls._own()])
        return cls(Strategy(**rest), **own)


KINDS: Final[Registry[type[Adversary]]] = Registry("kind of adversary", "holdfast.adversaries")
"""Classes of adversaries by the `kind` in their `config()`; `holdfast replay` builds adversaries with them.

A new class is a file in this folder, or an entry point of the group `holdfast.adversaries`.
"""
