"""The functions of the package: immunize a model, audit it, or run a whole recipe; each can write a result folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from pydantic import ValidationError

from holdfast.adversaries import Adversary, Search, battery_config
from holdfast.auditing.spec import AuditSpec
from holdfast.auditing.trials import applicable, few_of
from holdfast.defenses import Defense
from holdfast.defenses.registry import build_defense
from holdfast.errors import HoldfastError
from holdfast.experiments.attacks import outcome_of, run_attacks
from holdfast.experiments.runner import refuse_unused, run_recipe
from holdfast.experiments.workspace import Workspace
from holdfast.metrics.feasibility import assess, check
from holdfast.models import SplitModel, check_fits
from holdfast.results import AuditResult, Curve, Feasibility, Thresholds
from holdfast.runtime import executors
from holdfast.runtime.argument_checks import plain, readable, refuse_truth_as_number
from holdfast.runtime.callbacks import Callback
from holdfast.runtime.devices import checked_threads, cpu_threads
from holdfast.runtime.executors import Executor
from holdfast.tasks import Task
from holdfast.tasks.splits import halves
from holdfast.training import Precision

run = run_recipe


class AuditOptions(TypedDict, total=False):
    """Options of an audit; `AuditSpec` has their defaults.

    Attributes:
        battery: the name of a battery, or a list of adversaries.
        budgets: fine-tuning steps at which to score; ascending, the first 0.
        seeds: number of repetitions, each with other samples, batches and fresh weights.
        decide: add seeds in stages until the band decides the verdict; also to an audit in the folder that could not
            decide.
        max_seeds: most seeds with `decide`; None: four times `seeds`.
        shots: the adversary's training samples per class; None: its whole half.
        trials: of a search, for each model; other batteries have none.
        reported: the restricted score after the last budget, as the model's publisher claims it.
        reported_benign: the benign score of the original, as its publisher claims it.
        side_effects: measure how well harmless tasks are still learned.
        stacked: train adversaries of small models together; curves agree up to rounding.
        precision: of the adversaries' training, "float32" or "bf16".
        micro_batch: samples at once in their training; 0: whole batches.
        measures: further measures of language models, before and after the best attack, such as `lm-eval:arc_easy`.
        thresholds: limits of the verdict; the others keep their defaults.
    """

    battery: str | Sequence[Adversary]
    budgets: Sequence[int]
    seeds: int
    decide: bool
    max_seeds: int | None
    shots: int | None
    trials: int
    reported: float | None
    reported_benign: float | None
    side_effects: bool
    stacked: bool
    precision: Precision
    micro_batch: int
    measures: Sequence[str]
    thresholds: Thresholds | Mapping[str, Any]


def immunize(
    model: SplitModel,
    *,
    benign: Task,
    restricted: Task,
    defense: str | Defense = "sophon",
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    folder: Path | str | None = None,
    quiet: bool = True,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> SplitModel:
    """Returns an immunized copy of a model, with the defense's record on it.

    The record is the copy's `immunization`, an `ImmunizationResult`: whether the defense finished (`completed`), its
    decisions (`events`) and `history`, and why there is no immunized model, if there is none (`nothing`). Read it
    before you release the model.

    Args:
        model: left as it is.
        benign: the task that it must stay good at.
        restricted: the task that it must resist; only the defender's half of its training data is used.
        defense: a name, or a `Defense`.
        seed: of everything random.
        device: `auto`, or a torch device.
        threads: CPU threads of torch; None: its default. One is best for networks of the quickstart's size.
        folder: where to keep checkpoints, `model.safetensors` and `result.json`; a second call continues there.
        quiet: show no progress.
        callbacks: called after each round.
        options: hyper-parameters of the defense, when it is given by name.

    Raises:
        HoldfastError: for input that cannot work, before any work is done.
    """
    chosen = _defense_of(defense, options)
    _check_objects({"model": model}, {"benign": benign, "restricted": restricted})
    threads = checked_threads(threads)
    model = model.unwrapped()
    title = f"{chosen.name} on {model.name}"
    workspace = Workspace.start("immunize", title, seed, device, folder, quiet, callbacks=callbacks)
    workspace.note_tasks({"benign": benign, "restricted": restricted})
    workspace.claim({"defense": {"name": chosen.name, **chosen.config()}, "model": model.facts().sha256})
    workspace.note_model("original", model)
    with cpu_threads(threads):
        immunized, result = workspace.immunize(model, benign, halves(restricted)[0], chosen)
        if folder is not None:
            workspace.save(immunization=result)
    return immunized


def _defense_of(defense: str | Defense, options: Mapping[str, Any]) -> Defense:
    """Returns the defense of this name with these settings, or a given `Defense`."""
    if isinstance(defense, str):
        return build_defense({"name": defense, **options})
    if not isinstance(defense, Defense):
        wanted = f"an instance, such as {defense.__name__}()" if isinstance(defense, type) else "a name or a Defense"
        raise HoldfastError(f"defense is {defense!r}; expected {wanted}.")
    if options:
        raise HoldfastError(
            f"{', '.join(options)}: settings go with the name of a defense; give those of this {defense.name} to its "
            "constructor."
        )
    return defense


def _check_objects(models: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
    """Refuses objects that are not models or tasks, and names the function that makes one."""
    for name, model in models.items():
        if not isinstance(model, SplitModel):
            raise HoldfastError(
                f"{name} is {type(model).__name__}; expected a SplitModel: load_model(...) or SplitModel.of(...)."
            )
    for name, task in tasks.items():
        if not isinstance(task, Task):
            given = repr(task) if isinstance(task, str) else type(task).__name__
            raise HoldfastError(f"{name} is {given}; expected a task: holdfast.load_task(...).")


def audit(
    model: SplitModel,
    *,
    original: SplitModel,
    benign: Task,
    restricted: Task,
    transfer: Task | None = None,
    reference: SplitModel | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    folder: Path | str | None = None,
    quiet: bool = True,
    executor: Executor | str = "serial",
    callbacks: Sequence[Callback] = (),
    source: Mapping[str, str | None] | None = None,
    **options: Unpack[AuditOptions],
) -> AuditResult:
    """Audits a model against its controls.

    Args:
        model: the released model.
        original: the model before immunization.
        benign: the task of the original.
        restricted: the task that the model must resist; adversaries get their half of its training data.
        transfer: a harmless task that the model should still learn as well as the original does; optional.
        reference: another public model, fine-tuned in place of one from scratch; the verdict then holds against it. For
            models that are too large to train one from scratch.
        seed: of everything random.
        device: `auto`, or a torch device.
        threads: CPU threads of torch; None: its default. One is best for networks of the quickstart's size.
        folder: where to keep finished trials, `result.json` and `report.html`; a second call continues there.
        quiet: show no progress.
        executor: where trials run: `serial`, `processes`, `ray`, ...; it does not change the result.
        callbacks: called after each trial.
        source: names of the models and tasks on the command line, for `holdfast replay`.
        options: see `AuditOptions`.

    Raises:
        HoldfastError: for input that cannot work, before any work is done.
    """
    optional = {} if transfer is None else {"transfer": transfer}
    models = {"model": model, "original": original, **({} if reference is None else {"reference": reference})}
    _check_objects(models, {"benign": benign, "restricted": restricted, **optional})
    settings = plain(dict(options))
    try:
        spec = AuditSpec.model_validate(settings)
    except ValidationError as error:
        raise readable(error, "audit", AuditSpec) from error
    refuse_truth_as_number(settings, spec, "audit")
    refuse_unused(spec, transfer is not None)
    threads, executor = checked_threads(threads), executors.executor(executor)
    model, original = model.unwrapped(), original.unwrapped()
    reference = None if reference is None else reference.unwrapped()
    title = f"Audit of {model.name} on {restricted.name}"
    workspace = Workspace.start("audit", title, seed, device, folder, quiet, callbacks=callbacks)
    workspace.note_tasks({"benign": benign, "restricted": restricted, "transfer": transfer})
    used = {"original": original, "model": model, **({} if reference is None else {"reference": reference})}
    hashes = {name: each.facts().sha256 for name, each in used.items()}
    workspace.claim({"audit": spec.model_dump(mode="json"), **hashes})
    if source is not None:
        # Not among the claimed settings: a model that was moved is still the same model.
        workspace.recipe = {**workspace.recipe, "source": dict(source)}
    for role, each in used.items():
        workspace.note_model("immunized" if role == "model" else role, each)
    with cpu_threads(threads):
        result = workspace.audit(model, original, benign, halves(restricted)[1], transfer, spec, executor, reference)
        if folder is not None:
            workspace.save(audit=result)
    return result


def attack(
    model: SplitModel,
    *,
    restricted: Task,
    benign: Task | None = None,
    battery: str | Sequence[Adversary] = "quick-v1",
    budgets: Sequence[int] = (0, 5, 10, 20, 50, 100),
    shots: int | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    folder: Path | str | None = None,
    quiet: bool = True,
) -> list[Curve]:
    """Fine-tunes copies of a model as adversaries do, and keeps what they made; without controls or a verdict.

    Args:
        model: left as it is.
        restricted: the task to learn; adversaries get their half of its training data, as in an audit.
        benign: the model's own task, which some adversaries use, and which is scored afterwards; None: it is not given.
        battery: the name of a battery that does not search, or a list of adversaries. Those that cannot start are left
            out, with the reason in the result.
        budgets: fine-tuning steps at which to score; ascending, the first 0.
        shots: the adversary's training samples per class; None: its whole half.
        seed: of everything random.
        device: `auto`, or a torch device.
        threads: CPU threads of torch; None: its default.
        folder: where to keep `result.json`, `report.html` and, below `attacked/`, the files of
            `holdfast.adversaries.saving.save_attacked`; a second call continues there.
        quiet: show no progress.

    Returns:
        One curve for each adversary that could start.

    Raises:
        HoldfastError: for input that cannot work, before any work is done.
    """
    _check_objects({"model": model}, {"restricted": restricted, **({} if benign is None else {"benign": benign})})
    settings = plain({"battery": battery, "budgets": budgets, "shots": shots})
    try:
        spec = AuditSpec.model_validate(settings)
    except ValidationError as error:
        raise readable(error, "attack", AuditSpec) from error
    refuse_truth_as_number(settings, spec, "attack")
    chosen = spec.plan()
    if isinstance(chosen, Search):
        raise HoldfastError(f"{spec.battery_name} is a search, which runs in an audit; expected a list of adversaries.")
    threads = checked_threads(threads)
    model = model.unwrapped()
    workspace = Workspace.start("attack", f"Attack on {model.name} with {restricted.name}", seed, device, folder, quiet)
    workspace.note_tasks({"benign": benign, "restricted": restricted})
    made = {"adversaries": battery_config(chosen), "budgets": spec.budgets, "shots": shots}
    workspace.claim({**made, "model": model.facts().sha256})
    workspace.note_model("attacked", model)
    run = workspace.run
    if benign is not None:
        check_fits(model, benign, own_task=True, trainable=False)
    check_fits(model, restricted, own_task=False, trainable=False)
    with cpu_threads(threads):
        task = few_of(halves(restricted)[1], shots, run, 0)
        able, refused = applicable(spec.battery_name, chosen, model, task)
        with workspace.timed("attack"):
            curves = run_attacks(model, task, able, benign=benign, budgets=spec.budgets, run=run)
        if folder is not None:
            workspace.save(outcome=outcome_of(curves, able, refused, task.audit_unit, run.folder))
    return curves


def feasibility(
    benign: Task,
    restricted: Task,
    *,
    model: SplitModel | None = None,
    ridge: float = 0.01,
    q: float = 0.9,
    device: str = "auto",
    threads: int | None = None,
    folder: Path | str | None = None,
    quiet: bool = True,
) -> Feasibility:
    """Predicts from spectra alone whether a linear extractor can immunize a model, how much, and at what benign cost.

    Args:
        benign: the task that should stay easy to learn; its training split is used.
        restricted: the task that should become hard to learn; the defender's half of its training split is used.
        model: the model whose features are used; None: the inputs themselves.
        ridge: per sample, for the bound on features that only one of the tasks uses.
        q: share of the removable loss that the predicted number of steps removes.
        device: `auto`, or a torch device.
        threads: CPU threads of torch; None: its default.
        folder: where to write `result.json` and `report.html`.
        quiet: show no progress.

    Raises:
        HoldfastError: for input that cannot work.
    """
    _check_objects({} if model is None else {"model": model}, {"benign": benign, "restricted": restricted})
    threads = checked_threads(threads)
    model = None if model is None else model.unwrapped()
    check(model, benign, restricted, ridge=ridge, q=q)
    title = f"{benign.name} against {restricted.name} on {'inputs' if model is None else model.name}"
    workspace = Workspace.start("feasibility", title, 0, device, folder, quiet)
    workspace.note_tasks({"benign": benign, "restricted": restricted})
    if model is not None:
        workspace.note_model("original", model)
    workspace.claim({"ridge": ridge, "q": q, "model": None if model is None else model.facts().sha256})
    with cpu_threads(threads), workspace.timed("feasibility"):
        placed = None if model is None else model.clone().to(workspace.run.device)
        workspace.run.say("Taking the spectra of both tasks")
        result, figures = assess(placed, benign, halves(restricted)[0], ridge=ridge, q=q)
    if folder is not None:
        workspace.save(feasibility=result, figures=figures)
    return result
