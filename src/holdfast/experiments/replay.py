"""Replaying: one trial of a finished audit once more, from what its folder says about it."""

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
from holdfast.runtime.argument_checks import readable
from holdfast.runtime.devices import cpu_threads, resolve_device
from holdfast.runtime.run import Run
from holdfast.tasks import Task
from holdfast.tasks.splits import halves


@dataclass(frozen=True)
class Replay:
    """A trial, as it was recorded and as it came out now.

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
    """The models and tasks of a finished audit, loaded anew."""

    immunized: SplitModel
    original: SplitModel
    tasks: dict[str, Task]


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
        folder: what `holdfast run` or `holdfast audit` completed.
        adversary: its name; None: the best one on the immunized model.
        role: which model is attacked.
        seed: which repetition.
        data_dir: where tasks and weights are looked up.
        device: None: the recorded one.
        threads: CPU threads of torch; None: as many as were recorded, for sums depend on it in the last digit.

    Raises:
        HoldfastError: if the folder does not say where its models came from, or they, or the data, are others now.
    """
    result = read_result(folder)
    if result.audit is None:
        raise HoldfastError(f"{str(folder)!r} holds no audit (its kind is {result.job!r}); there is nothing to replay.")
    recorded = _recorded(result.audit, adversary, role, seed)
    run = Run(result.seed, resolve_device(result.provenance.device if device is None else device))
    with cpu_threads(result.provenance.threads if threads is None else threads):
        source = _load(Path(folder), result, run, data_dir)
        _check_hashes(result, source)
        context, trials = _trials(result, result.audit, source, run)
        # Trials that were trained together are trained together again: apart, they agree up to rounding only.
        mine = next(i for i, t in enumerate(trials) if (t.role, t.name, t.seed) == (role, recorded.adversary, seed))
        batch = next(batch for batch in context.together(trials) if mine in batch)
        again = {(c.role, c.adversary, c.seed): c for c in context.curves([trials[i] for i in batch])}
        return Replay(recorded, again[role, recorded.adversary, seed])


def _trials(result: RunResult, audit: AuditResult, source: _Source, run: Run) -> tuple[TrialContext, list[Trial]]:
    """What the audit's trials need, and all of them."""
    for on, task in source.tasks.items():
        check_fits(source.immunized, task, own_task=on == "benign", finite=False, trainable=False)
    transplanted = any(name.endswith(TRANSPLANTED) for name in audit.adversaries)
    adversary_data = halves(source.tasks["restricted"])[1]
    context = TrialContext(
        source.immunized,
        source.original,
        transplant(source.immunized, source.original) if transplanted else None,
        {("restricted", seed): few_of(adversary_data, audit.shots, run, seed) for seed in audit.seeds},
        source.tasks["benign"],
        tuple(audit.budgets),
        run,
        bool(result.recipe["audit"]["stacked"]),
    )
    adversaries = [build(config) for name, config in audit.adversaries.items() if not name.endswith(TRANSPLANTED)]
    for adversary in adversaries:
        if adversary.name not in audit.adversaries:
            raise HoldfastError(
                f"The settings of an adversary in result.json are those of {adversary.name!r}, which the audit does "
                "not name; was the file changed?"
            )
    return context, repetitions(adversaries, audit.seeds, transplanted=transplanted)


def _recorded(audit: AuditResult, adversary: str | None, role: Role, seed: int) -> Curve:
    name = audit.by_budget[-1].best_adversary["immunized"] if adversary is None else adversary
    if name not in audit.adversaries:
        raise unknown("adversary", name, audit.adversaries)
    for curve in audit.curves:
        if (curve.adversary, curve.role, curve.seed, curve.task) == (name, role, seed, "restricted"):
            return curve
    raise HoldfastError(f"The audit has no trial of {name!r} on {role} with seed {seed}; its seeds are {audit.seeds}.")


def _load(folder: Path, result: RunResult, run: Run, data_dir: Path | str | None) -> _Source:
    return (_load_run if result.job == "run" else _load_audit)(folder, result, run, data_dir)


def _load_run(folder: Path, result: RunResult, run: Run, data_dir: Path | str | None) -> _Source:
    try:
        recipe = Recipe.model_validate(result.recipe)
    except ValidationError as error:
        raise readable(error, f"The recipe in {str(folder / 'result.json')!r}", Recipe) from error
    tasks = {
        on: load_task_for(spec, recipe.model, data_dir=data_dir)
        for on, spec in (("benign", recipe.benign), ("restricted", recipe.restricted))
    }
    benign = tasks["benign"]
    with run.seeded("initialise"):
        original = load_model(recipe.model, benign, data_dir=data_dir, device=run.device)
    if recipe.pretrain is not None:
        original.load(folder / "checkpoints" / "original.safetensors")
    immunized = load_model(str(folder / "model.safetensors"), benign, device=run.device)
    return _Source(immunized, original.eval(), tasks)


def _load_audit(folder: Path, result: RunResult, run: Run, data_dir: Path | str | None) -> _Source:
    source = result.recipe.get("source")
    if not isinstance(source, Mapping):
        raise HoldfastError(
            f"{str(folder / 'result.json')!r} does not say where its models and tasks came from: the audit was called "
            "from Python, with objects. Repeat it there with Adversary.attack; only audits of `holdfast audit` and "
            "`holdfast run` can be replayed from their folder."
        )
    tasks = {
        on: load_task_for(_text(source, on), _text(source, "original"), data_dir=data_dir)
        for on in ("benign", "restricted")
    }

    def released(name: str, prefix: str) -> SplitModel:
        said = {key: source.get(f"{prefix}{key}") for key in ("mean", "std")}
        mean, std = (None if v is None else _numbers(v, f"{prefix}{key}") for key, v in said.items())
        return load_released(
            _text(source, name), source.get(f"{prefix}weights"), tasks["benign"], head=source.get(f"{prefix}head"),
            mean=mean, std=std, data_dir=data_dir,
        )  # fmt: skip

    return _Source(released("model", ""), released("original", "original_"), tasks)


def _numbers(text: Any, key: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in str(text).strip("[]() ").split(","))
    except ValueError as error:
        raise HoldfastError(f"result.json: recipe.source.{key} is {text!r}; expected numbers with commas.") from error


def _text(source: Mapping[str, Any], key: str) -> str:
    value = source.get(key)
    if not isinstance(value, str):
        raise HoldfastError(f"result.json: recipe.source.{key} is {value!r}; expected a name.")
    return value


def _check_hashes(result: RunResult, source: _Source) -> None:
    """Refuses other weights and other data: a difference in scores would say nothing."""
    tasks, models = result.provenance.tasks, result.provenance.models
    found = {f"{on} data": (task.facts().sha256, tasks[on].sha256) for on, task in source.tasks.items()}
    for role, model in (("immunized", source.immunized), ("original", source.original)):
        found[f"{role} model"] = (model.facts().sha256, models[role].sha256)
    other = [f"the {name} (SHA-256 {now[:12]}... instead of {then[:12]}...)" for name, (now, then) in found.items()
             if now != then]  # fmt: skip
    if other:
        raise HoldfastError(
            f"Not what was audited: {', '.join(other)}. A trial can only be repeated on the same weights and data."
        )
