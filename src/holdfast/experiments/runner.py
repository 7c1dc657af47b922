"""Runs a recipe from data to report, or continues an interrupted run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.adversaries import Search, battery
from holdfast.auditing.spec import AuditSpec
from holdfast.errors import HoldfastError
from holdfast.experiments.immunization import check_reuse, reuse_models
from holdfast.experiments.linear.study import sources, study
from holdfast.experiments.protocol import SettingSpec, check_kinds, immunizations, protocol
from holdfast.experiments.recipe import AnyRecipe, ProtocolRecipe, Recipe, Scale, StudyRecipe, load
from holdfast.experiments.setting import Setting
from holdfast.experiments.workspace import Workspace
from holdfast.models import ModelSpec, SplitModel, check_fits, load_model, load_task_for, read_by
from holdfast.results import RunResult
from holdfast.runtime import executors
from holdfast.runtime.callbacks import Callback
from holdfast.runtime.devices import cpu_threads, resolve_device
from holdfast.runtime.executors import Executor
from holdfast.runtime.run import Run
from holdfast.tasks import Task, TaskSpec
from holdfast.tasks.splits import halves
from holdfast.training import PretrainSpec


def refuse_unused(spec: AuditSpec, transfer: bool = False) -> None:
    """Refuses settings without effect.

    Args:
        spec: of the audit.
        transfer: whether to refuse a transfer task without side effects. A recipe may turn them off at some scales.
    """
    if "trials" in spec.model_fields_set and not isinstance(battery(spec.battery), Search):
        raise HoldfastError(f"trials is {spec.trials}, and {spec.battery} is not a search; leave it out.")
    if transfer and not spec.side_effects:
        raise HoldfastError(
            "There is a transfer task, but side_effects is off, so it would not be used; leave one of them out."
        )


@dataclass(frozen=True)
class _Options:
    """How a recipe is run; see `run_recipe`."""

    folder: Path
    data_dir: Path | str | None
    device: str
    overwrite: bool
    quiet: bool
    executor: Executor
    reuse: Sequence[Path]
    callbacks: Sequence[Callback]

    def workspace(self, recipe: AnyRecipe) -> Workspace:
        """Returns the workspace of a recipe."""
        return Workspace.start(
            recipe.job, recipe.title, recipe.seed, self.device, self.folder, self.quiet, recipe.resolved(),
            self.overwrite, self.callbacks,
        )  # fmt: skip


def run_recipe(
    recipe: AnyRecipe | Path | str,
    *,
    folder: Path | str | None = None,
    scale: Scale = "cpu",
    overrides: Sequence[str] = (),
    seed: int | None = None,
    data_dir: Path | str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = True,
    executor: Executor | str = "serial",
    reuse: Sequence[Path | str] = (),
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Runs a recipe from data to report, or continues an interrupted run.

    Args:
        recipe: the name of a packaged recipe, a YAML file, or the result of `holdfast.experiments.recipe.load`, which
            then takes `scale`, `overrides` and `seed` instead.
        folder: for `result.json`, `report.html`, `model.safetensors` and `checkpoints/`; None: `runs/RECIPE`. If it
            holds a part of this run, only the missing part is computed; a folder of another job is refused.
        scale: `smoke` (seconds), `cpu` (two cores) or `paper` (the full setting, for a GPU).
        overrides: settings, such as `defense.iterations=50`.
        seed: replaces the recipe's seed.
        data_dir: folder with data and weights; None: `$HOLDFAST_DATA`.
        device: `auto`, or a torch device.
        overwrite: delete the results of an earlier run in the folder.
        quiet: show no progress.
        executor: where jobs run; it does not change the result.
        reuse: folders of other protocols' runs, whose immunized models are copied where the same ones are needed.
        callbacks: called after rounds and trials.

    Raises:
        HoldfastError: for input that cannot work; nothing in the folder is lost.
    """
    if isinstance(recipe, AnyRecipe):
        settings = {"scale": scale != "cpu", "overrides": bool(overrides), "seed": seed is not None}
        if given := [name for name, is_given in settings.items() if is_given]:
            raise HoldfastError(
                f"{', '.join(given)}: the recipe is already loaded; give this to holdfast.experiments.recipe.load, or "
                "give the recipe by name."
            )
        loaded, default = recipe, Path("runs", recipe.title)
    elif not isinstance(recipe, str | Path):
        raise HoldfastError(f"recipe is {recipe!r}; expected a name, a file, or the result of recipe.load(...).")
    else:
        loaded, default = load(str(recipe), scale=scale, overrides=overrides, seed=seed), default_folder(recipe)
    folder = default if folder is None else Path(folder)
    owners = [Path(each) for each in reuse]
    chosen = executors.executor(executor)
    if any(other.resolve() == folder.resolve() for other in owners):
        raise HoldfastError(f"--reuse {str(folder)!r} is the run's own folder; its models are used in any case.")
    options = _Options(folder, data_dir, device, overwrite, quiet, chosen, owners, callbacks)
    if isinstance(loaded, ProtocolRecipe):
        return _run_protocol(loaded, options)
    if owners:
        raise HoldfastError(f"--reuse is for protocols; this recipe is a {loaded.job}.")
    return _run_study(loaded, options) if isinstance(loaded, StudyRecipe) else _run_audited(loaded, options)


