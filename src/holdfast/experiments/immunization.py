"""The immunizations of a protocol: run on any executor, stored, and reused by other runs.

An immunization may take days, and several tables of the SOPHON paper need the same model. So the run's folder holds
each finished model and its record under a hash of everything that they depend on. Another run that needs the same
model checks and copies it, and says so.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from holdfast.defenses import Defense
from holdfast.errors import HoldfastError
from holdfast.experiments.model_store import CacheKey, ModelJobs, StoredModel, model_store
from holdfast.experiments.setting import Setting
from holdfast.models import SplitModel
from holdfast.results import ImmunizationResult
from holdfast.results.tables import finite
from holdfast.runtime.executors import Executor
from holdfast.runtime.jobs import Job, run_jobs
from holdfast.runtime.run import Run, fingerprint


@dataclass(frozen=True)
class ImmunizationJob:
    """One immunization of a protocol.

    Attributes:
        setting: name of the setting.
        label: the recipe's name for the defense.
        seed: number of the repetition.
        defense: the defense with its settings.
        run_seed: source of the defense's random choices.
        cache_key: everything that the result depends on.
    """

    setting: str
    label: str
    seed: int
    defense: Defense = field(repr=False)
    run_seed: int
    cache_key: CacheKey = field(repr=False)

    @classmethod
    def of(cls, name: str, label: str, seed: int, defense: Defense, setting: Setting, run: Run) -> ImmunizationJob:
        """Describes an immunization; repetition s has the seed of the run plus s, as in `holdfast immunize --seed`."""
        defense = defense.resolved(setting.benign)
        settings = {f"defense.{key}": value for key, value in defense.config().items()}
        cache_key = {"defense": defense.name, **settings, "seed": run.seed + seed, **setting.cache_key}
        return cls(name, label, seed, defense, run.seed + seed, json.loads(json.dumps(cache_key)))

    @property
    def key(self) -> str:
        """The hash of everything that the result depends on."""
        return fingerprint(self.cache_key)

    def __str__(self) -> str:
        return f"{self.label}, seed {self.seed}, in {self.setting!r}"


@dataclass(frozen=True)
class ImmunizedModel:
    """An immunized model and how it was made.

    Attributes:
        model: the model, on the CPU.
        result: the defense's record.
        benign: its score on the benign test split; None: not finite.
        seconds: duration since the immunization was last started or continued.
        reused_from: the folder of the run that made it; None: this run.
    """

    model: SplitModel
    result: ImmunizationResult
    benign: float | None
    seconds: float
    reused_from: str | None


def check_reuse(reuse: Sequence[Path]) -> None:
    """Refuses folders that hold no immunized model, before any work is done."""
    for owner in reuse:
        if not model_store(owner, "immunized").cache_keys():
            raise HoldfastError(
                f"--reuse {str(owner)!r}: it holds no immunized model (checkpoints/immunized/); expected the folder of "
                "a protocol's run."
            )


def reuse_models(jobs: Sequence[ImmunizationJob], reuse: Sequence[Path], *, run: Run) -> None:
    """Copies immunized models from other runs' folders, and prints which were found and which were not.

    Raises:
        HoldfastError: if a folder holds no model that is needed here, or a damaged one.
    """
    assert run.folder is not None
    own = model_store(run.folder, "immunized")
    for owner in reuse:
        theirs = model_store(owner, "immunized")
        held = theirs.cache_keys()
        fitting = [job for job in jobs if theirs.has(job.cache_key)]
        if not fitting:
            raise HoldfastError(
                f"--reuse {str(owner)!r}: this run needs none of its {len(held)} immunized models. "
                + "; ".join(_nearest(job, held) for job in jobs[:4])
                + ". Give the recipe the same settings, or leave --reuse out."
            )
        for job in fitting:
            if own.has(job.cache_key):
                continue
            own.copy_from(job.cache_key, theirs, owner)
            run.say(f"Reusing {job} from {owner}")
        for job in jobs:
            if job not in fitting and not own.has(job.cache_key):
                run.say(f"Not in {owner}: {job} ({_nearest(job, held)})")


def _nearest(job: ImmunizationJob, held: Sequence[CacheKey]) -> str:
    """Says in which settings the most similar model differs from the one that is needed."""
    own = job.cache_key
    differing = [sorted(k for k in {*own, *other} if own.get(k) != other.get(k)) for other in held]
    nearest = min(differing, key=lambda keys: ("defense" in keys, len(keys)))
    return f"{job.label}, seed {job.seed}: " + (
        "there is none of this defense" if "defense" in nearest else f"the nearest differs in {', '.join(nearest)}"
    )


def immunize_all(
    wanted: Sequence[ImmunizationJob], settings: Mapping[str, Setting], *, run: Run, executor: Executor
) -> dict[tuple[str, str, int], ImmunizedModel]:
    """Returns all immunized models; only those that the run's folder lacks are made.

    Each defense continues from its last checkpoint, and each finished model is stored at once.

    Args:
        wanted: the immunizations.
        settings: by name.
        run: seed, device, folder.
        executor: where the defenses run; it does not change their results.

    Returns:
        By setting, label and seed.
    """
    assert run.folder is not None
    store = _ImmunizedModels(run.folder, wanted, settings)
    jobs = [Job(each.key, each, str(each)) for each in wanted]
    for key in store.missing([job.key for job in jobs]):
        _checkpoints(run.folder, key).mkdir(parents=True, exist_ok=True)
    # In this process each defense shows its own progress, and a terminal has room for one display only.
    description = None if executor.name == "serial" else "Immunizing"
    made = run_jobs(
        _immunize, _Context(settings, run), jobs, store, run=run, executor=executor, description=description
    )
    return {
        (each.setting, each.label, each.seed): _with_record(each, *stored, store.store.folder)
        for each, stored in zip(wanted, made, strict=True)
    }


class _ImmunizedModels(ModelJobs):
    """Immunized models in a run's folder; storing a finished one removes its checkpoints."""

    def __init__(self, folder: Path, wanted: Sequence[ImmunizationJob], settings: Mapping[str, Setting]) -> None:
        cache_keys = {each.key: each.cache_key for each in wanted}
        like = {each.key: settings[each.setting].original for each in wanted}
        super().__init__(model_store(folder, "immunized"), cache_keys, like)
        self.folder = folder

    def put(self, key: str, value: StoredModel) -> None:
        super().put(key, value)
        shutil.rmtree(_checkpoints(self.folder, key), ignore_errors=True)


