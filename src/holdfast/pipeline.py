"""The verbs: immunize a model, audit a model, or run a whole recipe; each can leave a folder that others can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from holdfast import executors
from holdfast.adversaries import Search, battery
from holdfast.assessing import assess, check
from holdfast.auditing import AuditSpec
from holdfast.defenses import Defense
from holdfast.errors import HoldfastError
from holdfast.execution import Run, checked_threads, cpu_threads, resolve_device
from holdfast.executors import Executor
from holdfast.finetune import PretrainSpec
from holdfast.immunizing import Ground, borrow_all, check_reuse
from holdfast.job import Job
from holdfast.models import ModelSpec, SplitModel, check_fits, load_model, load_task_for, read_by
from holdfast.picturing import check_pictures
from holdfast.protocol import SettingSpec, check_kinds, orders, protocol
from holdfast.ratios import check_conditioning
from holdfast.recipe import (
    AnyRecipe,
    ProtocolRecipe,
    StudyRecipe,
    build_defense,
    plain,
    readable,
    refuse_truth_as_number,
)
from holdfast.results import (
    AuditResult,
    Feasibility,
    RunResult,
)
from holdfast.study import sources, study
from holdfast.tasks import Task, TaskSpec, load_task

HALVES_SEED = 0
"""Seed of the split into defender's and adversary's half. It is the same for everybody, whatever their run's seed, so
that a defender and an auditor who never met do not share restricted training data, even if their classes differ."""


def halves(restricted: Task) -> tuple[Task, Task]:
    """Returns the defender's and the adversary's half of a restricted task's training data."""
    return restricted.halves(HALVES_SEED)


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
    **options: Any,
) -> SplitModel:
    """Returns an immunized copy of a model, with the defense's record on it.

    The record is the copy's `immunization`, an `ImmunizationResult`: whether the defense gave up (`completed`), what it
    did of its own accord (`events`), its `history`, and whether there is an immunized model at all (`nothing` says why
    not). Look at it before you release anything.

    Args:
        model: left as it is.
        benign: what it must stay good at.
        restricted: what it must not be fine-tuned to; only the defender's half of its training data is used.
        defense: a name, or a `Defense`.
        seed: of everything random.
        device: `auto`, or a torch device.
        threads: CPU threads of torch; None: its default. One is best for networks of the quickstart's size.
        folder: where to keep checkpoints, `model.safetensors` and `result.json`; a second call continues there.
        quiet: show no progress.
        options: hyper-parameters of the defense, when it is given by name.

    Raises:
        HoldfastError: for input that cannot work, before any work is done.
    """
    chosen = _chosen(defense, options)
    _check_objects({"model": model}, {"benign": benign, "restricted": restricted})
    threads = checked_threads(threads)
    model = model.made_plain()
    job = Job.start("immunize", f"{chosen.name} on {model.name}", seed, device, folder, quiet)
    job.note_tasks({"benign": benign, "restricted": restricted})
    job.claim({"defense": {"name": chosen.name, **chosen.config()}, "model": model.facts().sha256})
    job.note_model("original", model)
    with cpu_threads(threads):
        immunized, result = job.immunize(model, benign, halves(restricted)[0], chosen)
        if folder is not None:
            job.save(immunization=result)
    return immunized


def _chosen(defense: str | Defense, options: Mapping[str, Any]) -> Defense:
    """Returns a defense by name with its settings, or as it was given."""
    if isinstance(defense, str):
        return build_defense({"name": defense, **options})
    if not isinstance(defense, Defense):
        made = f"an instance, such as {defense.__name__}()" if isinstance(defense, type) else "a name or a Defense"
        raise HoldfastError(f"defense is {defense!r}; expected {made}.")
    if options:
        raise HoldfastError(
            f"{', '.join(options)}: settings go with the name of a defense; this one, {defense.name}, has its own. "
            "Give them to its constructor."
        )
    return defense


