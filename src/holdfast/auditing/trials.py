"""Trials: one adversary against one model with one seed; run in any order, kept as they finish, never done twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from holdfast.adversaries import Adversary
from holdfast.adversaries.base import benign_score_after
from holdfast.adversaries.batched import Member, attack_together, stacks
from holdfast.models import SplitModel
from holdfast.results import ROLES, Curve, Role
from holdfast.runtime.executors import Executor
from holdfast.runtime.jobs import Job, JournalStore, run_jobs
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run, derive_seed
from holdfast.tasks import Task

On = Literal["restricted", "benign", "transfer"]


SEARCH_SEED = -1
"""The repetition that searches use: samples, batches and fresh weights that no repeated trial has."""


TRANSPLANTED = ", in the original's code"
"""Ends the name of an adversary who first put the released weights into the original's code."""


def few_of(task: Task, shots: int | None, run: Run, seed: int) -> Task:
    """Returns what an adversary gets of a task in one repetition: the training split, or so many samples a class."""
    return task if shots is None else task.few_shot(shots, derive_seed(run.seed, "shots", seed))


@dataclass(frozen=True)
class Trial:
    """One piece of work.

    Attributes:
        role: which model is attacked.
        adversary: how.
        seed: repetition: samples, batches, fresh weights.
        on: the task that is learned; anything but the restricted one measures side effects.
        transplanted: whether the immunized model's weights are attacked inside the original's code.
        pruning_thresholds: see `Adversary.attack`.
    """

    role: Role
    adversary: Adversary
    seed: int
    on: On = "restricted"
    transplanted: bool = False
    pruning_thresholds: tuple[float | None, ...] = ()

    @property
    def name(self) -> str:
        """The adversary's name, as curves have it."""
        return self.adversary.name + (TRANSPLANTED if self.transplanted else "")

    @property
    def key(self) -> str:
        """Names it among all trials of an audit."""
        return f"{self.on}/{self.role}/{self.name}/{self.seed}"

    def __str__(self) -> str:
        return self.key


def repetitions(adversaries: Sequence[Adversary], seeds: Sequence[int], *, transplanted: bool) -> list[Trial]:
    """Returns the trials of an audit, in the order that decides which of them are trained together.

    Args:
        adversaries: each against every model, with every seed.
        seeds: the repetitions.
        transplanted: whether each is also tried on the immunized weights inside the original's code.
    """
    trials = [Trial(role, a, s) for s in seeds for role in ROLES for a in adversaries]
    if transplanted:
        trials += [Trial("immunized", a, s, transplanted=True) for s in seeds for a in adversaries]
    return trials


