"""Side effects of a protocol's defenses: how well a third, harmless task is learned on each model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from holdfast.adversaries import FineTuning, Probe
from holdfast.auditing.trials import few_of
from holdfast.errors import unknown
from holdfast.experiments.measurements.attack_curves import Attack, kept_curve, rescaled, steps_per_epoch
from holdfast.experiments.setting import Setting
from holdfast.experiments.setting_scores import ORIGINAL, Measure, mean_of
from holdfast.models import SplitModel
from holdfast.results import Curve
from holdfast.results.tables import Cell, Outcome, Table
from holdfast.runtime.executors import Executor
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run
from holdfast.tasks import Task


@dataclass(frozen=True)
class _Trial:
    """One learner of the transfer task, on one model, with one seed."""

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


def learners(plan: Sequence[Attack], chosen: Sequence[str]) -> list[Attack]:
    """Returns the attacks that learn the transfer task: the chosen ones, or those that train a head alone.

    By default these are the closed-form probes and the fine-tuning of heads: a linear probe is what people do with a
    frozen network, and where nothing else is linear there is the closed form on raw features.

    Args:
        plan: the protocol's attacks.
        chosen: labels; none: the default.

    Raises:
        HoldfastError: for a label that is not among the attacks.

    Example:
        >>> [attack.label for attack in learners([], [])]
        ['probe ridge raw']
    """
    by_label = {attack.label: attack for attack in plan}
    for label in chosen:
        if label not in by_label:
            raise unknown("attack on the transfer task:", label, by_label)
    if chosen:
        return [by_label[label] for label in chosen]
    found = [attack for attack in plan if _trains_a_head(attack)]
    if found:
        return found
    closed = Probe("ridge")
    return [Attack(closed.name, closed, plan[0].epochs[:2] if plan else (0, 1), closed.name)]


def _trains_a_head(attack: Attack) -> bool:
    adversary = attack.adversary
    if isinstance(adversary, Probe):
        return adversary.solver == "ridge"
    return isinstance(adversary, FineTuning) and adversary.strategy.scope == "head"


def side_effects(
    attacks: Sequence[Attack],
    grounds: Mapping[str, Setting],
    models: Mapping[tuple[str, str, int], SplitModel],
    *,
    seeds: int,
    immunizations: int,
    shots: int | None,
    max_steps_per_epoch: int | None,
    run: Run,
    executor: Executor,
) -> Outcome:
    """Returns the table `side_effects`, and a sentence for each defense; settings without a transfer task have none.

    Args:
        attacks: who learns; see `learners`.
        grounds: models and tasks by setting.
        models: immunized ones by setting, label and seed of the defense.
        seeds: repetitions of each learner.
        immunizations: how many seeds each defense has.
        shots: training samples a class; None: all.
        max_steps_per_epoch: cuts epochs short.
        run: seed, device, folder.
        executor: where it is computed; it does not change the result.
    """
    bench = _Bench({n: g for n, g in grounds.items() if g.transfer is not None}, models, immunizations, shots, run)
    trials, left_out = [], []
    for setting, ground in bench.grounds.items():
        task = _task(ground)
        labels = dict.fromkeys(label for where, label, _ in models if where == setting)
        samples = few_of(task, shots, run, 0).size("train")
        for attack in attacks:
            reason = attack.adversary.not_applicable(ground.original, task)
            if reason:
                left_out.append(f"Side effects: {attack.label} does not learn {task.name}: {reason}.")
                continue
            steps = steps_per_epoch(samples, attack.adversary.batch_size, max_steps_per_epoch)
            budgets = tuple(epoch * steps for epoch in attack.epochs)
            trials += [
                _Trial(setting, model, attack, seed, budgets) for model in (ORIGINAL, *labels) for seed in range(seeds)
            ]
    curves = _learn(bench, trials, executor)
    return _lay_out(bench.grounds, trials, curves) + Outcome({}, {}, left_out)


def _task(ground: Setting) -> Task:
    assert ground.transfer is not None
    return ground.transfer


def _learn(bench: _Bench, trials: Sequence[_Trial], executor: Executor) -> dict[str, Curve]:
    journal = Journal(
        bench.run.path("side-effects.jsonl"),
        {
            "seed": bench.run.seed,
            "attacks": {t.key: [t.attack.adversary.config(), t.budgets] for t in trials if t.seed == 0},
            "shots": bench.shots,
            "data": {name: _task(ground).facts().sha256 for name, ground in bench.grounds.items()},
            "originals": {name: ground.original.facts().sha256 for name, ground in bench.grounds.items()},
            "immunized models": {json.dumps(place): model.facts().sha256 for place, model in bench.models.items()},
        },
        "protocol",
    )
    readers = {t.key: partial(kept_curve, t.attack, t.seed, t.budgets, "transfer") for t in trials}
    lacking = set(journal.missing(readers))
    missing = [trial for trial in trials if trial.key in lacking]
    with bench.run.progress("Side effects", len(trials), len(trials) - len(missing)) as bar:
        for index, curve in executor.run(_work, bench, missing):
            journal.add(missing[index].key, curve.model_dump(mode="json"))
            bar.tick(f"{missing[index].model}: {missing[index].attack.label}")
    return {key: journal.read(key, reader) for key, reader in readers.items()}


def _work(bench: _Bench, trial: _Trial) -> Curve:
    ground = bench.grounds[trial.setting]
    original = trial.model == ORIGINAL
    model = ground.original if original else bench.models[trial.setting, trial.model, trial.seed % bench.immunizations]
    task = few_of(_task(ground), bench.shots, bench.run, trial.seed)
    curve = trial.attack.adversary.attack(
        model,
        task,
        budgets=trial.budgets,
        run=bench.run,
        role="original" if original else "immunized",
        seed=trial.seed,
        benign=ground.benign,
    ).model_copy(update={"task": "transfer"})
    return curve if task.higher_is_better else rescaled(curve, task.chance / _task(ground).chance)


def _lay_out(grounds: Mapping[str, Setting], trials: Sequence[_Trial], curves: Mapping[str, Curve]) -> Outcome:
    rows: list[dict[str, str | Cell]] = []
    findings: list[str] = []
    several = len(grounds) > 1
    for setting, ground in grounds.items():
        task, measure = _task(ground), Measure.of(_task(ground))
        mine = [trial for trial in trials if trial.setting == setting]
        lost: dict[str, dict[str, tuple[float | None, float | None, float | None]]] = {}
        for model, attack in dict.fromkeys((t.model, t.attack.label) for t in mine):
            own = [curves[t.key].scores[-1] for t in mine if (t.model, t.attack.label) == (model, attack)]
            first = [curves[t.key].scores[-1] for t in mine if (t.model, t.attack.label) == (ORIGINAL, attack)]
            gaps = [None if a is None or b is None else b - a for a, b in zip(own, first, strict=True)]
            row: dict[str, str | Cell] = {"setting": setting} if several else {}
            row |= {"model": model, "attack": attack, "transfer": Cell.of(map(measure.value, own))}
            if model != ORIGINAL:
                row["transfer drop" if measure.percent else "transfer rise"] = Cell.of(map(measure.difference, gaps))
                lost.setdefault(model, {})[attack] = (mean_of(gaps), mean_of(own), mean_of(first))
            rows.append(row)
        prefix = f"{setting}: " if several else ""
        findings += [prefix + _about(model, each, task, measure) for model, each in lost.items()]
    if not rows:
        return Outcome({}, {}, [])
    percent = Measure.of(_task(next(iter(grounds.values())))).percent
    names = ", ".join(dict.fromkeys(_task(ground).name for ground in grounds.values()))
    note = (
        f"How well a third, harmless task ({names}) is learned on each model: its test score after the last epoch, and "
        f"what that is {'below' if percent else 'above'} the original's, seed by seed: mean ± standard deviation."
    )
    table = Table(title="Side effects: the transfer task", rows=rows, percent=percent, note=note)
    return Outcome({"side_effects": table}, {}, findings)


def _about(
    model: str,
    lost: Mapping[str, tuple[float | None, float | None, float | None]],
    task: Task,
    measure: Measure,
) -> str:
    """The learner who loses most."""
    finite = {attack: gap for attack, (gap, _, _) in lost.items() if gap is not None}
    if len(finite) < len(lost):
        return f"Side effects of {model}: some learner of {task.name} has no finite score on it."
    attack = max(finite, key=lambda name: finite[name])
    _, own, first = lost[attack]
    gap = measure.difference(finite[attack]) or 0.0
    amount = f"{100 * abs(gap):.1f} points" if measure.percent else f"{abs(gap):.3g}"
    worst = f"of {len(lost)} learners, who loses most" if len(lost) > 1 else "the only learner"
    return (
        f"Side effects of {model}: on {task.name}, harmless, {attack} is at {measure.text(measure.value(own))} and on "
        f"the original at {measure.text(measure.value(first))} ({amount} {'lost' if gap >= 0 else 'gained'}; {worst})."
    )