def default_folder(recipe: Path | str) -> Path:
    """Returns the folder of a recipe's run if none is given.

    Example:
        >>> default_folder("quickstart").as_posix(), default_folder("mine/toy.yaml").as_posix()
        ('runs/quickstart', 'runs/toy')
    """
    return Path("runs", Path(recipe).stem if str(recipe).endswith((".yaml", ".yml")) else str(recipe))


def _run_audited(recipe: Recipe, options: _Options) -> RunResult:
    """Immunizes a model and audits it."""
    defense = recipe.build_defense()
    refuse_unused(recipe.audit)
    device, data_dir = resolve_device(options.device), options.data_dir
    benign = load_task_for(recipe.benign, recipe.model, data_dir=data_dir)
    restricted = load_task_for(recipe.restricted, recipe.model, data_dir=data_dir)
    transfer = None if recipe.transfer is None else load_task_for(recipe.transfer, recipe.model, data_dir=data_dir)
    with Run(recipe.seed, device).seeded("initialise"):
        model = load_model(recipe.model, benign, data_dir=data_dir, device=device)
    _refuse_without_weights(f"Recipe {recipe.title!r}", recipe.model, model, recipe.pretrain)
    reference = recipe.load_reference(restricted, data_dir=data_dir, device=device)
    check_fits(model, restricted, own_task=False)
    if transfer is not None:
        check_fits(model, transfer, own_task=False)
    defender_data, adversary_data = halves(restricted)
    if recipe.audit.shots is not None:
        adversary_data.few_shot(recipe.audit.shots, 0)

    workspace = options.workspace(recipe)
    workspace.note_tasks({"benign": benign, "restricted": restricted, "transfer": transfer})
    other = {} if reference is None else {"reference": reference}
    used = {"model": model, **other}
    workspace.claim({"recipe": workspace.recipe, **{name: each.facts().sha256 for name, each in used.items()}})
    if (finished := workspace.finished()) is not None:
        return finished
    for name, each in other.items():
        workspace.note_model(name, each)
    with workspace.replacing(), cpu_threads(recipe.threads):
        original = workspace.original(model, benign, recipe.pretrain)
        immunized, immunization = workspace.immunize(original, benign, defender_data, defense)
        audited = workspace.audit(
            immunized, original, benign, adversary_data, transfer, recipe.audit, options.executor, reference
        )
        return workspace.save(immunization=immunization, audit=audited)


def _run_study(recipe: StudyRecipe, options: _Options) -> RunResult:
    """Measures linear defenses on pairs of tasks."""
    methods = recipe.build_methods()
    device, data_dir = resolve_device(options.device), options.data_dir
    tasks = {
        name: [load_task_for(spec, recipe.model, data_dir=data_dir) for spec in specs]
        for name, specs in sources(recipe)
    }
    model = None
    if recipe.model is not None:
        first = next(iter(tasks.values()))[0]
        with Run(recipe.seed, device).seeded("initialise"):
            model = load_model(recipe.model, first, data_dir=data_dir, device=device)
    workspace = options.workspace(recipe)
    workspace.note_tasks(
        {
            f"{name} {role}": task
            for name, each in tasks.items()
            for role, task in zip(("benign", "restricted") if len(each) > 1 else ("data",), each, strict=True)
        }
    )
    if model is not None:
        workspace.note_model("original", model)
    workspace.claim({"recipe": workspace.recipe, "model": None if model is None else model.facts().sha256})
    if (finished := workspace.finished()) is not None:
        return finished
    with workspace.replacing(), cpu_threads(recipe.threads), workspace.timed("study"), options.executor.kept():
        outcome = study(recipe, methods, tasks, model, run=workspace.run, executor=options.executor)
    with cpu_threads(recipe.threads):
        return workspace.save(outcome=outcome)


