"""Protocols: fixed attacks over epochs on several models side by side, laid out as the tables of the SOPHON paper.

An audit looks for the best adversary and gives a verdict. A protocol gives no verdict: it runs the attacks that the
recipe names, and shows all of them on every model, scratch and the original included.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from holdfast.adversaries import listed, trained_with
from holdfast.defenses import Defense
from holdfast.errors import HoldfastError, unknown
from holdfast.experiments.immunization import ImmunizationJob, ImmunizedModel, immunize_all
from holdfast.experiments.measurements.attack_curves import (
    Attack,
    AttackContext,
    AttackSpec,
    AttackTrial,
    attack_curves,
    scratch_plan,
    steps_per_epoch,
)
from holdfast.experiments.measurements.base import MEASUREMENTS, Measured, Measurement
from holdfast.experiments.measurements.condition_numbers import Conditioning
from holdfast.experiments.measurements.probe_curves import ProbeCurves
from holdfast.experiments.measurements.samples import Samples
from holdfast.experiments.measurements.transfer import Transfer, transfer_attacks
from holdfast.experiments.setting import ORIGINAL, SCRATCH, Setting
from holdfast.experiments.setting_scores import Measure, PaperSpec, Row, SettingScores
from holdfast.experiments.tables import tabulate
from holdfast.models import ModelSpec
from holdfast.results.tables import Outcome, finite
from holdfast.runtime.argument_checks import readable
from holdfast.runtime.executors import Executor
from holdfast.runtime.run import Run
from holdfast.tasks import Task, TaskSpec
from holdfast.training import Precision, PretrainSpec


class SettingSpec(BaseModel):
    """One setting: a model, its own task, and the task that it must not be fine-tuned to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelSpec
    pretrain: PretrainSpec | None = None
    benign: TaskSpec
    restricted: TaskSpec
    transfer: TaskSpec | None = Field(None, description="A harmless task that every model should still learn.")
    stands_for: str | None = Field(
        None, description="The setting of `paper` that this one replaces; null: the one of the same name."
    )


