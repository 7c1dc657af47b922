"""Adversaries on one model, without controls: their scores, and what they made, as files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.adversaries import Adversary, battery_config
from holdfast.adversaries.saving import save_attacked, save_head
from holdfast.models import SplitModel
from holdfast.results import Cell, Curve, Lines, Outcome, Table
from holdfast.runtime.jobs import Job, JournalStore, run_jobs
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run
from holdfast.tasks import Task

ATTACKED = "attacked"
"""Folder of what the adversaries made, one folder each."""


@dataclass(frozen=True)
class AttackContext:
    """Inputs that all attacks share.

    Attributes:
        model: the released model.
        task: the restricted task with the adversary's training data.
        benign: the model's own task; None: it is not given.
        budgets: steps at which to score.
        run: seed, device and folder.
        tick: called after each step.
    """

    model: SplitModel
    task: Task
    benign: Task | None
    budgets: tuple[int, ...]
    run: Run = field(repr=False)
    tick: Callable[[], object]


def place_of(number: int, adversary: Adversary) -> str:
    """Returns the folder of an adversary's files, within the job's.

    Example:
        >>> from holdfast.adversaries import battery
        >>> place_of(0, battery("quick-v1")[0])
        'attacked/01-direct-all-momentum-0.0001-b50-wd0.0001'
    """
    return f"{ATTACKED}/{number + 1:02d}-{re.sub(r'[^A-Za-z0-9.]+', '-', adversary.name).strip('-')[:60]}"


def _attack(context: AttackContext, inputs: tuple[int, Adversary]) -> Curve:
    number, adversary = inputs
    folder = context.run.folder

    def keep(attacked: SplitModel) -> None:
        if folder is None:
            return
        place = folder / place_of(number, adversary)
        if adversary.frozen_body:
            save_head(attacked, place)
        else:
            save_attacked(context.model, attacked, context.task, place)

    return adversary.attack(
        context.model, context.task, budgets=context.budgets, run=context.run, benign=context.benign, keep=keep,
        score_benign=context.benign is not None, after_step=context.tick, role="original",
    )  # fmt: skip


def run_attacks(
    model: SplitModel,
    task: Task,
    adversaries: Sequence[Adversary],
    *,
    benign: Task | None,
    budgets: Sequence[int],
    run: Run,
) -> list[Curve]:
    """Runs adversaries one after another, and returns their curves.

    A curve is kept as soon as its attack is finished, after what the attack made is written; a second call runs only
    those that are missing, with the same random numbers.

    Args:
        model: the released model; not changed.
        task: the restricted task with the adversary's training data.
        adversaries: each must be able to start.
        benign: the model's own task; None: attacks that need it are refused, and no benign score is taken.
        budgets: steps at which to score, ascending, the first 0.
        run: seed, device, folder and progress display.
    """
    journal = Journal(
        run.path("attacks.jsonl"),
        {
            "seed": run.seed,
            "battery": battery_config(adversaries),
            "budgets": list(budgets),
            "data": task.facts().sha256,
            "benign": None if benign is None else benign.facts().sha256,
            "model": model.facts().sha256,
        },
        "attack",
    )
    store = JournalStore(journal, {a.name: partial(_kept, a, tuple(budgets)) for a in adversaries})
    missing = len(store.missing([a.name for a in adversaries]))
    steps = budgets[-1]
    with run.progress("Attacking, in steps", len(adversaries) * steps, (len(adversaries) - missing) * steps) as bar:
        context = AttackContext(model, task, benign, tuple(budgets), run, bar.tick)
        jobs = [Job(a.name, (number, a), a.name) for number, a in enumerate(adversaries)]
        return run_jobs(_attack, context, jobs, store, run=run, executor=None)


def _kept(adversary: Adversary, budgets: tuple[int, ...], entry: Any) -> Curve:
    """Returns a curve from its entry in the journal; raises an error if it is another one's."""
    curve = Curve.model_validate(entry)
    if curve.adversary != adversary.name or tuple(curve.budgets) != budgets:
        raise ValueError(f"it is of {curve.adversary} at {curve.budgets}")
    return curve


def outcome_of(
    curves: Sequence[Curve], adversaries: Sequence[Adversary], refused: dict[str, str], unit: str, folder: Path | None
) -> Outcome:
    """Returns curves as a table, a figure and sentences.

    Args:
        curves: of the adversaries, in their order.
        adversaries: those that ran.
        refused: names of those that could not start, with the reasons.
        unit: of the scores, such as accuracy.
        folder: the job's; None: nothing was written.
    """
    rows: list[dict[str, str | Cell]] = []
    for number, (curve, adversary) in enumerate(zip(curves, adversaries, strict=True)):
        scores = {str(steps): Cell.of([score]) for steps, score in zip(curve.budgets, curve.scores, strict=True)}
        place = {} if folder is None else {"files": _listed(folder, place_of(number, adversary))}
        rows.append({"adversary": curve.adversary, **scores, "benign after": Cell.of([curve.benign_after]), **place})
    tables = {"attacks": Table(title=f"Restricted {unit} after fine-tuning steps", rows=rows, note=_note(unit))}
    if refused:
        not_run: list[dict[str, str | Cell]] = [{"adversary": name, "why": why} for name, why in refused.items()]
        tables["not run"] = Table(title="Adversaries that cannot start", rows=not_run)
    best = max(curves, key=lambda c: -1e300 if c.scores[-1] is None else c.scores[-1])
    last = best.scores[-1]
    shown = "no finite score" if last is None else f"{unit} {last:.3f}"
    findings = [f"Best after {best.budgets[-1]} steps: {best.adversary}, with {shown}."]
    if folder is not None:
        findings.append(f"What the adversaries made is in {ATTACKED}/, one folder each.")
    if refused:
        findings.append(f"{len(refused)} of {len(refused) + len(curves)} adversaries cannot start; the table says why.")
    lines = Lines(
        title=f"Restricted {unit}", x_title="fine-tuning steps", y_title=unit,
        x=[float(steps) for steps in curves[0].budgets], series={c.adversary: list(c.scores) for c in curves},
    )  # fmt: skip
    return Outcome(tables, {"attacks": lines}, findings)


def _note(unit: str) -> str:
    return f"Columns are steps; benign after: the benign {unit} after the last one. Not averaged: one repetition."


def _listed(folder: Path, place: str) -> str:
    return ", ".join(f"{place}/{path.name}" for path in sorted((folder / place).iterdir()))
