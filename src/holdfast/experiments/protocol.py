"""Protocols: fixed attacks over epochs on several models side by side, laid out as the tables of the SOPHON paper.

An audit looks for the best adversary and gives a verdict. A protocol gives none: it runs the attacks that it is told
to, and shows every one of them on every model, scratch and the original among them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from holdfast.adversaries import listed
from holdfast.auditing.trials import few_of
from holdfast.defenses import Defense
from holdfast.errors import HoldfastError, unknown
from holdfast.experiments.immunization import ImmunizationJob, Made, immunize_all
from holdfast.experiments.measurements.attack_curves import (
    Attack,
    AttackSpec,
    in_precision,
    kept_curve,
    rescaled,
    scratch_plan,
    steps_per_epoch,
)
from holdfast.experiments.measurements.conditioning import ConditioningSpec, lay_out, measure_all
from holdfast.experiments.measurements.probe_curves import probe_outcome
from holdfast.experiments.measurements.samples import PicturedModel, PicturesSpec, take_pictures
from holdfast.experiments.measurements.transfer import learners, side_effects
from holdfast.experiments.setting import Setting
from holdfast.experiments.setting_scores import ORIGINAL, SCRATCH, Measure, PaperSpec, Row, SettingScores
from holdfast.experiments.tables import tabulate
from holdfast.models import ModelSpec, SplitModel
from holdfast.results import Curve, Role
from holdfast.results.tables import Outcome
from holdfast.runtime.executors import Executor
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run
from holdfast.tasks import Task, TaskSpec
from holdfast.training import Precision, PretrainSpec

ROLES: Final[dict[str, Role]] = {SCRATCH: "scratch", ORIGINAL: "original"}
"""Of the controls; every other model is an immunized one."""


class SettingSpec(BaseModel):
    """One setting: a model, its own task, and the task that it must not be fine-tuned to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelSpec
    pretrain: PretrainSpec | None = None
    benign: TaskSpec
    restricted: TaskSpec
    transfer: TaskSpec | None = Field(None, description="A harmless task that every model should still learn.")
    stands_for: str | None = Field(
        None, description="The setting of `paper` that this one takes the place of; null: the one of the same name."
    )


