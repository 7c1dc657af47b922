"""The verbs: immunize a model, audit a model, or run a whole recipe; each can leave a folder that others can read."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from holdfast import executors
from holdfast.assessing import assess, check
from holdfast.auditing import AuditSpec, tables
from holdfast.auditing import audit as run_audit
from holdfast.defenses import Defense
from holdfast.errors import HoldfastError
from holdfast.execution import Run, cpu_threads, fingerprint, resolve_device, writable_folder, write_atomic
from holdfast.executors import Executor
from holdfast.finetune import PretrainSpec, Strategy, finetune
from holdfast.immunizing import Ground, borrow_all, check_reuse, shelf
from holdfast.models import ModelSpec, SplitModel, check_fits, load_model
from holdfast.protocol import SettingSpec, orders, protocol
from holdfast.recipe import AnyRecipe, ProtocolRecipe, StudyRecipe, build_defense, readable
from holdfast.report import write_report
from holdfast.results import (
    AuditResult,
    Feasibility,
    Figure,
    ImmunizationResult,
    ModelFacts,
    Outcome,
    RunResult,
    TaskFacts,
    provenance,
    read_result,
)
from holdfast.study import sources, study
from holdfast.tasks import Task, load_task

HALVES_SEED = 0
"""Seed of the split into defender's and adversary's half. It is the same for everybody, whatever their run's seed, so
that a defender and an auditor who never met do not share restricted training data, even if their classes differ."""


_Kind = Literal["run", "immunize", "audit", "feasibility", "study", "protocol"]

OWN_FILES = ("result.json", "report.html", "model.safetensors", "checkpoints")
"""What a job makes in its folder, beside `job.json`, which marks the folder as one of ours."""


def halves(restricted: Task) -> tuple[Task, Task]:
    """Returns the defender's and the adversary's half of a restricted task's training data."""
    return restricted.halves(HALVES_SEED)