def _check_objects(models: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
    """Refuses what is no model or task of Holdfast's, with the function that makes one of it."""
    for name, model in models.items():
        if not isinstance(model, SplitModel):
            raise HoldfastError(
                f"{name} is {type(model).__name__}; expected a SplitModel: load_model(...) or SplitModel.of(...)."
            )
    for name, task in tasks.items():
        if not isinstance(task, Task):
            what = repr(task) if isinstance(task, str) else type(task).__name__
            raise HoldfastError(f"{name} is {what}; expected a task: holdfast.load_task(...).")


def _refuse_idle(spec: AuditSpec, transfer: bool = False) -> None:
    """Refuses settings that would be taken and do nothing.

    A recipe may name a transfer task and leave side effects out at some of its scales.
    """
    if "trials" in spec.model_fields_set and not isinstance(battery(spec.battery), Search):
        raise HoldfastError(f"trials is {spec.trials}, and {spec.battery} is not a search; leave it out.")
    if transfer and not spec.side_effects:
        raise HoldfastError(
            "There is a transfer task, and side_effects is off, so that it would not be used; leave one of them out."
        )


def audit(
    model: SplitModel,
    *,
    original: SplitModel,
    benign: Task,
    restricted: Task,
    transfer: Task | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    folder: Path | str | None = None,
    quiet: bool = True,
    executor: Executor | str = "serial",
    source: Mapping[str, str | None] | None = None,
    **options: Any,
) -> AuditResult:
    """Audits a model against its controls.

    Args:
        model: the released model in question.
        original: what it was before immunization.
        benign: its own task.
        restricted: the task that it must not be fine-tuned to; adversaries get their half of its training data.
        transfer: a harmless task that the model should still learn as well as the original does, if there is one.
        seed: of everything random.
        device: `auto`, or a torch device.
        threads: CPU threads of torch; None: its default. One is best for networks of the quickstart's size.
        folder: where to keep finished trials, `result.json` and `report.html`; a second call continues there.
        quiet: show no progress.
        executor: where trials run: `serial`, `processes`, `ray`, ...; it does not change the result.
        source: how the command line names the models and tasks, for `holdfast replay`.
        options: of `AuditSpec`: battery, budgets, seeds, shots, thresholds.

    Raises:
        HoldfastError: for input that cannot work, before any work is done.
    """
    _check_objects({"model": model, "original": original}, {"benign": benign, "restricted": restricted})
    if transfer is not None:
        _check_objects({}, {"transfer": transfer})
    options = plain(options)
    try:
        spec = AuditSpec.model_validate(options)
    except ValidationError as error:
        raise readable(error, "audit", AuditSpec) from error
    refuse_truth_as_number(options, spec, "audit")
    _refuse_idle(spec, transfer is not None)
    threads, chosen = checked_threads(threads), executors.executor(executor)
    model, original = model.made_plain(), original.made_plain()
    job = Job.start("audit", f"Audit of {model.name} on {restricted.name}", seed, device, folder, quiet)
    facts = {"model": model.facts().sha256, "original": original.facts().sha256}
    job.note_tasks({"benign": benign, "restricted": restricted, "transfer": transfer})
    job.claim({"audit": spec.model_dump(mode="json"), **facts})
    if source is not None:
        # Beside the job's settings, not among them: a model that was moved is the same model.
        job.recipe = {**job.recipe, "source": dict(source)}
    job.note_model("original", original)
    job.note_model("immunized", model)
    with cpu_threads(threads):
        result = job.audit(model, original, benign, halves(restricted)[1], transfer, spec, chosen)
        if folder is not None:
            job.save(audit=result)
    return result


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
    """Says from spectra alone whether a linear extractor can immunize a model, by how much, and at what benign cost.

    Args:
        benign: what should stay easy to learn; its training split is used.
        restricted: what should become hard to learn; the defender's half of its training split is used.
        model: whose features are meant; None: the inputs themselves.
        ridge: per sample, for the bound on features that one of the tasks does not use.
        q: share of the removable loss in the predicted number of steps.
        device: `auto`, or a torch device.
        threads: CPU threads of torch; None: its default.
        folder: where to write `result.json` and `report.html`.
        quiet: show no progress.

    Raises:
        HoldfastError: for input that cannot work.
    """
    _check_objects({} if model is None else {"model": model}, {"benign": benign, "restricted": restricted})
    threads = checked_threads(threads)
    model = None if model is None else model.made_plain()
    check(model, benign, restricted, ridge=ridge, q=q)
    on = "inputs" if model is None else model.name
    job = Job.start("feasibility", f"{benign.name} against {restricted.name} on {on}", 0, device, folder, quiet)
    job.note_tasks({"benign": benign, "restricted": restricted})
    if model is not None:
        job.note_model("original", model)
    job.claim({"ridge": ridge, "q": q, "model": None if model is None else model.facts().sha256})
    with cpu_threads(threads), job.timed("feasibility"):
        placed = None if model is None else model.clone().to(job.run.device)
        job.run.say("Taking the spectra of both tasks")
        found, figures = assess(placed, benign, halves(restricted)[0], ridge=ridge, q=q)
    if folder is not None:
        job.save(feasibility=found, figures=figures)
    return found


def run_recipe(
    recipe: AnyRecipe,
    *,
    folder: Path,
    data_dir: Path | str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
    executor: Executor | str = "serial",
    reuse: Sequence[Path] = (),
) -> RunResult:
    """Runs a recipe from data to report, or what is missing of it.

    Args:
        recipe: see `holdfast.recipe.load`.
        folder: gets `result.json`, `report.html`, `model.safetensors` and `checkpoints/`. If it already holds this very
            recipe, the job continues where it was; if it holds another, it is refused.
        data_dir: where tasks and weights are looked up.
        device: `auto`, or a torch device.
        overwrite: throw away what a former run left in the folder.
        quiet: show no progress.
        executor: where the audit's trials run, see `audit`, or a protocol's immunizations and attacks; studies have
            none.
        reuse: folders of other protocols' runs, whose immunized models are taken where they are the very same.

    Raises:
        HoldfastError: for input that cannot work; nothing in the folder is lost.
    """
    trials_run_on = executors.executor(executor)
    if not isinstance(recipe, AnyRecipe):
        raise HoldfastError(f"recipe is {recipe!r}; expected what holdfast.recipe.load(...) returns.")
    if any(Path(other).resolve() == Path(folder).resolve() for other in reuse):
        raise HoldfastError(f"--reuse {str(folder)!r} is the run's own folder, and what it holds is used anyway.")
    if isinstance(recipe, ProtocolRecipe):
        return _run_protocol(recipe, folder, data_dir, device, overwrite, quiet, trials_run_on, reuse)
    if reuse:
        raise HoldfastError("--reuse is for protocols; this recipe is a study or a run, and immunizes by itself.")
    if isinstance(recipe, StudyRecipe):
        if trials_run_on.name != "serial":
            raise HoldfastError(f"A study has no trials that {trials_run_on.name!r} could run; leave --executor out.")
        return _run_study(recipe, folder, data_dir, device, overwrite, quiet)
    defense = recipe.build_defense()
    _refuse_idle(recipe.audit)
    chosen = resolve_device(device)
    benign = load_task_for(recipe.benign, recipe.model, data_dir=data_dir)
    restricted = load_task_for(recipe.restricted, recipe.model, data_dir=data_dir)
    transfer = None if recipe.transfer is None else load_task_for(recipe.transfer, recipe.model, data_dir=data_dir)
    run = Run(recipe.seed, chosen)
    with run.seeded("initialise"):
        model = load_model(recipe.model, benign, data_dir=data_dir, device=chosen)
    _refuse_without_weights(f"Recipe {recipe.title!r}", recipe.model, model, recipe.pretrain)
    check_fits(model, restricted, own_task=False)
    if transfer is not None:
        check_fits(model, transfer, own_task=False)
    defenders, adversarys = halves(restricted)
    if recipe.audit.shots is not None:
        adversarys.few_shot(recipe.audit.shots, 0)

    job = Job.start("run", recipe.title, recipe.seed, device, folder, quiet, recipe.resolved(), overwrite)
    job.note_tasks({"benign": benign, "restricted": restricted, "transfer": transfer})
    job.claim({"recipe": job.recipe, "model": model.facts().sha256})
    finished = job.finished()
    if finished is not None:
        return finished
    with job.replacing(), cpu_threads(recipe.threads):
        original = job.original(model, benign, recipe.pretrain)
        immunized, immunization = job.immunize(original, benign, defenders, defense)
        audited = job.audit(immunized, original, benign, adversarys, transfer, recipe.audit, trials_run_on)
        return job.save(immunization=immunization, audit=audited)


def _run_study(
    recipe: StudyRecipe, folder: Path, data_dir: Path | str | None, device: str, overwrite: bool, quiet: bool
) -> RunResult:
    methods = recipe.build_methods()
    chosen = resolve_device(device)
    tasks = {
        name: [load_task_for(spec, recipe.model, data_dir=data_dir) for spec in specs]
        for name, specs in sources(recipe)
    }
    run = Run(recipe.seed, chosen)
    model = None
    if recipe.model is not None:
        first = next(iter(tasks.values()))[0]
        with run.seeded("initialise"):
            model = load_model(recipe.model, first, data_dir=data_dir, device=chosen)
    job = Job.start("study", recipe.title, recipe.seed, device, folder, quiet, recipe.resolved(), overwrite)
    job.note_tasks(
        {
            f"{name} {role}": task
            for name, each in tasks.items()
            for role, task in zip(("benign", "restricted") if len(each) > 1 else ("data",), each, strict=True)
        }
    )
    if model is not None:
        job.note_model("original", model)
    job.claim({"recipe": job.recipe, "model": None if model is None else model.facts().sha256})
    finished = job.finished()
    if finished is not None:
        return finished
    with job.replacing(), cpu_threads(recipe.threads), job.timed("study"):
        outcome = study(recipe, methods, tasks, model, run=job.run)
    with cpu_threads(recipe.threads):
        return job.save(outcome=outcome)


def _refuse_without_weights(what: str, spec: ModelSpec, model: SplitModel, pretrain: PretrainSpec | None) -> None:
    own = spec.options.get("pretrained") or spec.name.startswith("hf:")
    if pretrain is None and model.fresh_head and spec.weights is None:
        raise HoldfastError(f"{what}: {model.name} comes without a head for classes. Give `pretrain` to train one.")
    if pretrain is None and spec.weights is None and not own:
        raise HoldfastError(f"{what}: the model has no weights. Give `model.weights`, or `pretrain` to train one.")


def _run_protocol(
    recipe: ProtocolRecipe,
    folder: Path,
    data_dir: Path | str | None,
    device: str,
    overwrite: bool,
    quiet: bool,
    executor: Executor,
    reuse: Sequence[Path],
) -> RunResult:
    defenses = recipe.build_defenses()
    check_reuse(reuse)
    run = Run(recipe.seed, resolve_device(device))
    settings = {name: _with_tokenizers(spec, data_dir) for name, spec in recipe.settings.items()}
    recipe = recipe.model_copy(update={"settings": settings})
    wanted_tasks = dict.fromkeys(
        task for spec in settings.values() for task in (spec.benign, spec.restricted, spec.transfer) if task
    )
    tasks = {spec: load_task(spec, data_dir=data_dir) for spec in wanted_tasks}  # each once, if in several settings
    check_kinds(recipe.settings, tasks)
    grounds = {name: _ground(name, spec, tasks, recipe.shots, data_dir, run) for name, spec in recipe.settings.items()}
    if recipe.pictures is not None:
        check_pictures(recipe.pictures, grounds)
    if recipe.conditioning is not None:
        check_conditioning(recipe.conditioning, grounds)
    job = Job.start("protocol", recipe.title, recipe.seed, device, folder, quiet, recipe.resolved(), overwrite)
    job.note_tasks(
        {
            f"{name}: {role}": task
            for name, ground in grounds.items()
            for role, task in (
                ("benign", ground.benign),
                ("restricted", ground.restricted),
                ("transfer", ground.transfer),
            )
        }
    )
    job.claim({"recipe": job.recipe, "models": {name: g.original.facts().sha256 for name, g in grounds.items()}})
    finished = job.finished()
    if finished is not None:
        return finished
    with job.replacing(), cpu_threads(recipe.threads):
        for name, ground in grounds.items():
            original = job.kept_original(ground.original, ground.benign, recipe.settings[name].pretrain, reuse)
            grounds[name] = replace(ground, original=original)
            job.note_model(f"{name}: original", original)
        wanted = orders(recipe, defenses, grounds, job.run)
        borrow_all(wanted, reuse, run=job.run)
        with job.timed("protocol"), executor.kept():
            outcome, models, seconds = protocol(recipe, wanted, grounds, run=job.run, executor=executor)
        for name, model in models.items():
            job.note_model(name, model)
        job.timing |= seconds
        return job.save(outcome=outcome)


def _with_tokenizers(spec: SettingSpec, data_dir: Path | str | None) -> SettingSpec:
    """Settings with several models may read the same sentences by other tokenizers; each is then a task of its own."""
    sources = {on: getattr(spec, on) for on in ("benign", "restricted", "transfer")}
    read = {on: read_by(source, spec.model, data_dir=data_dir) for on, source in sources.items() if source is not None}
    return spec.model_copy(update=read)


def _ground(
    name: str,
    spec: SettingSpec,
    tasks: Mapping[TaskSpec, Task],
    shots: int | None,
    data_dir: Path | str | None,
    run: Run,
) -> Ground:
    """Loads a setting's model, which may still be untrained; refuses what does not fit together."""
    benign, restricted = tasks[spec.benign], tasks[spec.restricted]
    transfer = None if spec.transfer is None else tasks[spec.transfer]
    with run.seeded("initialise"):
        model = load_model(spec.model, benign, data_dir=data_dir)
    _refuse_without_weights(f"Setting {name!r}", spec.model, model, spec.pretrain)
    defenders, adversarys = halves(restricted)
    for other, learned in ((restricted, adversarys), (transfer, transfer)):
        if other is None or learned is None:
            continue
        check_fits(model, other, own_task=False)
        if shots is not None:
            learned.few_shot(shots, 0)
    return Ground(model, benign, restricted, defenders, adversarys, transfer)
