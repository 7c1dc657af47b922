"""Attacks of a protocol: their strategies, epochs in steps, the scratch control, and the curves that they give."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, Self, get_type_hints

from pydantic import ConfigDict, Field, create_model, model_validator

from holdfast.adversaries import Adversary, FineTuning
from holdfast.auditing.trials import few_of
from holdfast.experiments.setting import ORIGINAL, SCRATCH, Setting, role_of
from holdfast.models import SplitModel
from holdfast.results import Curve
from holdfast.runtime.executors import Executor
from holdfast.runtime.jobs import Job, JournalStore, run_jobs
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run
from holdfast.tasks import Task
from holdfast.training import Initialisation, Precision, Strategy

PAPER: Final = {"optimizer": "momentum", "learning_rate": 1e-4, "batch_size": 200, "weight_decay": 1e-4}
"""The default attack: that of the SOPHON paper, section 5.1.1."""


def _settings() -> Any:
    """A base class with every setting of `FineTuning`, those of its strategy first; the protocol sets the precision."""
    found: dict[str, Any] = {}
    for kind in (Strategy, FineTuning):
        hints = get_type_hints(kind)
        found |= {f.name: (hints[f.name], PAPER.get(f.name, f.default)) for f in dataclasses.fields(kind)}
    chosen = {name: each for name, each in found.items() if name not in ("strategy", "name", "precision")}
    return create_model("_Settings", __config__=ConfigDict(extra="forbid", frozen=True), **chosen)


class AttackSpec(_settings()):  # type: ignore[misc]
    """One attack: the settings of a strategy and of `FineTuning`, by default those of `PAPER`."""

    more_epochs: tuple[int, ...] = Field((), description="Epochs after the protocol's last, for this attack alone.")
    stands_for: str | None = Field(
        None, description="The attack of `paper` that this one replaces; null: the one of the same name."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.adversary("float32")
        return self

    def adversary(self, precision: Precision) -> FineTuning:
        """Returns the attack; its random choices depend on its settings, not on the recipe's name for it."""
        settings = self.model_dump(exclude={"more_epochs", "stands_for"})
        return FineTuning.from_config({**settings, "precision": precision})


@dataclass(frozen=True)
class Attack:
    """One attack of a protocol.

    Attributes:
        label: the recipe's name for it.
        adversary: the adversary.
        epochs: epochs after which it is scored.
        stands_for: name of the attack in the paper's numbers.
    """

    label: str
    adversary: Adversary
    epochs: tuple[int, ...]
    stands_for: str


def scratch_plan(plan: Sequence[Attack], model: SplitModel, task: Task) -> list[tuple[Attack, tuple[Attack, ...]]]:
    """Returns the scratch controls, each with the attacks that it belongs to.

    Attacks that differ only in their initialisation share one control, since all start from fresh weights. A probe, or
    training of the head alone, on random features does not train a model, so these attacks have no control.

    Args:
        plan: the attacks.
        model: its architecture is trained; the head is replaced only if it has another number of outputs.
        task: the task to learn.
    """
    start: Initialisation = "direct" if model.num_outputs == task.num_outputs else "head"
    groups: dict[FineTuning, list[Attack]] = {}
    for attack in plan:
        adversary = attack.adversary
        if isinstance(adversary, FineTuning) and adversary.strategy.scope != "head":
            strategy = dataclasses.replace(adversary.strategy, initialisation=start)
            groups.setdefault(FineTuning(strategy, burn_in=adversary.burn_in), []).append(attack)
    controls = []
    for adversary, covered in groups.items():
        labels = [a.label for a in covered]
        label = " / ".join(labels) if len(labels) <= 3 else f"{labels[0]} and {len(labels) - 1} more"
        epochs = tuple(sorted({e for a in covered for e in a.epochs}))
        controls.append((Attack(label, adversary, epochs, covered[0].stands_for), tuple(covered)))
    return controls


def steps_per_epoch(samples: int, batch_size: int, cap: int | None = None) -> int:
    """Returns the steps of an epoch: each sample once, with the last batch filled up; at most `cap`.

    Example:
        >>> steps_per_epoch(25_000, 200), steps_per_epoch(25_000, 150), steps_per_epoch(25_000, 200, cap=2)
        (125, 167, 2)
    """
    steps = math.ceil(samples / min(batch_size, samples))
    return steps if cap is None else min(steps, cap)


@dataclass(frozen=True)
class AttackTrial:
    """One attack on one model of a setting with one seed.

    Attributes:
        setting: name of the setting.
        model: `scratch`, `original`, or the name of a defense.
        attack: the attack.
        seed: number of the repetition.
        budgets: steps after which to score.
    """

    setting: str
    model: str
    attack: Attack
    seed: int
    budgets: tuple[int, ...]

    @property
    def key(self) -> str:
        """Unique among the trials of a protocol."""
        return json.dumps([self.setting, self.model, self.attack.label, self.seed], ensure_ascii=False)