def pretrain(
    model: SplitModel,
    task: Task,
    *,
    steps: int = 600,
    strategy: Strategy | None = None,
    seed: int = 0,
    run: Run | None = None,
) -> SplitModel:
    """Trains a copy of a model honestly on a task.

    Args:
        model: left as it is.
        task: what to learn.
        steps: gradient steps.
        strategy: optimizer, learning rate, batch size; by default Adam at 2e-3 with batches of 64.
        seed: of the batches; ignored if a `run` is given.
        run: seed, device and progress display.

    Returns:
        The trained model.

    Example:
        >>> import holdfast
        >>> task = holdfast.load_task("digits[0-4]")
        >>> model = holdfast.pretrain(holdfast.load_model("mlp", task), task, steps=100)
        >>> task.score(model) > 0.9
        True
    """
    run = run or Run(seed)
    strategy = strategy or PretrainSpec().strategy()
    trained = model.clone().to(run.device)
    with run.seeded("pretrain") as generator, run.progress("Training the original", steps) as bar:
        training = finetune(trained, task, strategy, generator=generator, device=run.device)
        for _ in range(steps):
            next(training)
            bar.tick()
    return trained.eval()


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
    """Returns an immunized copy of a model.

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
    chosen = build_defense({"name": defense, **options}) if isinstance(defense, str) else defense
    job = _Job.start("immunize", f"{chosen.name} on {model.name}", seed, device, folder, quiet)
    job.note_tasks(benign, restricted)
    job.claim({"defense": {"name": chosen.name, **chosen.config()}, "model": model.facts().sha256})
    job.note_model("original", model)
    with cpu_threads(threads):
        immunized, result = job.immunize(model, benign, halves(restricted)[0], chosen)
        if folder is not None:
            job.save(immunization=result)
    return immunized


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
    try:
        spec = AuditSpec.model_validate(options)
    except ValidationError as error:
        raise readable(error, "audit", AuditSpec) from error
    chosen = executors.executor(executor)
    job = _Job.start("audit", f"Audit of {model.name} on {restricted.name}", seed, device, folder, quiet)
    facts = {"model": model.facts().sha256, "original": original.facts().sha256}
    job.note_tasks(benign, restricted, transfer)
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
    check(model, benign, restricted, ridge=ridge, q=q)
    on = "inputs" if model is None else model.name
    job = _Job.start("feasibility", f"{benign.name} against {restricted.name} on {on}", 0, device, folder, quiet)
    job.note_tasks(benign, restricted)
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
    if isinstance(recipe, ProtocolRecipe):
        return _run_protocol(recipe, folder, data_dir, device, overwrite, quiet, trials_run_on, reuse)
    if reuse:
        raise HoldfastError("--reuse is for protocols; this recipe is a study or a run, and immunizes by itself.")
    if isinstance(recipe, StudyRecipe):
        if trials_run_on.name != "serial":
            raise HoldfastError(f"A study has no trials that {trials_run_on.name!r} could run; leave --executor out.")
        return _run_study(recipe, folder, data_dir, device, overwrite, quiet)
    defense = recipe.build_defense()
    chosen = resolve_device(device)
    benign = load_task(recipe.benign, data_dir=data_dir)
    restricted = load_task(recipe.restricted, data_dir=data_dir)
    transfer = None if recipe.transfer is None else load_task(recipe.transfer, data_dir=data_dir)
    run = Run(recipe.seed, chosen)
    with run.seeded("initialise"):
        model = load_model(recipe.model, benign, data_dir=data_dir, device=chosen)
    _refuse_without_weights(f"Recipe {recipe.title!r}", recipe.model, recipe.pretrain)
    check_fits(model, restricted, own_task=False)
    if transfer is not None:
        check_fits(model, transfer, own_task=False)
    defenders, adversarys = halves(restricted)
    if recipe.audit.shots is not None:
        adversarys.few_shot(recipe.audit.shots, 0)

    job = _Job.start("run", recipe.title, recipe.seed, device, folder, quiet, recipe.resolved(), overwrite)
    job.note_tasks(benign, restricted, transfer)
    job.claim({"recipe": job.recipe, "model": model.facts().sha256})
    finished = job.finished()
    if finished is not None:
        return finished
    with cpu_threads(recipe.threads):
        original = job.original(model, benign, recipe.pretrain)
        immunized, immunization = job.immunize(original, benign, defenders, defense)
        audited = job.audit(immunized, original, benign, adversarys, transfer, recipe.audit, trials_run_on)
        return job.save(immunization=immunization, audit=audited)


def _run_study(
    recipe: StudyRecipe, folder: Path, data_dir: Path | str | None, device: str, overwrite: bool, quiet: bool
) -> RunResult:
    methods = recipe.build_methods()
    chosen = resolve_device(device)
    tasks = {name: [load_task(spec, data_dir=data_dir) for spec in specs] for name, specs in sources(recipe)}
    run = Run(recipe.seed, chosen)
    model = None
    if recipe.model is not None:
        first = next(iter(tasks.values()))[0]
        with run.seeded("initialise"):
            model = load_model(recipe.model, first, data_dir=data_dir, device=chosen)
    job = _Job.start("study", recipe.title, recipe.seed, device, folder, quiet, recipe.resolved(), overwrite)
    for name, each in tasks.items():
        for role, task in zip(("benign", "restricted") if len(each) > 1 else ("data",), each, strict=True):
            job.tasks[f"{name} {role}"] = task.facts()
    if model is not None:
        job.note_model("original", model)
    job.claim({"recipe": job.recipe, "model": None if model is None else model.facts().sha256})
    finished = job.finished()
    if finished is not None:
        return finished
    with cpu_threads(recipe.threads), job.timed("study"):
        outcome = study(recipe, methods, tasks, model, run=job.run)
    with cpu_threads(recipe.threads):
        return job.save(outcome=outcome)


def _refuse_without_weights(what: str, model: ModelSpec, pretrain: PretrainSpec | None) -> None:
    own = model.options.get("pretrained") or model.name.startswith("hf:")
    if pretrain is None and model.weights is None and not own:
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
    wanted_tasks = dict.fromkeys(task for spec in recipe.settings.values() for task in (spec.benign, spec.restricted))
    tasks = {spec: load_task(spec, data_dir=data_dir) for spec in wanted_tasks}  # each once, if in several settings
    grounds = {
        name: _ground(name, spec, tasks[spec.benign], tasks[spec.restricted], recipe.shots, data_dir, run)
        for name, spec in recipe.settings.items()
    }
    job = _Job.start("protocol", recipe.title, recipe.seed, device, folder, quiet, recipe.resolved(), overwrite)
    for name, ground in grounds.items():
        job.tasks |= {f"{name}: benign": ground.benign.facts(), f"{name}: restricted": ground.restricted.facts()}
    job.claim({"recipe": job.recipe, "models": {name: g.original.facts().sha256 for name, g in grounds.items()}})
    finished = job.finished()
    if finished is not None:
        return finished
    with cpu_threads(recipe.threads):
        for name, ground in grounds.items():
            original = job.kept_original(ground.original, ground.benign, recipe.settings[name].pretrain, reuse)
            grounds[name] = replace(ground, original=original)
            job.note_model(f"{name}: original", original)
        wanted = orders(recipe, defenses, grounds, job.run)
        borrow_all(wanted, reuse, run=job.run)
        with job.timed("protocol"):
            outcome, models, seconds = protocol(recipe, wanted, grounds, run=job.run, executor=executor)
        for name, model in models.items():
            job.note_model(name, model)
        job.timing |= seconds
        return job.save(outcome=outcome)


def _ground(
    name: str,
    spec: SettingSpec,
    benign: Task,
    restricted: Task,
    shots: int | None,
    data_dir: Path | str | None,
    run: Run,
) -> Ground:
    """Loads a setting's model, which may still be untrained; refuses what does not fit together."""
    with run.seeded("initialise"):
        model = load_model(spec.model, benign, data_dir=data_dir)
    _refuse_without_weights(f"Setting {name!r}", spec.model, spec.pretrain)
    check_fits(model, restricted, own_task=False)
    defenders, adversarys = halves(restricted)
    if shots is not None:
        adversarys.few_shot(shots, 0)
    return Ground(model, benign, restricted, defenders, adversarys)