def _refuse_without_weights(what: str, spec: ModelSpec, model: SplitModel, pretrain: PretrainSpec | None) -> None:
    if pretrain is not None or spec.weights is not None:
        return
    if model.fresh_head:
        raise HoldfastError(f"{what}: {model.name} comes without a head for classes. Give `pretrain` to train one.")
    if not spec.options.get("pretrained") and not spec.name.startswith("hf:"):
        raise HoldfastError(f"{what}: the model has no weights. Give `model.weights`, or `pretrain` to train them.")


def _run_protocol(recipe: ProtocolRecipe, options: _Options) -> RunResult:
    """Attacks several models side by side."""
    defenses = recipe.build_defenses()
    check_reuse(options.reuse)
    run, data_dir = Run(recipe.seed, resolve_device(options.device)), options.data_dir
    specs = {name: _with_tokenizers(spec, data_dir) for name, spec in recipe.settings.items()}
    recipe = recipe.model_copy(update={"settings": specs})
    wanted_tasks = dict.fromkeys(
        task for spec in specs.values() for task in (spec.benign, spec.restricted, spec.transfer) if task
    )
    tasks = {
        spec: load_task_for(spec, None, data_dir=data_dir) for spec in wanted_tasks
    }  # each once, if in several settings
    check_kinds(recipe.settings, tasks)
    settings = {name: _setting(name, spec, tasks, recipe.shots, data_dir, run) for name, spec in specs.items()}
    for measurement in recipe.chosen_measurements():
        measurement.check(settings)
    workspace = options.workspace(recipe)
    roles = ("benign", "restricted", "transfer")
    workspace.note_tasks({f"{name}: {role}": getattr(s, role) for name, s in settings.items() for role in roles})
    workspace.claim(
        {"recipe": workspace.recipe, "models": {name: s.original.facts().sha256 for name, s in settings.items()}}
    )
    if (finished := workspace.finished()) is not None:
        return finished
    with workspace.replacing(), cpu_threads(recipe.threads):
        for name, setting in settings.items():
            original = workspace.stored_original(
                setting.original, setting.benign, recipe.settings[name].pretrain, options.reuse
            )
            settings[name] = replace(setting, original=original)
            workspace.note_model(f"{name}: original", original)
        wanted = immunizations(recipe, defenses, settings, workspace.run)
        reuse_models(wanted, options.reuse, run=workspace.run)
        with workspace.timed("protocol"), options.executor.kept():
            outcome, made = protocol(recipe, wanted, settings, run=workspace.run, executor=options.executor)
        for name, each in made.items():
            workspace.note_model(name, each.model)
            workspace.timing[f"immunize {name}"] = each.seconds
        return workspace.save(outcome=outcome)


def _with_tokenizers(spec: SettingSpec, data_dir: Path | str | None) -> SettingSpec:
    """Names the model's tokenizer in its text tasks: the same sentences with another tokenizer are another task."""
    tasks = {role: getattr(spec, role) for role in ("benign", "restricted", "transfer")}
    read = {role: read_by(task, spec.model, data_dir=data_dir) for role, task in tasks.items() if task is not None}
    return spec.model_copy(update=read)


def _setting(
    name: str,
    spec: SettingSpec,
    tasks: Mapping[TaskSpec, Task],
    shots: int | None,
    data_dir: Path | str | None,
    run: Run,
) -> Setting:
    """Loads a setting's model, which may still be untrained; refuses models and tasks that do not fit together."""
    benign, restricted = tasks[spec.benign], tasks[spec.restricted]
    transfer = None if spec.transfer is None else tasks[spec.transfer]
    with run.seeded("initialise"):
        model = load_model(spec.model, benign, data_dir=data_dir)
    _refuse_without_weights(f"Setting {name!r}", spec.model, model, spec.pretrain)
    defender_data, adversary_data = halves(restricted)
    for other, learned in ((restricted, adversary_data), (transfer, transfer)):
        if other is None or learned is None:
            continue
        check_fits(model, other, own_task=False)
        if shots is not None:
            learned.few_shot(shots, 0)
    return Setting(model, benign, restricted, defender_data, adversary_data, transfer)
