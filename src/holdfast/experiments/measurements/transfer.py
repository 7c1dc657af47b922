"""Side effects of a protocol's defenses: how well each model learns a harmless transfer task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from holdfast.adversaries import FineTuning, Probe
from holdfast.auditing.trials import few_of
from holdfast.errors import unknown
from holdfast.experiments.measurements.attack_curves import (
    Attack,
    AttackContext,
    AttackTrial,
    attack_curves,
    steps_per_epoch,
)
from holdfast.experiments.measurements.base import MEASUREMENTS, Measured, Measurement
from holdfast.experiments.setting import ORIGINAL, Setting
from holdfast.experiments.setting_scores import Measure, mean_of
from holdfast.results import Curve
from holdfast.results.tables import Cell, Outcome, Table
from holdfast.runtime.executors import Executor
from holdfast.tasks import Task


def transfer_attacks(plan: Sequence[Attack], chosen: Sequence[str]) -> list[Attack]:
    """Returns the attacks that learn the transfer task: the chosen ones, or those that train a head alone.

    By default these are the closed-form probes and the attacks of scope `head`, because people train a linear probe on
    a frozen network. If the protocol has none of them, it is a closed-form probe on raw features.

    Args:
        plan: the protocol's attacks.
        chosen: labels of attacks; empty: the default.

    Raises:
        HoldfastError: for a label that is not among the attacks.

    Example:
        >>> [attack.label for attack in transfer_attacks([], [])]
        ['probe ridge raw']
    """
    by_label = {attack.label: attack for attack in plan}
    for label in chosen:
        if label not in by_label:
            raise unknown("attack on the transfer task:", label, by_label)
    if chosen:
        return [by_label[label] for label in chosen]
    closed = Probe("ridge")
    default = Attack(closed.name, closed, plan[0].epochs[:2] if plan else (0, 1), closed.name)
    return [attack for attack in plan if _trains_a_head(attack)] or [default]


def _trains_a_head(attack: Attack) -> bool:
    adversary = attack.adversary
    if isinstance(adversary, Probe):
        return adversary.solver == "ridge"
    return isinstance(adversary, FineTuning) and adversary.strategy.scope == "head"


@MEASUREMENTS.register("transfer")
class Transfer(Measurement):
    """Side effects on the transfer tasks of a protocol's settings."""

    attacks: tuple[str, ...] = ()
    """Labels of the attacks; see `transfer_attacks`."""
    seeds: int = 1
    max_steps_per_epoch: int | None = None

    def measure(self, protocol: Measured) -> Outcome:
        """Returns the table `side_effects`, and a sentence for each defense."""
        if not any(setting.transfer for setting in protocol.context.settings.values()):
            return Outcome({}, {}, [])
        attacks = transfer_attacks(protocol.plan, self.attacks)
        return side_effects(
            attacks, protocol.context, seeds=self.seeds, max_steps_per_epoch=self.max_steps_per_epoch,
            executor=protocol.executor,
        )  # fmt: skip


def side_effects(
    attacks: Sequence[Attack],
    context: AttackContext,
    *,
    seeds: int,
    max_steps_per_epoch: int | None,
    executor: Executor,
) -> Outcome:
    """Returns the table `side_effects`, and a sentence for each defense, of the settings with a transfer task.

    Args:
        attacks: the result of `transfer_attacks`.
        context: models and tasks.
        seeds: repetitions of each attack.
        max_steps_per_epoch: limit on the steps of an epoch.
        executor: where attacks run; it does not change the result.
    """
    settings = {name: setting for name, setting in context.settings.items() if setting.transfer is not None}
    context = replace(context, settings=settings, on="transfer")
    trials, left_out = [], []
    for name, setting in settings.items():
        task = setting.transfer_task
        labels = dict.fromkeys(label for in_setting, label, _ in context.models if in_setting == name)
        samples = few_of(task, context.shots, context.run, 0).size("train")
        for attack in attacks:
            reason = attack.adversary.not_applicable(setting.original, task)
            if reason:
                left_out.append(f"Side effects: {attack.label} does not learn {task.name}: {reason}.")
                continue
            steps = steps_per_epoch(samples, attack.adversary.batch_size, max_steps_per_epoch)
            budgets = tuple(epoch * steps for epoch in attack.epochs)
            trials += [
                AttackTrial(name, model, attack, seed, budgets)
                for model in (ORIGINAL, *labels)
                for seed in range(seeds)
            ]
    curves = attack_curves(
        context, trials, file="side-effects.jsonl", depends_on={}, executor=executor, description="Side effects"
    )
    return _lay_out(settings, trials, curves) + Outcome({}, {}, left_out)


def _lay_out(settings: Mapping[str, Setting], trials: Sequence[AttackTrial], curves: Mapping[str, Curve]) -> Outcome:
    rows: list[dict[str, str | Cell]] = []
    findings: list[str] = []
    several = len(settings) > 1
    for name, setting in settings.items():
        task, measure = setting.transfer_task, Measure.of(setting.transfer_task)
        ends: dict[tuple[str, str], list[float | None]] = {}
        for trial in trials:
            if trial.setting == name:
                ends.setdefault((trial.model, trial.attack.label), []).append(curves[trial.key].scores[-1])
        lost: dict[str, dict[str, tuple[float | None, float | None, float | None]]] = {}
        for (model, attack), own in ends.items():
            first = ends[ORIGINAL, attack]
            gaps = [None if a is None or b is None else b - a for a, b in zip(own, first, strict=True)]
            row: dict[str, str | Cell] = {"setting": name} if several else {}
            row |= {"model": model, "attack": attack, "transfer": Cell.of(map(measure.value, own))}
            if model != ORIGINAL:
                row["transfer drop" if measure.percent else "transfer rise"] = Cell.of(map(measure.difference, gaps))
                lost.setdefault(model, {})[attack] = (mean_of(gaps), mean_of(own), mean_of(first))
            rows.append(row)
        prefix = f"{name}: " if several else ""
        findings += [prefix + _about(model, each, task, measure) for model, each in lost.items()]
    if not rows:
        return Outcome({}, {}, [])
    percent = Measure.of(next(iter(settings.values())).transfer_task).percent
    names = ", ".join(dict.fromkeys(setting.transfer_task.name for setting in settings.values()))
    note = (
        f"How well each model learns a third, harmless task ({names}): its test score after the last epoch, and by how "
        f"much that is {'below' if percent else 'above'} the original's, seed by seed: mean ± standard deviation."
    )
    table = Table(title="Side effects: the transfer task", rows=rows, percent=percent, note=note)
    return Outcome({"side_effects": table}, {}, findings)


def _about(
    model: str, lost: Mapping[str, tuple[float | None, float | None, float | None]], task: Task, measure: Measure
) -> str:
    """A sentence on the attack that loses most."""
    finite = {attack: gap for attack, (gap, _, _) in lost.items() if gap is not None}
    if len(finite) < len(lost):
        return f"Side effects of {model}: an attack that learns {task.name} has no finite score on it."
    attack = max(finite, key=lambda name: finite[name])
    _, own, first = lost[attack]
    gap = measure.difference(finite[attack]) or 0.0
    amount = f"{100 * abs(gap):.1f} points" if measure.percent else f"{abs(gap):.3g}"
    worst = f"of {len(lost)} attacks, the one that loses most" if len(lost) > 1 else "the only attack"
    return (
        f"Side effects of {model}: on {task.name}, harmless, {attack} is at {measure.text(measure.value(own))} and on "
        f"the original at {measure.text(measure.value(first))} ({amount} {'lost' if gap >= 0 else 'gained'}; {worst})."
    )
