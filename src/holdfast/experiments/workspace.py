"""What all verbs share: a run, its folder, and the facts that go into the result."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from holdfast.auditing.audit import audit as run_audit
from holdfast.auditing.audit import tables
from holdfast.auditing.spec import AuditSpec
from holdfast.defenses import Defense
from holdfast.errors import HoldfastError
from holdfast.experiments.model_store import ModelJobs, StoredModel, model_store
from holdfast.models import Denoiser, SplitModel
from holdfast.report import write_report
from holdfast.results import (
    AuditResult,
    Feasibility,
    Flag,
    ImmunizationResult,
    ModelFacts,
    RunResult,
    TaskFacts,
    read_result,
)
from holdfast.results.provenance import provenance
from holdfast.results.tables import Figure, Outcome, Pictures
from holdfast.runtime.callbacks import Callback
from holdfast.runtime.devices import resolve_device
from holdfast.runtime.distributed import process_group
from holdfast.runtime.documents import read_json
from holdfast.runtime.executors import Executor
from holdfast.runtime.jobs import Job, Store, run_jobs
from holdfast.runtime.journal import begun_with
from holdfast.runtime.launcher import command_line
from holdfast.runtime.run import Run, fingerprint
from holdfast.runtime.storage import writable_folder, write_atomic
from holdfast.tasks import Task
from holdfast.tasks.data_checks import validate
from holdfast.training import PretrainSpec, pretrain

JobName = Literal["run", "immunize", "audit", "attack", "feasibility", "study", "protocol"]

OWN_FILES = ("result.json", "report.html", "model.safetensors", "checkpoints", "pipeline", "pictures", "attacked")
"""What a job writes to its folder, beside `job.json`, which marks the folder as made by Holdfast."""

ADDS_SEEDS = ("audit.decide", "audit.max_seeds")
"""Settings that may be added to those of a folder: an audit with a fixed number of seeds goes on with more."""

REPORTED = "first look reported"
"""Says in `job.json` that the audit with a fixed number of seeds had a result when `decide` was added."""

REPLACED = ".holdfast-replaced"
"""Where `--overwrite` keeps the old files until the new job is done, so that bad input destroys no results."""


@dataclass
class Workspace:
    """What the verbs share: a run, its folder, and the facts that go into the result."""

    job: JobName
    title: str
    run: Run
    recipe: dict[str, Any]
    started: str
    tasks: dict[str, TaskFacts] = field(default_factory=dict)
    models: dict[str, ModelFacts] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)
    reported: bool = False

    @classmethod
    def start(
        cls,
        job: JobName,
        title: str,
        seed: int,
        device: str,
        folder: Path | str | None,
        quiet: bool,
        recipe: dict[str, Any] | None = None,
        overwrite: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> Workspace:
        """Returns a workspace whose folder exists and may be used.

        Raises:
            HoldfastError: if the folder holds files that Holdfast did not make, or the device is not available.
        """
        if folder is not None and (not isinstance(folder, str | Path) or not str(folder)):
            raise HoldfastError(f"folder is {folder!r}; expected a path.")
        path = None if folder is None else Path(folder)
        run = Run(seed, resolve_device(device), path, quiet, callbacks=callbacks)
        if path is not None:
            process_group().on_main_process(lambda: _open(path, overwrite))
        return cls(job, title, run, recipe or {}, datetime.now(UTC).isoformat(timespec="seconds"))

    def claim(self, settings: dict[str, Any]) -> None:
        """Marks the folder as this job's, or refuses it if it belongs to another job."""
        if self.job not in ("run", "study", "protocol"):
            self.recipe = settings
        folder = self.run.folder
        if folder is None:
            return
        data = {part: facts.sha256 for part, facts in self.tasks.items()}
        # Training depends on the number of processes; trials and closed forms do not.
        several = process_group().count > 1 and self.job in ("run", "immunize")
        settings = {**({"processes": process_group().count} if several else {}), **settings}
        claimed = json.loads(json.dumps({"kind": self.job, "seed": self.run.seed, "data": data, **settings}))
        self.reported = process_group().on_main_process(lambda: self._mark(folder, claimed))
        if not all(process_group().gather((folder / "job.json").exists())):
            raise HoldfastError(
                f"Not every process sees {str(folder)!r}, which the main one has written to. On several machines, give "
                "a folder that all of them share with --out."
            )

    def _mark(self, folder: Path, claimed: dict[str, Any]) -> bool:
        """Claims a folder; returns whether a sequential audit continues one that was reported before."""
        path = folder / "job.json"
        if not path.exists():
            write_atomic(path, json.dumps({"command": command_line(), **claimed}, indent=1))
            return False
        try:
            recorded = read_json(path.read_bytes())
            if not isinstance(recorded, dict):
                raise ValueError("it is not a mapping")
            command = {"command": recorded.pop("command", None)}
            reported = bool(recorded.pop(REPORTED, False))
        except (ValueError, RecursionError) as error:
            raise HoldfastError(
                f"{str(path)!r} is damaged ({error}); choose another folder, or --overwrite this one."
            ) from error
        differences = _differences(recorded, claimed)
        if differences and not _settings_of_audit(recorded).get("decide") and {*differences} <= {*ADDS_SEEDS}:
            reported = (folder / "result.json").exists()
            write_atomic(path, json.dumps({"command": command_line(), REPORTED: reported, **claimed}, indent=1))
        elif fingerprint(recorded) != fingerprint(claimed):
            overwrite = ", or delete the old results with --overwrite" if self.job in ("run", "protocol") else ""
            option = "--decide" if self.job == "audit" else "--set audit.decide=true"
            add = f" Its command with {option} adds seeds until it decides." if differences == ["audit.seeds"] else ""
            raise HoldfastError(
                f"{str(folder)!r} holds another job; it differs in: "
                f"{', '.join(dict.fromkeys(differences[:5]))}. "
                f"Results are never mixed: continue the {recorded.get('kind', 'job')} that is there with "
                f"{begun_with(command)}, or choose another folder with --out{overwrite}.{add}"
            )
        return reported

    def finished(self) -> RunResult | None:
        """Returns the folder's result if the job is already complete, after writing its report again; else None."""
        folder = self.run.folder
        return None if folder is None else process_group().on_main_process(lambda: self._read_finished(folder))

    def _read_finished(self, folder: Path) -> RunResult | None:
        if not (folder / "result.json").exists():
            return None
        result = read_result(folder)
        decided = result.audit is not None and result.audit.sequential is not None
        if decided != bool(_settings_of_audit(self.recipe).get("decide")):
            return None  # an audit of a fixed number of seeds, which more seeds continue
        self.run.say(f"{folder}: already complete. Nothing to do; --overwrite runs it again.")
        write_report(result, folder / "report.html")
        return result

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Restores what `--overwrite` set aside if the block raises an error before any new result is finished."""
        try:
            yield
        except HoldfastError:
            folder = self.run.folder
            if folder is not None:
                process_group().on_main_process(lambda: self._put_back(folder))
            raise

    def _put_back(self, folder: Path) -> None:
        aside = folder / REPLACED
        if not aside.is_dir():
            return
        if (folder / "checkpoints").exists():
            self.run.say(f"The earlier results are in {aside} until a job is finished in {folder}.")
            return
        _remove_own(folder)
        for path in list(aside.iterdir()):
            path.rename(folder / path.name)
        aside.rmdir()
        self.run.say(f"{folder}: left as it was.")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Records the seconds that the block takes."""
        begin = time.perf_counter()
        yield
        self.timing[stage] = round(time.perf_counter() - begin, 3)

    def note_tasks(self, tasks: Mapping[str, Task | None]) -> None:
        """Checks the tasks, prints what was read, and records it; see `validate`.

        Raises:
            HoldfastError: if two tasks are the same that must differ.
        """
        checked = validate({part: task for part, task in tasks.items() if task is not None})
        self.tasks, self.flags = checked.facts, checked.flags
        for line in checked.lines():
            self.run.say(line)

    def note_model(self, role: str, model: SplitModel, file_sha256: str | None = None) -> None:
        """Records the facts of a model, and prints notes on how it was read."""
        known = {note for facts in self.models.values() for note in facts.notes}
        self.models[role] = model.facts(file_sha256)
        for note in model.notes:
            if note not in known:
                self.run.say(f"{role.capitalize()} model: {note}")

    def original(self, model: SplitModel, benign: Task, spec: PretrainSpec | None) -> SplitModel:
        """Returns a run's original model: as loaded, or pretrained, now or before an interruption."""
        if spec is not None and self.run.folder is not None:
            store = _OneModel(self.run.folder / "checkpoints" / "original.safetensors", model)
            model = self._pretrained(model, benign, spec, "original", store)
        self.note_model("original", model)
        return model.eval()

    def stored_original(
        self, model: SplitModel, benign: Task, spec: PretrainSpec | None, reuse: Sequence[Path]
    ) -> SplitModel:
        """Returns a protocol's original: as loaded, or pretrained; settings with the same original train it once."""
        if spec is None:
            return model.eval()
        assert self.run.folder is not None
        own = model_store(self.run.folder, "originals")
        cache_key = {
            "untrained model": model.facts().sha256,
            "benign": benign.facts().sha256,
            "seed": self.run.seed,
            **{f"pretrain.{key}": value for key, value in spec.model_dump(mode="json").items()},
            **({"processes": process_group().count} if process_group().count > 1 else {}),
        }
        owner = next((other for other in reuse if model_store(other, "originals").has(cache_key)), None)
        if owner is not None and not own.has(cache_key):
            own.copy_from(cache_key, model_store(owner, "originals"), owner)
            self.run.say(f"Reusing the original from {owner}")
        key = fingerprint(cache_key)
        return self._pretrained(model, benign, spec, key, ModelJobs(own, {key: cache_key}, {key: model}))

    def _pretrained(
        self, model: SplitModel, benign: Task, spec: PretrainSpec, key: str, store: Store[StoredModel]
    ) -> SplitModel:
        def train(_context: None, _inputs: None) -> StoredModel:
            with self.timed("pretrain"):
                strategy = spec.strategy()
                return pretrain(model, benign, steps=spec.steps, strategy=strategy, ema=spec.ema, run=self.run), {}

        ((original, _),) = run_jobs(train, None, [Job(key, None, "the original")], store, run=self.run, executor=None)
        return original

    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, defense: Defense
    ) -> tuple[SplitModel, ImmunizationResult]:
        """Runs a defense and saves its model."""
        with self.timed("immunize"):
            defense = defense.resolved(benign)
            immunized, record = defense.immunize(model, benign, restricted, run=self.run)
            process_group().broadcast_state(immunized.network)
        digest, folder = None, self.run.folder
        if folder is not None:
            digest = process_group().on_main_process(lambda: immunized.save(folder / "model.safetensors"))
            if isinstance(immunized, Denoiser):
                process_group().on_main_process(lambda: immunized.save_pretrained(folder / "pipeline"))
                self.run.say(f"Written for diffusers: {folder / 'pipeline'}")
        self.note_model("immunized", immunized, digest)
        return immunized, defense.attach_result(record, model, immunized)

    def audit(
        self,
        model: SplitModel,
        original: SplitModel,
        benign: Task,
        restricted: Task,
        transfer: Task | None,
        spec: AuditSpec,
        executor: Executor,
        reference: SplitModel | None = None,
    ) -> AuditResult:
        """Runs an audit."""
        with self.timed("audit"):
            return run_audit(
                model, original, benign=benign, restricted=restricted, transfer=transfer, spec=spec, run=self.run,
                executor=executor, flags=self.flags, reference=reference, reported=self.reported,
            )  # fmt: skip

    def save(
        self,
        *,
        immunization: ImmunizationResult | None = None,
        audit: AuditResult | None = None,
        feasibility: Feasibility | None = None,
        figures: dict[str, Figure] | None = None,
        outcome: Outcome | None = None,
    ) -> RunResult:
        """Writes report, pictures and result, and returns the result."""
        folder = self.run.folder
        assert folder is not None
        result = RunResult(
            job=self.job,
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
                processes=process_group().count,
                tasks=self.tasks,
                models=self.models,
            ),
            timing=self.timing,
        )
        return process_group().on_main_process(lambda: _write(result, folder))