@dataclass(frozen=True)
class TrialContext:
    """What trials need, the same for all of them; it travels once to each worker.

    Attributes:
        immunized: the model in question.
        original: what it was before; fresh copies of it are the scratch control.
        transplanted: the immunized weights inside the original's code, where its own code is another.
        samples: what adversaries learn from, by task and seed.
        benign: the model's own task.
        budgets: steps at which to score.
        run: seed and device.
        stacked: whether attacks on small models are trained together; curves agree up to rounding.
        untouched: benign scores of models whose bodies an attack left alone, each taken once.
    """

    immunized: SplitModel
    original: SplitModel
    transplanted: SplitModel | None
    samples: Mapping[tuple[On, int], Task]
    benign: Task
    budgets: tuple[int, ...]
    run: Run = field(repr=False)
    stacked: bool = True
    untouched: dict[tuple[Role, bool], float | None] = field(default_factory=dict, repr=False)

    def model(self, role: Role, seed: int) -> SplitModel:
        """Returns the model of a role; of `scratch`, the fresh weights that belong to a seed."""
        if role == "immunized":
            return self.immunized
        if role == "original":
            return self.original
        with self.run.seeded("scratch", seed):
            return self.original.fresh()

    def together(self, trials: Sequence[Trial]) -> list[list[int]]:
        """Groups trials, by index, that are trained together; see `holdfast.runtime.jobs.run_jobs`."""
        if not self.stacked:
            return [[index] for index in range(len(trials))]
        scratch = {seed: self.model("scratch", seed) for seed in {t.seed for t in trials if t.role == "scratch"}}
        members: list[Member] = []
        for trial in trials:
            model = scratch[trial.seed] if trial.role == "scratch" else self._attacked(trial)
            members.append(Member(trial.adversary, model, self.samples[trial.on, trial.seed], trial.role, trial.seed))
        index = {id(member): i for i, member in enumerate(members)}
        pruned = [[i] for i, trial in enumerate(trials) if trial.pruning_thresholds]
        stackable = [m for m, trial in zip(members, trials, strict=True) if not trial.pruning_thresholds]
        return [[index[id(member)] for member in group] for group in stacks(stackable)] + pruned

    def curves(self, trials: Sequence[Trial]) -> list[Curve]:
        """Runs trials that are trained together."""
        if len(trials) == 1:
            return [self.curve(trials[0])]
        members = [Member(t.adversary, self._attacked(t), self.samples[t.on, t.seed], t.role, t.seed) for t in trials]
        attacked = {t.on for t in trials} == {"restricted"}
        together = attack_together(
            members, budgets=self.budgets, run=self.run, score_benign=self.benign if attacked else None
        )
        return [_named(curve, trial) for curve, trial in zip(together, trials, strict=True)]

    def _attacked(self, trial: Trial) -> SplitModel:
        if not trial.transplanted:
            return self.model(trial.role, trial.seed)
        assert self.transplanted is not None
        return self.transplanted

    def curve(self, trial: Trial) -> Curve:
        """Runs a trial; where the immunized model's own code fails, the curve says so and has no scores.

        In a search that holds for every model, since a search proposes settings that were never tried.
        """
        task, model = self.samples[trial.on, trial.seed], self._attacked(trial)
        scored = trial.on == "restricted" and trial.role != "scratch"
        alone = scored and trial.adversary.frozen_body  # many probes, one benign score
        try:
            found = trial.adversary.attack(
                model,
                task,
                budgets=self.budgets,
                run=self.run,
                role=trial.role,
                seed=trial.seed,
                benign=self.benign,
                pruning_thresholds=trial.pruning_thresholds,
                score_benign=scored and not alone,
            )
            if alone:
                if (side := (trial.role, trial.transplanted)) not in self.untouched:
                    self.untouched[side] = benign_score_after(trial.adversary, model, model, self.benign)
                found = found.model_copy(update={"benign_after": self.untouched[side]})
        except Exception as error:  # the user's code may raise anything
            if trial.role != "immunized" and trial.seed != SEARCH_SEED:
                raise
            none: list[None] = [None] * len(self.budgets)
            found = Curve(
                adversary=trial.name, role=trial.role, seed=trial.seed, budgets=list(self.budgets), scores=[*none],
                losses=[*none], folds=[*none], batch_size=min(trial.adversary.batch_size, task.size("train")),
                failure=f"{type(error).__name__}: {error}"[:500],
            )  # fmt: skip
        return _named(found, trial)


def _named(curve: Curve, trial: Trial) -> Curve:
    return curve.model_copy(update={"task": trial.on, "adversary": trial.name})


@dataclass(frozen=True)
class TrialRunner:
    """Runs trials.

    Attributes:
        context: what they need.
        journal: keeps every finished one.
        executor: where they run.
    """

    context: TrialContext
    journal: Journal
    executor: Executor

    def run(self, trials: Sequence[Trial], description: str) -> list[Curve]:
        """Runs what the journal does not hold yet; every finished trial is in it at once.

        Args:
            trials: in the order in which curves are wanted.
            description: for the progress bar.

        Returns:
            One curve a trial, the same whether it was run now or before, and wherever.

        Raises:
            HoldfastError: if the journal holds something else under a trial's key.
        """
        jobs = [Job(trial.key, trial, f"{trial.role}: {trial.name}") for trial in trials]
        store = JournalStore(self.journal, {t.key: partial(_kept, t, self.context.budgets) for t in trials})
        return run_jobs(
            _curves,
            self.context,
            jobs,
            store,
            run=self.context.run,
            executor=self.executor,
            description=description,
            together=self.context.together,
            finished=self.context.run.finished_trial,
        )


def _curves(context: TrialContext, trials: Sequence[Trial]) -> list[Curve]:
    return context.curves(trials)


def _kept(trial: Trial, budgets: tuple[int, ...], entry: Any) -> Curve:
    """Makes a trial's curve of its entry in the journal; refuses another trial's."""
    curve = Curve.model_validate(entry)
    if (curve.task, curve.role, curve.adversary, curve.seed) != (trial.on, trial.role, trial.name, trial.seed):
        raise ValueError(f"it is of {curve.task}/{curve.role}/{curve.adversary}/{curve.seed}")
    expected = budgets[: len(curve.budgets)] if trial.seed == SEARCH_SEED else budgets
    if tuple(curve.budgets) != expected:
        raise ValueError(f"its budgets are {curve.budgets} instead of {list(budgets)}")
    return curve