def _with_record(wanted: ImmunizationJob, model: SplitModel, notes: Mapping[str, Any], folder: Path) -> ImmunizedModel:
    try:
        result = ImmunizationResult.model_validate(notes["result"])
        model.immunization = result
        return ImmunizedModel(model, result, notes["benign"], float(notes["seconds"]), notes.get("reused_from"))
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise HoldfastError(
            f"The notes on {wanted} in {str(folder)!r} are damaged ({type(error).__name__}: {error}); delete them, "
            "and the model is made again."
        ) from error


def _checkpoints(folder: Path, key: str) -> Path:
    return folder / "checkpoints" / "immunizing" / key


@dataclass(frozen=True)
class _Context:
    """Input of all immunizations; sent once to each worker."""

    settings: Mapping[str, Setting]
    run: Run


def _immunize(context: _Context, wanted: ImmunizationJob) -> StoredModel:
    setting, run = context.settings[wanted.setting], context.run
    assert run.folder is not None
    checkpoints = _checkpoints(run.folder, wanted.key)
    # A worker on another machine does not see the folder, and works without checkpoints.
    folder = checkpoints if checkpoints.is_dir() else None
    own = Run(wanted.run_seed, run.device, folder, run.quiet, callbacks=run.callbacks)
    run.say(f"Immunizing {wanted}")
    begin = time.perf_counter()
    model, record = wanted.defense.immunize(setting.original, setting.benign, setting.defender_data, run=own)
    seconds = time.perf_counter() - begin
    notes = {
        "benign": finite(setting.benign.audit_score(model)),
        "result": wanted.defense.attach_result(record, setting.original, model).model_dump(mode="json"),
        "seconds": round(seconds, 3),
    }
    return model.to("cpu"), notes