@dataclass
class _Job:
    """What the verbs share: a run, its folder, and the facts that go into the result."""

    kind: _Kind
    title: str
    run: Run
    recipe: dict[str, Any]
    started: str
    tasks: dict[str, TaskFacts] = field(default_factory=dict)
    models: dict[str, ModelFacts] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        kind: _Kind,
        title: str,
        seed: int,
        device: str,
        folder: Path | str | None,
        quiet: bool,
        recipe: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> _Job:
        where = None if folder is None else writable_folder(Path(folder))
        if where is not None and not (where / "job.json").exists():
            strange = [name for name in OWN_FILES if (where / name).exists()]
            if strange:
                raise HoldfastError(
                    f"{str(where)!r} holds {', '.join(strange)} and was not made by Holdfast; choose another "
                    "folder with --out. Nothing was changed."
                )
        if where is not None and overwrite:
            shutil.rmtree(where / "checkpoints", ignore_errors=True)
            for name in ("result.json", "report.html", "model.safetensors", "job.json"):
                (where / name).unlink(missing_ok=True)
        run = Run(seed, resolve_device(device), where, quiet)
        return cls(kind, title, run, recipe or {}, datetime.now(UTC).isoformat(timespec="seconds"))

    def claim(self, settings: dict[str, Any]) -> None:
        """Marks the folder as this job's, or refuses it if it is another's."""
        if self.kind not in ("run", "protocol"):
            self.recipe = settings
        if self.run.folder is None:
            return
        path = self.run.folder / "job.json"
        data = {part: facts.sha256 for part, facts in self.tasks.items()}
        mine = json.loads(json.dumps({"kind": self.kind, "seed": self.run.seed, "data": data, **settings}))
        if not path.exists():
            write_atomic(path, json.dumps(mine, indent=1))
            return
        try:
            found = json.loads(path.read_bytes())
            if not isinstance(found, dict):
                raise ValueError("it is no mapping")
        except (ValueError, RecursionError) as error:
            raise HoldfastError(
                f"{str(path)!r} is damaged ({error}); choose another folder, or --overwrite this one."
            ) from error
        if fingerprint(found) != fingerprint(mine):
            raise HoldfastError(
                f"{str(self.run.folder)!r} holds another job; it differs in: "
                f"{', '.join(dict.fromkeys(_differences(found, mine)[:5]))}. "
                f"Results are never mixed: {self._elsewhere()}."
            )

    def _elsewhere(self) -> str:
        other = "choose another folder with --out"
        return f"{other}, or throw the old one away with --overwrite" if self.kind in ("run", "protocol") else other

    def finished(self) -> RunResult | None:
        """Returns the folder's result, if the job was completed before, and says so; its report is written anew."""
        folder = self.run.folder
        if folder is None or not (folder / "result.json").exists():
            return None
        result = read_result(folder)
        self.run.say(f"{folder}: already complete. Nothing to do; --overwrite runs it again.")
        write_report(result, folder / "report.html")
        return result

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.timing[stage] = round(time.perf_counter() - begin, 3)

    def note_tasks(self, benign: Task, restricted: Task, transfer: Task | None = None) -> None:
        self.tasks = {"benign": benign.facts(), "restricted": restricted.facts()}
        if transfer is not None:
            self.tasks["transfer"] = transfer.facts()

    def note_model(self, role: str, model: SplitModel, file_sha256: str | None = None) -> None:
        self.models[role] = model.facts(file_sha256)

    def original(self, model: SplitModel, benign: Task, spec: PretrainSpec | None) -> SplitModel:
        """Returns the original model: as loaded, or trained now, or trained before the job was interrupted."""
        if spec is not None and self.run.folder is not None:
            path = self.run.folder / "checkpoints" / "original.safetensors"
            if path.exists():
                model.load(path)
            else:
                with self.timed("pretrain"):
                    model = pretrain(model, benign, steps=spec.steps, strategy=spec.strategy(), run=self.run)
                model.save(path)
        self.note_model("original", model)
        return model.eval()

    def kept_original(
        self, model: SplitModel, benign: Task, spec: PretrainSpec | None, reuse: Sequence[Path]
    ) -> SplitModel:
        """Returns a protocol's original: as loaded, or trained; once for all settings that have the same."""
        if spec is None:
            return model.eval()
        assert self.run.folder is not None
        own = shelf(self.run.folder, "originals")
        made_of = {
            "untrained model": model.facts().sha256,
            "benign": benign.facts().sha256,
            "seed": self.run.seed,
            **{f"pretrain.{key}": value for key, value in spec.model_dump(mode="json").items()},
        }
        owner = next((other for other in reuse if shelf(other, "originals").has(made_of)), None)
        if not own.has(made_of) and owner is not None:
            own.borrow(made_of, shelf(owner, "originals"), owner)
            self.run.say(f"Reusing the original from {owner}")
        if not own.has(made_of):
            with self.timed("pretrain"):
                trained = pretrain(model, benign, steps=spec.steps, strategy=spec.strategy(), run=self.run)
            own.keep(made_of, trained, {})
        return own.take(made_of, model)[0]

    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, defense: Defense
    ) -> tuple[SplitModel, ImmunizationResult]:
        with self.timed("immunize"):
            immunized, record = defense.immunize(model, benign, restricted, run=self.run)
        digest = immunized.save(self.run.folder / "model.safetensors") if self.run.folder is not None else None
        self.note_model("immunized", immunized, digest)
        return immunized, defense.result(record)

    def audit(
        self,
        model: SplitModel,
        original: SplitModel,
        benign: Task,
        restricted: Task,
        transfer: Task | None,
        spec: AuditSpec,
        executor: Executor,
    ) -> AuditResult:
        with self.timed("audit"):
            return run_audit(
                model,
                original,
                benign=benign,
                restricted=restricted,
                transfer=transfer,
                spec=spec,
                run=self.run,
                executor=executor,
            )

    def save(
        self,
        *,
        immunization: ImmunizationResult | None = None,
        audit: AuditResult | None = None,
        feasibility: Feasibility | None = None,
        figures: dict[str, Figure] | None = None,
        outcome: Outcome | None = None,
    ) -> RunResult:
        assert self.run.folder is not None
        result = RunResult(
            kind=self.kind,
            title=self.title,
            recipe=self.recipe,
            seed=self.run.seed,
            immunization=immunization,
            audit=audit,
            feasibility=feasibility,
            findings=outcome.findings if outcome is not None else [],
            tables=tables(audit) if audit is not None else outcome.tables if outcome is not None else {},
            figures=outcome.figures if outcome is not None else figures or {},
            provenance=provenance(
                started=self.started,
                device=str(self.run.device),
                threads=torch.get_num_threads(),
                tasks=self.tasks,
                models=self.models,
            ),
            timing=self.timing,
        )
        write_report(result, self.run.folder / "report.html")
        write_atomic(self.run.folder / "result.json", result.model_dump_json(indent=1))
        return result


def _differences(found: Any, mine: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two jobs differ."""
    if not (isinstance(found, dict) and isinstance(mine, dict)):
        return [] if found == mine else [prefix.removeprefix("recipe.")]
    return [
        d for k in sorted({*found, *mine}) for d in _differences(found.get(k), mine.get(k), f"{prefix}.{k}".strip("."))
    ]
