"""Trials: one adversary against one model with one seed; run in any order, and stored as they finish."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from holdfast.adversaries import Adversary, Search, battery_config
from holdfast.adversaries.base import benign_score_after
from holdfast.adversaries.batched import Member, attack_together, stacks
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.results import ROLES, Curve, Role
from holdfast.runtime.executors import Executor
from holdfast.runtime.jobs import Job, JournalStore, run_jobs
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run, derive_seed, fingerprint
from holdfast.tasks import Task

On = Literal["restricted", "benign", "transfer"]

FORMAT = 2
"""Version of the trials in the journal; 2: with the benign score after the attack."""

SEARCH_SEED = -1
"""The seed of searches: no repeated trial has the same samples, batches and fresh weights."""


TRANSPLANTED = ", in the original's code"
"""Suffix of the name of an adversary that first put the released weights into the original's code."""


def few_of(task: Task, shots: int | None, run: Run, seed: int) -> Task:
    """Returns a task with the adversary's samples for one seed: the training split, or `shots` samples per class."""
    return task if shots is None else task.few_shot(shots, derive_seed(run.seed, "shots", seed))


def applicable(
    name: str, adversaries: Sequence[Adversary], model: SplitModel, task: Task, reference: SplitModel | None = None
) -> tuple[list[Adversary], dict[str, str]]:
    """Returns the adversaries of a battery that can start, also on the reference, and why the others cannot."""
    models = (model,) if reference is None else (model, reference)
    reasons = {
        a.name: next((why for m in models if (why := a.not_applicable(m, task)) is not None), None) for a in adversaries
    }
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    start = [a for a in adversaries if a.name not in refused]
    if not start:
        raise HoldfastError(f"No adversary of {name} applies: {next(iter(refused.values()))}.")
    return start, refused


@dataclass(frozen=True)
class Trial:
    """One adversary against one model with one seed.

    Attributes:
        role: the attacked model.
        adversary: the attack.
        seed: of samples, batches and fresh weights.
        on: the trained task; tasks other than the restricted one measure side effects.
        transplanted: whether the immunized model's weights are attacked in the original's code.
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
        """The adversary's name in curves."""
        return self.adversary.name + (TRANSPLANTED if self.transplanted else "")

    @property
    def key(self) -> str:
        """Unique among the trials of an audit."""
        return f"{self.on}/{self.role}/{self.name}/{self.seed}"

    def __str__(self) -> str:
        return self.key


def repetitions(adversaries: Sequence[Adversary], seeds: Sequence[int], *, transplanted: bool) -> list[Trial]:
    """Returns the trials of an audit, in the order that decides which of them are trained together.

    Args:
        adversaries: each attacks every model with every seed.
        seeds: one repetition each.
        transplanted: whether each also attacks the immunized weights in the original's code.
    """
    trials = [Trial(role, a, s) for s in seeds for role in ROLES for a in adversaries]
    if transplanted:
        trials += [Trial("immunized", a, s, transplanted=True) for s in seeds for a in adversaries]
    return trials


@dataclass(frozen=True)
class TrialContext:
    """Inputs that all trials share; sent once to each worker.

    Attributes:
        immunized: the audited model.
        original: the model before immunization; fresh copies of it are the scratch control.
        transplanted: the immunized weights in the original's code, if the immunized model's code differs.
        samples: the adversaries' data, by task and seed.
        benign: the model's own task.
        budgets: steps at which to score.
        run: seed and device.
        stacked: whether attacks on small models are trained together; curves agree up to rounding.
        reference: a public model that stands for training from scratch; None: fresh copies of the original do.
        untouched: benign scores of models after attacks on a frozen body, each computed once.
    """

    immunized: SplitModel
    original: SplitModel
    transplanted: SplitModel | None
    samples: Mapping[tuple[On, int], Task]
    benign: Task
    budgets: tuple[int, ...]
    run: Run = field(repr=False)
    stacked: bool = True
    reference: SplitModel | None = None
    untouched: dict[tuple[Role, bool], float | None] = field(default_factory=dict, repr=False)

    def model(self, role: Role, seed: int) -> SplitModel:
        """Returns the model of a role; for `scratch`, with the fresh weights of this seed."""
        if role == "immunized":
            return self.immunized
        if role == "original":
            return self.original
        if self.reference is not None:
            return self.reference
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
            members.append(self._member(trial, model))
        index = {id(member): i for i, member in enumerate(members)}
        pruned = [[i] for i, trial in enumerate(trials) if trial.pruning_thresholds]
        stackable = [m for m, trial in zip(members, trials, strict=True) if not trial.pruning_thresholds]
        return [[index[id(member)] for member in group] for group in stacks(stackable)] + pruned

    def curves(self, trials: Sequence[Trial]) -> list[Curve]:
        """Runs one group of trials of `together`."""
        if len(trials) == 1:
            return [self.curve(trials[0])]
        members = [self._member(t, self._attacked(t)) for t in trials]
        attacked = {t.on for t in trials} == {"restricted"}
        together = attack_together(
            members, budgets=self.budgets, run=self.run, score_benign=self.benign if attacked else None
        )
        return [_named(curve, trial) for curve, trial in zip(together, trials, strict=True)]

    def _member(self, trial: Trial, model: SplitModel) -> Member:
        task, searched = self.samples[trial.on, trial.seed], trial.seed == SEARCH_SEED
        return Member(trial.adversary, model, task, trial.role, trial.seed, repaired=searched)

    def _attacked(self, trial: Trial) -> SplitModel:
        if not trial.transplanted:
            return self.model(trial.role, trial.seed)
        assert self.transplanted is not None
        return self.transplanted

    def curve(self, trial: Trial) -> Curve:
        """Runs a trial; if the immunized model's code fails, the curve has the error and no scores.

        In a search that holds for every model, because a search proposes settings that were never tried.
        """
        task, model = self.samples[trial.on, trial.seed], self._attacked(trial)
        scored = trial.on == "restricted" and trial.role != "scratch"
        frozen = scored and trial.adversary.frozen_body  # all probes have the same benign score
        try:
            curve = trial.adversary.attack(
                model, task, budgets=self.budgets, run=self.run, role=trial.role, seed=trial.seed, benign=self.benign,
                pruning_thresholds=trial.pruning_thresholds, score_benign=scored and not frozen,
            )  # fmt: skip
            if frozen:
                if (side := (trial.role, trial.transplanted)) not in self.untouched:
                    self.untouched[side] = benign_score_after(trial.adversary, model, model, self.benign)
                curve = curve.model_copy(update={"benign_after": self.untouched[side]})
        except Exception as error:  # the user's code may raise anything
            if trial.role != "immunized" and trial.seed != SEARCH_SEED:
                raise
            none: list[None] = [None] * len(self.budgets)
            curve = Curve(
                adversary=trial.name, role=trial.role, seed=trial.seed, budgets=list(self.budgets), scores=[*none],
                losses=[*none], folds=[*none], batch_size=min(trial.adversary.batch_size, task.size("train")),
                failure=f"{type(error).__name__}: {error}"[:500],
            )  # fmt: skip
        return _named(curve, trial)