@dataclass(frozen=True)
class _OneModel:
    """A store of jobs in which one file holds the only model; see `holdfast.runtime.jobs.Store`."""

    path: Path
    like: SplitModel

    def missing(self, keys: Sequence[str]) -> list[str]:
        return [] if process_group().broadcast_object(self.path.exists()) else list(keys)

    def put(self, key: str, value: StoredModel) -> None:
        process_group().on_main_process(lambda: value[0].save(self.path))

    def get(self, key: str) -> StoredModel:
        self.like.load(self.path)
        return self.like, {}


def _open(folder: Path, overwrite: bool) -> None:
    """Makes a job's folder; with `overwrite`, sets aside the results in it."""
    writable_folder(folder)
    foreign = [] if (folder / "job.json").exists() else [name for name in OWN_FILES if (folder / name).exists()]
    if foreign:
        raise HoldfastError(
            f"{str(folder)!r} holds {', '.join(foreign)} and was not made by Holdfast; choose another folder with "
            "--out. Nothing was changed."
        )
    if overwrite and (folder / REPLACED).is_dir():  # the last job did not end: keep what it set aside
        _remove_own(folder)
    elif overwrite and (folder / "job.json").exists():
        (folder / REPLACED).mkdir()
        for name in (*OWN_FILES, "job.json"):
            if (folder / name).exists():
                (folder / name).rename(folder / REPLACED / name)


def _remove_own(folder: Path) -> None:
    for name in (*OWN_FILES, "job.json"):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write(result: RunResult, folder: Path) -> RunResult:
    write_report(result, folder / "report.html")
    for name, figure in result.figures.items():
        if isinstance(figure, Pictures):
            write_atomic(folder / "pictures" / f"{name}.png", base64.b64decode(figure.png))
    write_atomic(folder / "result.json", result.model_dump_json(indent=1))
    shutil.rmtree(folder / REPLACED, ignore_errors=True)
    return result


def _settings_of_audit(job: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the audit in those of a job; empty if it has none."""
    inside = job.get("recipe", job)
    settings = inside.get("audit") if isinstance(inside, Mapping) else None
    return settings if isinstance(settings, Mapping) else {}


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two jobs differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [prefix.removeprefix("recipe.")]
    return [d for k in sorted({*a, *b}) for d in _differences(a.get(k), b.get(k), f"{prefix}.{k}".strip("."))]