@dataclass(frozen=True)
class AttackContext:
    """Input of all attacks of a protocol; sent once to each worker.

    Attributes:
        settings: by name.
        models: immunized models by setting, label and seed of the defense.
        immunizations: number of seeds of each defense.
        shots: training samples a class; None: all.
        run: seed, device, folder.
        on: the task to learn: the adversary's half of the restricted task, or the transfer task.
    """

    settings: Mapping[str, Setting]
    models: Mapping[tuple[str, str, int], SplitModel]
    immunizations: int
    shots: int | None
    run: Run
    on: Literal["restricted", "transfer"] = "restricted"

    def model(self, trial: AttackTrial) -> SplitModel:
        """Returns the model that a trial attacks."""
        original = self.settings[trial.setting].original
        if trial.model == ORIGINAL:
            return original
        if trial.model == SCRATCH:
            with self.run.seeded("scratch", trial.seed):
                return original.fresh()
        return self.models[trial.setting, trial.model, trial.seed % self.immunizations]

    def task(self, setting: Setting) -> Task:
        """Returns the task that adversaries learn in a setting."""
        return setting.adversary_data if self.on == "restricted" else setting.transfer_task

    def scored(self, setting: Setting) -> Task:
        """Returns the task whose constant guess is the unit of errors; see `rescaled`."""
        return setting.restricted if self.on == "restricted" else setting.transfer_task


def attack_curves(
    context: AttackContext,
    trials: Sequence[AttackTrial],
    *,
    file: str,
    depends_on: Mapping[str, Any],
    executor: Executor,
    description: str,
) -> dict[str, Curve]:
    """Runs the trials that a journal in the run's folder does not hold yet.

    Args:
        context: models, tasks, seed.
        trials: in the order in which to run them.
        file: name of the journal.
        depends_on: what curves depend on beside the context and the trials.
        executor: where attacks run; it does not change their results.
        description: text of the progress display.

    Returns:
        Curves by the keys of their trials.
    """
    settings, run = context.settings, context.run
    journal = Journal(
        run.path(file),
        {
            "seed": run.seed,
            "attacks": {t.key: [t.attack.adversary.config(), t.budgets] for t in trials if t.seed == 0},
            **depends_on,
            "shots": context.shots,
            "data": {name: context.task(setting).facts().sha256 for name, setting in settings.items()},
            "originals": {name: setting.original.facts().sha256 for name, setting in settings.items()},
            "immunized models": {json.dumps(place): model.facts().sha256 for place, model in context.models.items()},
        },
        "protocol",
    )
    jobs = [Job(t.key, t, f"{t.model}: {t.attack.label}") for t in trials]
    store = JournalStore(journal, {t.key: partial(_kept, t, context.on) for t in trials})
    curves = run_jobs(
        _attack, context, jobs, store, run=run, executor=executor, description=description, finished=run.finished_trial
    )
    return {trial.key: curve for trial, curve in zip(trials, curves, strict=True)}


def _attack(context: AttackContext, trial: AttackTrial) -> Curve:
    setting = context.settings[trial.setting]
    task = few_of(context.task(setting), context.shots, context.run, trial.seed)
    curve = trial.attack.adversary.attack(
        context.model(trial),
        task,
        budgets=trial.budgets,
        run=context.run,
        role=role_of(trial.model),
        seed=trial.seed,
        benign=setting.benign,
    ).model_copy(update={"task": context.on})
    return curve if task.higher_is_better else rescaled(curve, task.chance / context.scored(setting).chance)


def _kept(trial: AttackTrial, task: str, entry: Any) -> Curve:
    """Reads a trial's curve from its entry in the journal; refuses the curve of another trial."""
    curve = Curve.model_validate(entry)
    wanted = (trial.attack.adversary.name, trial.seed, trial.budgets, task)
    if (curve.adversary, curve.seed, tuple(curve.budgets), curve.task) != wanted:
        raise ValueError(
            f"it is a curve of {curve.adversary!r} on {curve.task}, seed {curve.seed}, budgets {curve.budgets}"
        )
    return curve


def rescaled(curve: Curve, ratio: float) -> Curve:
    """Converts a curve of scores 1 - error / chance to a chance that is 1 / `ratio` times as large.

    A constant guess depends on the training samples, so chance differs between halves and seeds. Errors of several
    seeds can be averaged only if their scores refer to the same chance.
    """
    scores = [None if score is None else 1 - (1 - score) * ratio for score in curve.scores]
    folds = [None if each is None else [1 - (1 - fold) * ratio for fold in each] for each in curve.folds]
    return curve.model_copy(update={"scores": scores, "folds": folds})