class ProtocolSpec(BaseModel):
    """What a protocol does, as a recipe writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Precision = Field("float32", description="Precision of the attacks' training; bf16 is torch.autocast.")
    seeds: int = Field(3, ge=1, description="Repetitions of every attack: batches, samples, fresh weights.")
    immunizations: int = Field(
        1, ge=1, description="Repetitions of every defense; attack seed s meets the model of defense seed s mod this."
    )
    epochs: tuple[int, ...] = Field((0, 1, 5, 10, 15, 20), description="Epochs after which to score; the first is 0.")
    shots: int | None = Field(None, ge=1, description="Adversary's training samples a class; null: its whole half.")
    epoch_of: Literal["samples", "task"] = Field(
        "samples",
        description="An epoch is as many samples as the adversary has, or as the task has before the split in halves. "
        "The paper counts the latter (250 steps of 200 are the 50,000 images of CIFAR-10).",
    )
    max_steps_per_epoch: int | None = Field(None, ge=1, description="Limit on the steps of an epoch, for quick runs.")
    settings: dict[str, SettingSpec]
    defenses: dict[str, dict[str, Any]] = Field({}, description="Defenses by the name of their row: `name`, settings.")
    attacks: dict[str, AttackSpec] = Field({}, description="Attacks by the name of their row.")
    battery: str | None = Field(None, description="A battery instead of `attacks`; each of its adversaries is a row.")
    compare_with: str | None = Field(
        None, description="A defense that the others are compared with, seed by seed, in a table of their own."
    )
    conditioning: Conditioning | None = Field(
        None, description="Measure RIR_theta0 of every immunized model, on these samples; null: no."
    )
    transfer_attacks: tuple[str, ...] = Field(
        (),
        description="Which attacks learn the settings' transfer tasks; none: those that train a head alone "
        "(closed-form probes, scope `head`), or a closed-form probe if there is none.",
    )
    pictures: Samples | None = Field(None, description="Pictures that denoisers make; null: no pictures.")
    measurements: dict[str, dict[str, Any]] = Field(
        {}, description="Further measurements by their registered name, with their settings."
    )
    paper: dict[str, dict[str, PaperSpec]] = Field(
        {},
        description="The paper's numbers, accuracies in percent and errors as printed: by setting, then model "
        "(`scratch`, `original`, defenses).",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.settings:
            raise ValueError("settings is empty; give at least one, with model, benign and restricted")
        reserved = [name for name in (SCRATCH, ORIGINAL) if name in self.defenses]
        if reserved:
            raise ValueError(f"a defense is called {reserved[0]!r}, which is the name of a control; rename it")
        if self.compare_with is not None and self.compare_with not in self.defenses:
            raise ValueError(str(unknown("defense to compare with:", self.compare_with, self.defenses)))
        if len(self.epochs) < 2 or self.epochs[0] != 0 or any(a >= b for a, b in itertools.pairwise(self.epochs)):
            raise ValueError(f"epochs are {list(self.epochs)}; expected at least two, ascending, the first 0")
        if self.attacks and self.battery is not None:
            raise ValueError("both attacks and a battery are given; give one of them")
        if not self.attacks and self.battery is None and not self.defenses:
            raise ValueError("there are neither attacks nor defenses, so there is nothing to do")
        if (self.attacks or self.battery) and self.seeds < self.immunizations:
            raise ValueError(
                f"seeds is {self.seeds} and immunizations {self.immunizations}: some immunized models would not be "
                "attacked; give at least as many seeds"
            )
        plan = self.plan()
        if self.transfer_attacks and not any(setting.transfer for setting in self.settings.values()):
            raise ValueError("there are transfer_attacks, and no setting has a transfer task; give it one")
        transfer_attacks(plan, self.transfer_attacks)
        self.chosen_measurements()
        if not self.defenses and self.conditioning is not None:
            raise ValueError("conditioning compares immunized models with the original, and there are no defenses")
        labels = [attack.label for attack in plan]
        if self.pictures is not None and self.pictures.attack is not None and self.pictures.attack not in labels:
            raise ValueError(str(unknown("attack of pictures:", self.pictures.attack, labels)))
        return self

    def epoch_samples(self, setting: Setting) -> int:
        """Returns the number of samples in an epoch; see `epoch_of`."""
        if self.epoch_of == "task":
            return setting.restricted.size("train")
        few = setting.adversary_data if self.shots is None else setting.adversary_data.few_shot(self.shots, 0)
        return few.size("train")

    def chosen_measurements(self) -> list[Measurement]:
        """Returns the measurements, in the order of the report.

        Raises:
            HoldfastError: for a measurement that is not registered, or settings that do not fit it.
        """
        steps = self.max_steps_per_epoch
        transfer = Transfer(attacks=self.transfer_attacks, seeds=self.seeds, max_steps_per_epoch=steps)
        chosen: list[Measurement | None] = [self.conditioning, ProbeCurves(), transfer, self.pictures]
        for name, settings in self.measurements.items():
            kind = MEASUREMENTS.lookup(name)
            try:
                chosen.append(kind.model_validate(settings))
            except ValidationError as error:
                raise readable(error, f"measurements.{name}", kind) from error
        return [each for each in chosen if each is not None]

    def plan(self) -> list[Attack]:
        """Returns the attacks in order.

        Raises:
            HoldfastError: for an unknown battery, epochs out of order, or two attacks with the same settings.
        """
        if self.battery is not None:
            adversaries = [trained_with(a, self.precision) for a in listed(self.battery)]
            return [Attack(a.name, a, self.epochs, a.name) for a in adversaries]
        attacks: dict[str, Attack] = {}
        for name, spec in self.attacks.items():
            epochs = (*self.epochs, *spec.more_epochs)
            if any(a >= b for a, b in itertools.pairwise(epochs)):
                raise HoldfastError(
                    f"attack {name!r}: more_epochs are {list(spec.more_epochs)}; expected ascending numbers above "
                    f"{self.epochs[-1]}, the protocol's last epoch"
                )
            attack = Attack(name, spec.adversary(self.precision), epochs, spec.stands_for or name)
            known = attacks.setdefault(attack.adversary.name, attack)
            if known is not attack:
                raise HoldfastError(f"attacks {known.label!r} and {name!r} have the same settings; leave one out")
        return list(attacks.values())


def check_kinds(settings: Mapping[str, SettingSpec], tasks: Mapping[TaskSpec, Task]) -> None:
    """Refuses tasks of several kinds, since a table has one unit.

    Args:
        settings: by name.
        tasks: the loaded tasks.

    Raises:
        HoldfastError: naming the task that differs from the first.
    """
    units = [
        (f"the {role} task {tasks[spec].name!r} of setting {name!r}", tasks[spec].audit_unit)
        for name, setting in settings.items()
        for role in ("restricted", "benign", "transfer")
        if (spec := getattr(setting, role)) is not None
    ]
    first, unit = units[0]
    for task, other in units:
        if other != unit:
            raise HoldfastError(
                f"A protocol has one kind of task, because its tables have one unit; {task} is scored by {other}, and "
                f"{first} by {unit}. Write a protocol for each kind."
            )


def immunizations(
    spec: ProtocolSpec, defenses: Mapping[str, Defense], settings: Mapping[str, Setting], run: Run
) -> list[ImmunizationJob]:
    """Returns every immunization of a protocol.

    Args:
        spec: says how many repetitions.
        defenses: by the name of their row.
        settings: by name.
        run: its seed is that of the first repetition.
    """
    return [
        ImmunizationJob.of(name, label, seed, defense, setting, run)
        for name, setting in settings.items()
        for label, defense in defenses.items()
        for seed in range(spec.immunizations)
    ]


def protocol(
    spec: ProtocolSpec,
    wanted: Sequence[ImmunizationJob],
    settings: Mapping[str, Setting],
    *,
    run: Run,
    executor: Executor,
) -> tuple[Outcome, dict[str, ImmunizedModel]]:
    """Immunizes and attacks all models, and returns their scores as tables.

    Every finished job is stored in the run's folder at once, and a second call runs only the missing ones.

    Args:
        spec: attacks, epochs, seeds.
        wanted: the result of `immunizations`.
        settings: models and tasks by name.
        run: seed, device, folder.
        executor: where immunizations and attacks run; it does not change their results.

    Returns:
        Tables, figures and sentences; and the immunized models by name: setting, label and seed.

    Raises:
        HoldfastError: if models and tasks do not fit together.
    """
    made = immunize_all(wanted, settings, run=run, executor=executor)
    models = {key: each.model for key, each in made.items()}
    context = AttackContext(settings, models, spec.immunizations, spec.shots, run)
    rows, trials = _rows(spec, wanted, settings)
    # Sorted by seed: an interrupted protocol then has a few seeds of all models rather than all seeds of a few models.
    every = sorted(itertools.chain.from_iterable(trials), key=lambda trial: trial.seed)
    curves = attack_curves(
        context, every, file="trials.jsonl", depends_on={"seeds": spec.seeds}, executor=executor,
        description="Attacking",
    )  # fmt: skip
    filled = [
        dataclasses.replace(row, curves=tuple(curves[t.key] for t in own))
        for row, own in zip(rows, trials, strict=True)
    ]
    scores = [_scores(name, setting, spec, made, run) for name, setting in settings.items()]
    measured = Measured(context, spec.plan(), filled, trials, scores, executor)
    chosen = spec.chosen_measurements()
    outcome = sum((m.measure(measured) for m in chosen if not m.after_scores), Outcome({}, {}, []))
    outcome += tabulate(scores, filled, spec.epochs, spec.compare_with)
    outcome = sum((m.measure(measured) for m in chosen if m.after_scores), outcome)
    return outcome, {f"{j.setting}: {j.label}, seed {j.seed}": made[j.setting, j.label, j.seed] for j in wanted}


def _rows(
    spec: ProtocolSpec, wanted: Sequence[ImmunizationJob], settings: Mapping[str, Setting]
) -> tuple[list[Row], list[list[AttackTrial]]]:
    """Rows of the table, still without curves, and the trials of each row; none for an attack that cannot start."""
    plan, rows, trials = spec.plan(), [], []
    for name, setting in settings.items():
        labels = dict.fromkeys(job.label for job in wanted if job.setting == name)
        lines = [(SCRATCH, *each) for each in scratch_plan(plan, setting.original, setting.restricted)]
        lines += [(model, attack, (attack,)) for model in (ORIGINAL, *labels) for attack in plan]
        samples = spec.epoch_samples(setting)
        for model, attack, covered in lines:
            reason = attack.adversary.not_applicable(setting.original, setting.restricted)
            steps = steps_per_epoch(samples, attack.adversary.batch_size, spec.max_steps_per_epoch)
            budgets = tuple(epoch * steps for epoch in attack.epochs)
            seeds = range(0 if reason else spec.seeds)
            trials.append([AttackTrial(name, model, attack, seed, budgets) for seed in seeds])
            remark = f"not applicable: {reason}" if reason else ""
            covers, names = tuple(a.label for a in covered), tuple(a.stands_for for a in covered)
            rows.append(Row(name, model, attack.label, covers, names, attack.epochs, steps, remark))
    return rows, trials


def _scores(
    name: str, setting: Setting, spec: ProtocolSpec, made: Mapping[tuple[str, str, int], ImmunizedModel], run: Run
) -> SettingScores:
    stands_for = spec.settings[name].stands_for
    return SettingScores(
        name=name,
        restricted=setting.restricted.name,
        measure=Measure.of(setting.restricted),
        benign_measure=Measure.of(setting.benign),
        chance=setting.restricted.audit_chance,
        original=finite(setting.benign.audit_score(setting.original.clone().to(run.device))),
        made={(label, seed): each for (in_setting, label, seed), each in made.items() if in_setting == name},
        paper=spec.paper.get(stands_for or name, {}),
        stands_for=stands_for,
    )
