"""Replay: repeats one trial of a finished audit, from the record in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from holdfast.adversaries import build
from holdfast.auditing.trials import TRANSPLANTED, Trial, TrialContext, few_of, repetitions
from holdfast.errors import HoldfastError, unknown
from holdfast.experiments.recipe import Recipe
from holdfast.models import SplitModel, check_fits, load_model, load_released, load_task_for, transplant
from holdfast.results import AuditResult, Curve, Role, RunResult, read_result
from holdfast.runtime.argument_checks import readable, split_numbers
from holdfast.runtime.devices import cpu_threads, resolve_device
from holdfast.runtime.run import Run
from holdfast.tasks import Task
from holdfast.tasks.splits import halves


@dataclass(frozen=True)
class Replay:
    """A trial as recorded and as repeated.

    Attributes:
        recorded: from `result.json`.
        repeated: from the same model, data, seed and adversary.
    """

    recorded: Curve
    repeated: Curve

    @property
    def same(self) -> bool:
        """Whether every score is the same, to the last digit."""
        return self.recorded.scores == self.repeated.scores


@dataclass(frozen=True)
class _Source:
    """The models and tasks of a finished audit, loaded again."""

    immunized: SplitModel
    original: SplitModel
    tasks: dict[str, Task]
    reference: SplitModel | None = None

    @property
    def models(self) -> dict[str, SplitModel]:
        """The models by their role in the provenance."""
        own = {"immunized": self.immunized, "original": self.original}
        return own if self.reference is None else {**own, "reference": self.reference}


def replay(
    folder: Path | str,
    *,
    adversary: str | None = None,
    role: Role = "immunized",
    seed: int = 0,
    data_dir: Path | str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Replay:
    """Repeats one trial of a finished run or audit.

    Args:
        folder: folder of a finished `holdfast run` or `holdfast audit`.
        adversary: name of the adversary; None: the best one on the immunized model.
        role: the attacked model.
        seed: number of the repetition.
        data_dir: folder with data and weights.
        device: None: the recorded device.
        threads: CPU threads of torch; None: the recorded number, since the last digit of sums depends on it.

    Raises:
        HoldfastError: if the folder does not name the source of its models, or models or data have changed.
    """
    result = read_result(folder)
    if result.audit is None:
        raise HoldfastError(f"{str(folder)!r} holds no audit (its kind is {result.job!r}); there is nothing to replay.")
    recorded = _recorded(result.audit, adversary, role, seed)
    run = Run(result.seed, resolve_device(result.provenance.device if device is None else device))
    with cpu_threads(result.provenance.threads if threads is None else threads):
        source = (_load_run if result.job == "run" else _load_audit)(Path(folder), result, run, data_dir)
        _check_hashes(result, source)
        context, trials = _trials(result, result.audit, source, run, seed)
        # Trials that were trained together are trained together again: separately, they agree only up to rounding.
        key = (role, recorded.adversary, seed)
        index = next(i for i, t in enumerate(trials) if (t.role, t.name, t.seed) == key)
        batch = next(batch for batch in context.together(trials) if index in batch)
        repeated = {(c.role, c.adversary, c.seed): c for c in context.curves([trials[i] for i in batch])}
        return Replay(recorded, repeated[key])


def _trials(
    result: RunResult, audit: AuditResult, source: _Source, run: Run, seed: int
) -> tuple[TrialContext, list[Trial]]:
    """The context of the audit's trials, and those that were added at the same look as this seed's."""
    seeds = audit.stage_of(seed)
    for task_role, task in source.tasks.items():
        check_fits(source.immunized, task, own_task=task_role == "benign", finite=False, trainable=False)
    transplanted = any(name.endswith(TRANSPLANTED) for name in audit.adversaries)
    adversary_data = halves(source.tasks["restricted"])[1]
    context = TrialContext(
        source.immunized,
        source.original,
        transplant(source.immunized, source.original) if transplanted else None,
        {("restricted", each): few_of(adversary_data, audit.shots, run, each) for each in seeds},
        source.tasks["benign"],
        tuple(audit.budgets),
        run,
        bool(result.recipe["audit"]["stacked"]),
        source.reference,
    )
    adversaries = [build(config) for name, config in audit.adversaries.items() if not name.endswith(TRANSPLANTED)]
    for adversary in adversaries:
        if adversary.name not in audit.adversaries:
            raise HoldfastError(
                f"result.json holds the settings of {adversary.name!r}, an adversary that the audit does not name; was "
                "the file changed?"
            )
    return context, repetitions(adversaries, seeds, transplanted=transplanted)


def _recorded(audit: AuditResult, adversary: str | None, role: Role, seed: int) -> Curve:
    name = audit.by_budget[-1].best_adversary["immunized"] if adversary is None else adversary
    if name not in audit.adversaries:
        raise unknown("adversary", name, audit.adversaries)
    for curve in audit.curves:
        if (curve.adversary, curve.role, curve.seed, curve.task) == (name, role, seed, "restricted"):
            return curve
    raise HoldfastError(f"The audit has no trial of {name!r} on {role} with seed {seed}; its seeds are {audit.seeds}.")


def _load_run(folder: Path, result: RunResult, run: Run, data_dir: Path | str | None) -> _Source:
    try:
        recipe = Recipe.model_validate(result.recipe)
    except ValidationError as error:
        raise readable(error, f"The recipe in {str(folder / 'result.json')!r}", Recipe) from error
    specs = {"benign": recipe.benign, "restricted": recipe.restricted}
    tasks = {role: load_task_for(spec, recipe.model, data_dir=data_dir) for role, spec in specs.items()}
    benign = tasks["benign"]
    with run.seeded("initialise"):
        original = load_model(recipe.model, benign, data_dir=data_dir, device=run.device)
    if recipe.pretrain is not None:
        original.load(folder / "checkpoints" / "original.safetensors")
    immunized = load_model(str(folder / "model.safetensors"), benign, device=run.device)
    reference = recipe.load_reference(tasks["restricted"], data_dir=data_dir, device=run.device)
    return _Source(immunized, original.eval(), tasks, reference)


def _load_audit(folder: Path, result: RunResult, run: Run, data_dir: Path | str | None) -> _Source:
    source = result.recipe.get("source")
    if not isinstance(source, Mapping):
        raise HoldfastError(
            f"{str(folder / 'result.json')!r} does not say where its models and tasks came from: the audit was called "
            "from Python, with objects. Repeat it there with Adversary.attack; only audits of `holdfast audit` and "
            "`holdfast run` can be replayed from their folder."
        )
    original = _text(source, "original")
    tasks = {role: load_task_for(_text(source, role), original, data_dir=data_dir) for role in ("benign", "restricted")}

    def released(name: str, prefix: str) -> SplitModel:
        weights, head, mean, std = (source.get(f"{prefix}{key}") for key in ("weights", "head", "mean", "std"))
        return load_released(
            _text(source, name), weights, tasks["benign"], head=head, data_dir=data_dir,
            mean=None if mean is None else split_numbers(str(mean), f"result.json: recipe.source.{prefix}mean", float),
            std=None if std is None else split_numbers(str(std), f"result.json: recipe.source.{prefix}std", float),
        )  # fmt: skip

    reference = source.get("reference")
    other = (
        None
        if reference is None
        else load_released(str(reference), None, tasks["restricted"], own_head=False, data_dir=data_dir)
    )
    return _Source(released("model", ""), released("original", "original_"), tasks, other)


def _text(source: Mapping[str, Any], key: str) -> str:
    value = source.get(key)
    if not isinstance(value, str):
        raise HoldfastError(f"result.json: recipe.source.{key} is {value!r}; expected a name.")
    return value


def _check_hashes(result: RunResult, source: _Source) -> None:
    """Refuses other weights and other data, with which scores could not be compared."""
    tasks, models = result.provenance.tasks, result.provenance.models
    hashes = {f"{role} data": (task.facts().sha256, tasks[role].sha256) for role, task in source.tasks.items()}
    for role, model in source.models.items():
        hashes[f"{role} model"] = (model.facts().sha256, models[role].sha256)
    other = [f"the {name} (SHA-256 {now[:12]}... instead of {then[:12]}...)" for name, (now, then) in hashes.items()
             if now != then]  # fmt: skip
    if other:
        raise HoldfastError(
            f"Not what was audited: {', '.join(other)}. A trial can only be repeated on the same weights and data."
        )
