"""Many immunizations: run wherever, kept by what they are made of, and taken from the folder of another run.

An immunization may take days, and several tables of the SOPHON paper are about one and the same model. So each
finished model lies in the run's folder under a hash of everything that it depends on, with its record beside it:
another run that needs this very model takes it from there, checks it, and says so.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from holdfast.defenses import Defense
from holdfast.errors import HoldfastError
from holdfast.experiments.model_store import MadeOf, ModelStore, shelf
from holdfast.experiments.setting import Setting
from holdfast.models import SplitModel
from holdfast.results import ImmunizationResult
from holdfast.runtime.executors import Executor
from holdfast.runtime.run import Run, fingerprint


@dataclass(frozen=True)
class ImmunizationJob:
    """One immunization that is wanted.

    Attributes:
        setting: on which ground.
        label: the recipe's name for the defense.
        seed: which repetition.
        defense: with its settings.
        run_seed: what the defense's random choices derive from.
        made_of: everything that the result depends on.
    """

    setting: str
    label: str
    seed: int
    defense: Defense = field(repr=False)
    run_seed: int
    made_of: MadeOf = field(repr=False)

    @classmethod
    def of(cls, setting: str, label: str, seed: int, defense: Defense, ground: Setting, run: Run) -> ImmunizationJob:
        """Describes an immunization; seed s of it has the run's seed + s, as `holdfast immunize --seed` would."""
        defense = defense.resolved(ground.benign)
        settings = {f"defense.{key}": value for key, value in defense.config().items()}
        made_of = {"defense": defense.name, **settings, "seed": run.seed + seed, **ground.made_of}
        return cls(setting, label, seed, defense, run.seed + seed, json.loads(json.dumps(made_of)))

    def __str__(self) -> str:
        return f"{self.label}, seed {self.seed}, in {self.setting!r}"


@dataclass(frozen=True)
class Made:
    """An immunized model and how it came to be.

    Attributes:
        model: the model, on the CPU.
        result: the defense's record.
        benign: its score on the benign test split; None: not finite.
        seconds: that it took, since it was last started.
        reused_from: the folder of the run that made it; None: this run did.
    """

    model: SplitModel
    result: ImmunizationResult
    benign: float | None
    seconds: float
    reused_from: str | None


def check_reuse(reuse: Sequence[Path]) -> None:
    """Refuses folders that hold no immunized model, before any work is done."""
    for owner in reuse:
        if not shelf(owner, "immunized").catalogue():
            raise HoldfastError(
                f"--reuse {str(owner)!r}: it holds no immunized model (checkpoints/immunized/); expected the folder of "
                "a protocol's run."
            )


def borrow_all(orders: Sequence[ImmunizationJob], reuse: Sequence[Path], *, run: Run) -> None:
    """Takes what is wanted from other runs' folders, and says what was taken and what was not.

    Raises:
        HoldfastError: if a folder holds none that is wanted, or a damaged one.
    """
    assert run.folder is not None
    own = shelf(run.folder, "immunized")
    for owner in reuse:
        theirs = shelf(owner, "immunized")
        held = theirs.catalogue()
        fitting = [order for order in orders if theirs.has(order.made_of)]
        if not fitting:
            raise HoldfastError(
                f"--reuse {str(owner)!r}: none of its {len(held)} immunized models is wanted here. "
                + "; ".join(_nearest(order, held) for order in orders[:4])
                + ". Give the recipe the same settings, or leave --reuse out and immunize anew."
            )
        for order in fitting:
            if own.has(order.made_of):
                continue
            own.borrow(order.made_of, theirs, owner)
            run.say(f"Reusing {order} from {owner}")
        for order in orders:
            if order not in fitting and not own.has(order.made_of):
                run.say(f"Not in {owner}: {order} ({_nearest(order, held)})")


def _nearest(order: ImmunizationJob, held: Sequence[MadeOf]) -> str:
    """In what the nearest of several models differs from the one that is wanted."""

    def differing(other: MadeOf) -> list[str]:
        keys = {*order.made_of, *other}
        return sorted(k for k in keys if order.made_of.get(k) != other.get(k))

    nearest = min(map(differing, held), key=lambda keys: ("defense" in keys, len(keys)))
    return f"{order.label}, seed {order.seed}: " + (
        "there is none of this defense" if "defense" in nearest else f"the nearest differs in {', '.join(nearest)}"
    )


def immunize_all(
    orders: Sequence[ImmunizationJob], grounds: Mapping[str, Setting], *, run: Run, executor: Executor
) -> dict[tuple[str, str, int], Made]:
    """Returns every immunized model that is wanted; made now only where it is not in the run's folder yet.

    Each defense continues from its last checkpoint, and each finished model is kept at once.

    Args:
        orders: what is wanted.
        grounds: models and tasks by setting.
        run: seed, device, folder.
        executor: where the defenses run; it does not change their results.

    Returns:
        By setting, label and seed.
    """
    assert run.folder is not None
    own = shelf(run.folder, "immunized")
    missing = list({fingerprint(o.made_of): o for o in orders if not own.has(o.made_of)}.values())
    for order in missing:
        _checkpoint_folder(run, order).mkdir(parents=True, exist_ok=True)
    alone = executor.name == "serial"  # then each defense shows its own bar, and two do not fit on a terminal
    shown = Run(run.seed, run.device, run.folder, quiet=run.quiet or alone)
    with shown.progress("Immunizing", len(orders), len(orders) - len(missing)) as bar:
        for index, (model, notes) in executor.run(_work, _ImmunizationContext(grounds, run), missing):
            order = missing[index]
            own.keep(order.made_of, model, notes)
            shutil.rmtree(_checkpoint_folder(run, order), ignore_errors=True)
            bar.tick(str(order))
    return {(o.setting, o.label, o.seed): _taken(own, o, grounds[o.setting].original) for o in orders}


def _taken(own: ModelStore, order: ImmunizationJob, original: SplitModel) -> Made:
    model, notes = own.take(order.made_of, original)
    try:
        result = ImmunizationResult.model_validate(notes["result"])
        model.immunization = result
        return Made(model, result, notes["benign"], float(notes["seconds"]), notes.get("reused_from"))
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise HoldfastError(
            f"The notes on {order} in {str(own.folder)!r} are damaged ({type(error).__name__}: {error}); delete them, "
            "and the model is made anew."
        ) from error


def _checkpoint_folder(run: Run, order: ImmunizationJob) -> Path:
    assert run.folder is not None
    return run.folder / "checkpoints" / "immunizing" / fingerprint(order.made_of)


@dataclass(frozen=True)
class _ImmunizationContext:
    """What all immunizations need; it travels once to each worker."""

    grounds: Mapping[str, Setting]
    run: Run


def _work(workshop: _ImmunizationContext, order: ImmunizationJob) -> tuple[SplitModel, dict[str, Any]]:
    """Makes one immunized model."""
    ground, run = workshop.grounds[order.setting], workshop.run
    place = _checkpoint_folder(run, order)
    # A worker on another machine does not see the folder, and works without checkpoints.
    own = Run(order.run_seed, run.device, place if place.is_dir() else None, run.quiet)
    run.say(f"Immunizing {order}")
    begin = time.perf_counter()
    model, record = order.defense.immunize(ground.original, ground.benign, ground.defender_data, run=own)
    seconds = time.perf_counter() - begin
    score = ground.benign.audit_score(model)
    notes = {
        "result": order.defense.attach_result(record, ground.original, model).model_dump(mode="json"),
        "benign": score if math.isfinite(score) else None,
        "seconds": round(seconds, 3),
    }
    return model.to("cpu"), notes