class ProtocolSpec(BaseModel):
    """What a protocol does, as a recipe writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Precision = Field("float32", description="Of the attacks' training; bf16 is torch.autocast.")
    seeds: int = Field(3, ge=1, description="Repetitions of every attack: batches, samples, fresh weights.")
    immunizations: int = Field(
        1, ge=1, description="Repetitions of every defense; attack seed s meets the model of defense seed s mod this."
    )
    epochs: tuple[int, ...] = Field((0, 1, 5, 10, 15, 20), description="At which to score; the first is 0.")
    shots: int | None = Field(None, ge=1, description="Adversary's training samples a class; null: its whole half.")
    epoch_of: Literal["samples", "task"] = Field(
        "samples",
        description="An epoch is as many samples as the adversary has, or as the task has before the split in halves: "
        "so the paper counts (250 steps of 200 are the 50,000 images of CIFAR-10).",
    )
    max_steps_per_epoch: int | None = Field(None, ge=1, description="Cuts every epoch short, for quick looks.")
    settings: dict[str, SettingSpec]
    defenses: dict[str, dict[str, Any]] = Field({}, description="Defenses by the name of their row: `name`, settings.")
    attacks: dict[str, AttackSpec] = Field({}, description="Attacks by the name of their row.")
    battery: str | None = Field(None, description="A battery instead of `attacks`; every adversary is a row.")
    compare_with: str | None = Field(
        None, description="A defense that the others are compared with, seed by seed, in a table of its own."
    )
    conditioning: ConditioningSpec | None = Field(
        None, description="Take RIR_theta0 of every immunized model, on how many samples; null: no."
    )
    transfer_attacks: tuple[str, ...] = Field(
        (),
        description="Which attacks learn the settings' transfer tasks; none: those that train a head alone "
        "(closed-form probes, scope `head`), or a closed-form probe if there is none.",
    )
    pictures: PicturesSpec | None = Field(None, description="What denoisers make of images; null: no pictures.")
    paper: dict[str, dict[str, PaperSpec]] = Field(
        {},
        description="The paper's numbers, accuracies in percent and errors as they are: by setting, then model "
        "(`scratch`, `original`, defenses).",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.settings:
            raise ValueError("settings is empty; give at least one, with model, benign and restricted")
        reserved = [name for name in (SCRATCH, ORIGINAL) if name in self.defenses]
        if reserved:
            raise ValueError(f"a defense is called {reserved[0]!r}, as a control that is always there; rename it")
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
        learners(plan, self.transfer_attacks)
        if not self.defenses and self.conditioning is not None:
            raise ValueError("conditioning compares immunized models with the original, and there are no defenses")
        labels = [attack.label for attack in plan]
        if self.pictures is not None and self.pictures.attack is not None and self.pictures.attack not in labels:
            raise ValueError(str(unknown("attack of pictures:", self.pictures.attack, labels)))
        return self

    def epoch_samples(self, ground: Setting) -> int:
        """Returns the number of samples in an epoch; see `epoch_of`."""
        if self.epoch_of == "task":
            return ground.restricted.size("train")
        few = ground.adversary_data if self.shots is None else ground.adversary_data.few_shot(self.shots, 0)
        return few.size("train")

    def plan(self) -> list[Attack]:
        """Returns the attacks in order.

        Raises:
            HoldfastError: for an unknown battery, epochs out of order, or two attacks that are the same.
        """
        if self.battery is not None:
            adversaries = [in_precision(a, self.precision) for a in listed(self.battery)]
            return [Attack(a.name, a, self.epochs, a.name) for a in adversaries]
        found: dict[str, Attack] = {}
        for name, spec in self.attacks.items():
            epochs = (*self.epochs, *spec.more_epochs)
            if any(a >= b for a, b in itertools.pairwise(epochs)):
                raise HoldfastError(
                    f"attack {name!r}: more_epochs are {list(spec.more_epochs)}; expected ascending numbers above "
                    f"{self.epochs[-1]}, the protocol's last epoch"
                )
            attack = Attack(name, spec.adversary(self.precision), epochs, spec.stands_for or name)
            if attack.adversary.name in found:
                raise HoldfastError(
                    f"attacks {found[attack.adversary.name].label!r} and {name!r} have the same settings; leave one out"
                )
            found[attack.adversary.name] = attack
        return list(found.values())


@dataclass(frozen=True)
class _Trial:
    """One attack on one model with one seed."""

    setting: str
    model: str
    attack: Attack
    seed: int
    budgets: tuple[int, ...]

    @property
    def key(self) -> str:
        return json.dumps([self.setting, self.model, self.attack.label, self.seed], ensure_ascii=False)

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class _Bench:
    """What all trials need; it travels once to each worker."""

    grounds: Mapping[str, Setting]
    models: Mapping[tuple[str, str, int], SplitModel]
    immunizations: int
    shots: int | None
    run: Run

    def victim(self, trial: _Trial) -> SplitModel:
        original = self.grounds[trial.setting].original
        if trial.model == ORIGINAL:
            return original
        if trial.model == SCRATCH:
            with self.run.seeded("scratch", trial.seed):
                return original.fresh()
        return self.models[trial.setting, trial.model, trial.seed % self.immunizations]


def _work(bench: _Bench, trial: _Trial) -> Curve:
    ground = bench.grounds[trial.setting]
    task = few_of(ground.adversary_data, bench.shots, bench.run, trial.seed)
    curve = trial.attack.adversary.attack(
        bench.victim(trial),
        task,
        budgets=trial.budgets,
        run=bench.run,
        role=ROLES.get(trial.model, "immunized"),
        seed=trial.seed,
        benign=ground.benign,
    )
    return curve if task.higher_is_better else rescaled(curve, task.chance / ground.restricted.chance)


def check_kinds(settings: Mapping[str, SettingSpec], tasks: Mapping[TaskSpec, Task]) -> None:
    """Refuses tasks of several kinds: a table has one unit, and percent and errors have no common one.

    Args:
        settings: by name.
        tasks: what the settings' tasks are.

    Raises:
        HoldfastError: naming the task that differs from the first.
    """
    found = [
        (f"the {role} task {tasks[spec].name!r} of setting {name!r}", tasks[spec].audit_unit)
        for name, setting in settings.items()
        for role, spec in (
            ("restricted", setting.restricted), ("benign", setting.benign), ("transfer", setting.transfer),
        )
        if spec is not None
    ]  # fmt: skip
    first, unit = found[0]
    for place, other in found:
        if other != unit:
            raise HoldfastError(
                f"A protocol has one kind of task, because its tables have one unit; {place} is scored by "
                f"{other}, and {first} by {unit}. Write a protocol for each kind."
            )


def orders(
    spec: ProtocolSpec, defenses: Mapping[str, Defense], grounds: Mapping[str, Setting], run: Run
) -> list[ImmunizationJob]:
    """Returns every immunization of a protocol.

    Args:
        spec: how many repetitions.
        defenses: by the name of their row.
        grounds: models and tasks by setting.
        run: its seed is the first repetition's.
    """
    return [
        ImmunizationJob.of(setting, label, seed, defense, ground, run)
        for setting, ground in grounds.items()
        for label, defense in defenses.items()
        for seed in range(spec.immunizations)
    ]


def protocol(
    spec: ProtocolSpec,
    wanted: Sequence[ImmunizationJob],
    grounds: Mapping[str, Setting],
    *,
    run: Run,
    executor: Executor,
) -> tuple[Outcome, dict[str, SplitModel], dict[str, float]]:
    """Immunizes, attacks every model, and lays the scores out as tables.

    Every finished piece is kept in the run's folder at once, and a second call does only what is missing.

    Args:
        spec: attacks, epochs, seeds.
        wanted: see `orders`.
        grounds: models and tasks by setting.
        run: seed, device, folder.
        executor: where immunizations and attacks run; it does not change their results.

    Returns:
        Tables, figures and sentences; the immunized models; and the seconds that each of them took.

    Raises:
        HoldfastError: if models and tasks do not fit together.
    """
    made = immunize_all(wanted, grounds, run=run, executor=executor)
    models = {place: each.model for place, each in made.items()}
    bench = _Bench(grounds, models, spec.immunizations, spec.shots, run)
    rows, trials = _plan(spec, wanted, grounds)
    curves = _attack(bench, trials, spec, made, executor)
    filled = [
        dataclasses.replace(row, curves=tuple(curves[t.key] for t in mine))
        for row, mine in zip(rows, trials, strict=True)
    ]
    scenes = [_scene(name, ground, spec, made, run) for name, ground in grounds.items()]
    named = {f"{o.setting}: {o.label}, seed {o.seed}": made[o.setting, o.label, o.seed] for o in wanted}
    seconds = {f"immunize {name}": each.seconds for name, each in named.items()}
    outcome = _beyond_scores(spec, scenes, filled, grounds, models, run=run, executor=executor)
    outcome += tabulate(scenes, filled, spec.epochs, spec.compare_with)
    if spec.pictures is not None:
        subjects = _sittings(spec, rows, trials, bench)
        outcome += take_pictures(spec.pictures, grounds, subjects, shots=spec.shots, run=run, executor=executor)
    return (
        outcome,
        {name: each.model for name, each in named.items()},
        seconds,
    )


def _beyond_scores(
    spec: ProtocolSpec,
    scenes: Sequence[SettingScores],
    rows: Sequence[Row],
    grounds: Mapping[str, Setting],
    models: Mapping[tuple[str, str, int], SplitModel],
    *,
    run: Run,
    executor: Executor,
) -> Outcome:
    """Condition numbers, linear probes step by step, side effects: each where there is something of the kind."""
    outcome, plan = Outcome({}, {}, []), spec.plan()
    if spec.conditioning is not None:
        spectra = measure_all(spec.conditioning, grounds, models, run=run, executor=executor)
        outcome += lay_out(spec.conditioning, scenes, spectra)
    outcome += probe_outcome(plan, scenes, {s.name: [r for r in rows if r.setting == s.name] for s in scenes})
    if any(ground.transfer is not None for ground in grounds.values()):
        outcome += side_effects(
            learners(plan, spec.transfer_attacks),
            grounds,
            models,
            seeds=spec.seeds,
            immunizations=spec.immunizations,
            shots=spec.shots,
            max_steps_per_epoch=spec.max_steps_per_epoch,
            run=run,
            executor=executor,
        )
    return outcome


def _plan(
    spec: ProtocolSpec, wanted: Sequence[ImmunizationJob], grounds: Mapping[str, Setting]
) -> tuple[list[Row], list[list[_Trial]]]:
    """Rows of the table, still without curves, and the trials of each; none where an attack cannot start."""
    plan, rows, trials = spec.plan(), [], []
    for setting, ground in grounds.items():
        labels = dict.fromkeys(order.label for order in wanted if order.setting == setting)
        lines = [(SCRATCH, *each) for each in scratch_plan(plan, ground.original, ground.restricted)]
        lines += [(model, attack, (attack,)) for model in (ORIGINAL, *labels) for attack in plan]
        samples = spec.epoch_samples(ground)
        for model, attack, covered in lines:
            reason = attack.adversary.not_applicable(ground.original, ground.restricted)
            steps = steps_per_epoch(samples, attack.adversary.batch_size, spec.max_steps_per_epoch)
            budgets = tuple(epoch * steps for epoch in attack.epochs)
            seeds = range(0 if reason else spec.seeds)
            trials.append([_Trial(setting, model, attack, seed, budgets) for seed in seeds])
            remark = f"not applicable: {reason}" if reason else ""
            covers, names = tuple(a.label for a in covered), tuple(a.stands_for for a in covered)
            rows.append(Row(setting, model, attack.label, covers, names, attack.epochs, steps, remark))
    return rows, trials


def _attack(
    bench: _Bench,
    trials: Sequence[Sequence[_Trial]],
    spec: ProtocolSpec,
    made: Mapping[tuple[str, str, int], Made],
    executor: Executor,
) -> dict[str, Curve]:
    """Runs what the journal does not hold yet, and returns all curves by key of their trial."""
    # Seeds first: an interrupted protocol has few seeds of everything rather than everything of a few models.
    every = sorted(itertools.chain.from_iterable(trials), key=lambda trial: trial.seed)
    journal = Journal(
        bench.run.path("trials.jsonl"),
        {
            "seed": bench.run.seed,
            "attacks": {t.key: [t.attack.adversary.config(), t.budgets] for t in every if t.seed == 0},
            "seeds": spec.seeds,
            "shots": spec.shots,
            "data": {name: ground.adversary_data.facts().sha256 for name, ground in bench.grounds.items()},
            "originals": {name: ground.original.facts().sha256 for name, ground in bench.grounds.items()},
            "immunized models": {json.dumps(place): each.model.facts().sha256 for place, each in made.items()},
        },
        "protocol",
    )
    readers = {t.key: partial(kept_curve, t.attack, t.seed, t.budgets, "restricted") for t in every}
    lacking = set(journal.missing(readers))
    missing = [trial for trial in every if trial.key in lacking]
    if every:
        with bench.run.progress("Attacking", len(every), len(every) - len(missing)) as bar:
            for index, curve in executor.run(_work, bench, missing):
                journal.add(missing[index].key, curve.model_dump(mode="json"))
                bar.tick(f"{missing[index].model}: {missing[index].attack.label}")
    return {key: journal.read(key, reader) for key, reader in readers.items()}


def _sittings(
    spec: ProtocolSpec, rows: Sequence[Row], trials: Sequence[Sequence[_Trial]], bench: _Bench
) -> dict[PicturedModel, SplitModel]:
    """Who is pictured: every model after one attack with seed 0, as in the tables; and as released, but for scratch."""
    wanted = spec.pictures.attack if spec.pictures is not None else None
    attack = next((a for a in spec.plan() if wanted in (None, a.label)), None)
    found: dict[PicturedModel, SplitModel] = {}
    for row, mine in zip(rows, trials, strict=True):
        if attack is not None and attack.label in row.covers and mine:
            role, steps = ROLES.get(row.model, "immunized"), attack.epochs[-1] * row.steps
            found[PicturedModel(row.setting, row.model, role, mine[0].attack.adversary, steps)] = bench.victim(mine[0])
    for setting, ground in bench.grounds.items():
        found[PicturedModel(setting, ORIGINAL, "original")] = ground.original
    for (setting, label, seed), model in bench.models.items():
        if seed == 0:
            found[PicturedModel(setting, label, "immunized")] = model
    return found


def _scene(
    name: str, ground: Setting, spec: ProtocolSpec, made: Mapping[tuple[str, str, int], Made], run: Run
) -> SettingScores:
    score = ground.benign.audit_score(ground.original.clone().to(run.device))
    setting = spec.settings[name]
    return SettingScores(
        name=name,
        restricted=ground.restricted.name,
        measure=Measure.of(ground.restricted),
        benign_measure=Measure.of(ground.benign),
        chance=ground.restricted.audit_chance,
        original=score if math.isfinite(score) else None,
        made={(label, seed): each for (where, label, seed), each in made.items() if where == name},
        paper=spec.paper.get(setting.stands_for or name, {}),
        stands_for=setting.stands_for,
    )