def _named(curve: Curve, trial: Trial) -> Curve:
    return curve.model_copy(update={"task": trial.on, "adversary": trial.name})


@dataclass(frozen=True)
class TrialRunner:
    """Runs trials.

    Attributes:
        context: inputs that all trials share.
        journal: stores every finished trial.
        executor: where trials run.
    """

    context: TrialContext
    journal: Journal
    executor: Executor

    def run(self, trials: Sequence[Trial], description: str) -> list[Curve]:
        """Runs the trials that are not in the journal, and stores each as soon as it is finished.

        Args:
            trials: in the order of the returned curves.
            description: for the progress bar.

        Returns:
            One curve per trial, stored or new.

        Raises:
            HoldfastError: if the journal has an entry of another trial under a trial's key.
        """
        jobs = [Job(trial.key, trial, f"{trial.role}: {trial.name}") for trial in trials]
        store = JournalStore(self.journal, {t.key: partial(_kept, t, self.context.budgets) for t in trials})
        return run_jobs(
            TrialContext.curves, self.context, jobs, store, run=self.context.run, executor=self.executor,
            description=description, together=self.context.together, finished=self.context.run.finished_trial,
        )  # fmt: skip


def _kept(trial: Trial, budgets: tuple[int, ...], entry: Any) -> Curve:
    """Returns a trial's curve from its entry in the journal; raises an error if it is another trial's."""
    curve = Curve.model_validate(entry)
    if (curve.task, curve.role, curve.adversary, curve.seed) != (trial.on, trial.role, trial.name, trial.seed):
        raise ValueError(f"it is of {curve.task}/{curve.role}/{curve.adversary}/{curve.seed}")
    expected = budgets[: len(curve.budgets)] if trial.seed == SEARCH_SEED else budgets
    if tuple(curve.budgets) != expected:
        raise ValueError(f"its budgets are {curve.budgets} instead of {list(budgets)}")
    return curve


def journal_of(
    context: TrialContext, plan: Search | Sequence[Adversary], seeds: int, training: Mapping[str, Any]
) -> Journal:
    """Returns the journal of an audit's trials.

    Args:
        context: what the trials depend on.
        plan: the battery.
        seeds: of the first look. More seeds draw from the same data, so the samples of these tell whether it is the
            same.
        training: how adversaries train, see `AuditSpec.training`.
    """
    return Journal(
        context.run.path("trials.jsonl"),
        {
            "seed": context.run.seed,
            "battery": battery_config(plan),
            "format of trials": FORMAT,
            "budgets": context.budgets,
            "stacked": context.stacked,
            "data": {f"{on} {s}": task.facts().sha256 for (on, s), task in context.samples.items() if s < seeds},
            "immunized model": context.immunized.facts().sha256,
            "original model": context.original.facts().sha256,
            "layers or input normalisation": [_settings(m) for m in (context.immunized, context.original)],
            **training,
            **({} if context.reference is None else {"reference": context.reference.facts().sha256}),
        },
        "audit",
    )


def _settings(model: SplitModel) -> str:
    """Hash of everything besides tensors that scores depend on."""
    layers = re.sub(r"0x[0-9a-fA-F]+", "", repr(model.network))  # addresses in memory differ between processes
    return fingerprint([model.head_name, layers, model.input_settings()])
