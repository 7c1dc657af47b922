"""Many immunizations: run wherever, kept by what they are made of, and taken from the folder of another run.

An immunization may take days, and several tables of the SOPHON paper are about one and the same model. So each
finished model lies in the run's folder under a hash of everything that it depends on, with its record beside it:
another run that needs this very model takes it from there, checks it, and says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from holdfast.defenses import Defense
from holdfast.documents import read_json
from holdfast.errors import HoldfastError
from holdfast.execution import Run, fingerprint, load_tensors, write_atomic
from holdfast.executors import Executor
from holdfast.models import SplitModel
from holdfast.results import ImmunizationResult
from holdfast.tasks import Task
from holdfast.team import team

MadeOf = dict[str, Any]


@dataclass(frozen=True)
class Shelf:
    """Finished models of one kind in a folder, each named by the hash of what it is made of."""

    folder: Path

    def _paths(self, made_of: MadeOf) -> tuple[Path, Path]:
        name = fingerprint(made_of)
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"

    def has(self, made_of: MadeOf) -> bool:
        """Whether a model made of this is here; the notes are written last, so that it is whole."""
        return team().by_main(self._paths(made_of)[1].is_file)

    def keep(self, made_of: MadeOf, model: SplitModel, notes: Mapping[str, Any]) -> None:
        """Puts a model here, with notes that JSON can hold."""
        team().by_main(lambda: self._keep(made_of, model, notes))

    def _keep(self, made_of: MadeOf, model: SplitModel, notes: Mapping[str, Any]) -> None:
        weights, beside = self._paths(made_of)
        file_sha256 = model.save(weights)
        written = {"made_of": made_of, "file_sha256": file_sha256, "holdfast": version("holdfast"), **notes}
        write_atomic(beside, json.dumps(written, indent=1))

    def take(self, made_of: MadeOf, like: SplitModel) -> tuple[SplitModel, dict[str, Any]]:
        """Returns a model that is here, and its notes.

        Args:
            made_of: what it is made of.
            like: of the same architecture; an extractor that was inserted later is found in the file.

        Raises:
            HoldfastError: if weights and notes are not what was put here.
        """
        weights, notes = self._paths(made_of)[0], self.notes(made_of)
        model = like.clone()
        described = load_tensors(weights)[1].get("model")
        if isinstance(described, dict):
            model.expect_extractor(described.get("extractor", False))
        model.load(weights)
        return model.eval(), notes

    def notes(self, made_of: MadeOf) -> dict[str, Any]:
        """Returns the notes on a model that is here, after checking that the weights are those that they are about.

        Raises:
            HoldfastError: if they are not, or something cannot be read.
        """
        weights, beside = self._paths(made_of)
        try:
            notes = read_json(beside.read_bytes())
            if notes["made_of"] != json.loads(json.dumps(made_of)):
                raise ValueError("it is about a model that is made of something else")
            if notes["file_sha256"] != hashlib.sha256(weights.read_bytes()).hexdigest():
                raise ValueError(f"{weights.name} has another SHA-256 than it says")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise HoldfastError(
                f"{str(beside)!r} is damaged ({error}); delete it, and the model is made anew."
            ) from error
        return dict(notes)

    def borrow(self, made_of: MadeOf, other: Shelf, owner: Path) -> None:
        """Copies a model from another shelf, after checking it; the notes say whose it was.

        Args:
            made_of: what it is made of.
            other: where it is.
            owner: the folder of the other run.
        """
        team().by_main(lambda: self._borrow(made_of, other, owner))

    def _borrow(self, made_of: MadeOf, other: Shelf, owner: Path) -> None:
        notes = other.notes(made_of)
        source, (weights, beside) = other._paths(made_of)[0], self._paths(made_of)
        write_atomic(weights, source.read_bytes())
        write_atomic(beside, json.dumps({**notes, "reused_from": notes.get("reused_from") or str(owner)}, indent=1))

    def catalogue(self) -> list[MadeOf]:
        """Returns what each model here is made of.

        Raises:
            HoldfastError: if notes cannot be read: the model that is looked for may be theirs.
        """
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                made_of = read_json(path.read_bytes())["made_of"]
                if not isinstance(made_of, dict):
                    raise ValueError("it does not say what the model is made of")
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                raise HoldfastError(
                    f"{str(path)!r} is damaged ({error}); delete it, and the model beside it, to go on without it."
                ) from error
            found.append(made_of)
        return found


def shelf(folder: Path, kind: str) -> Shelf:
    """Returns the shelf of a run's folder: `originals` or `immunized`."""
    return Shelf(folder / "checkpoints" / kind)


@dataclass(frozen=True)
class Ground:
    """Models and tasks of one setting.

    Attributes:
        original: the model before immunization, on the CPU.
        benign: its own task.
        restricted: what it must not be fine-tuned to.
        defenders: the defender's half.
        adversarys: the adversary's half.
        transfer: a third, harmless task that should stay easy to learn; no defense sees it.
    """

    original: SplitModel
    benign: Task
    restricted: Task
    defenders: Task
    adversarys: Task
    transfer: Task | None = None

    @cached_property
    def made_of(self) -> MadeOf:
        """What any model that is immunized here depends on."""
        mean, std = (None if v is None else v.flatten().tolist() for v in (self.original.mean, self.original.std))
        return {
            "model": self.original.facts().sha256,
            "input normalisation": [mean, std],
            "benign": self.benign.facts().sha256,
            "restricted": self.defenders.facts().sha256,
        }


@dataclass(frozen=True)
class Order:
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
    def of(cls, setting: str, label: str, seed: int, defense: Defense, ground: Ground, run: Run) -> Order:
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


def borrow_all(orders: Sequence[Order], reuse: Sequence[Path], *, run: Run) -> None:
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


def _nearest(order: Order, held: Sequence[MadeOf]) -> str:
    """In what the nearest of several models differs from the one that is wanted."""

    def differing(other: MadeOf) -> list[str]:
        keys = {*order.made_of, *other}
        return sorted(k for k in keys if order.made_of.get(k) != other.get(k))

    nearest = min(map(differing, held), key=lambda keys: ("defense" in keys, len(keys)))
    return f"{order.label}, seed {order.seed}: " + (
        "there is none of this defense" if "defense" in nearest else f"the nearest differs in {', '.join(nearest)}"
    )


def immunize_all(
    orders: Sequence[Order], grounds: Mapping[str, Ground], *, run: Run, executor: Executor
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
        _workplace(run, order).mkdir(parents=True, exist_ok=True)
    alone = executor.name == "serial"  # then each defense shows its own bar, and two do not fit on a terminal
    shown = Run(run.seed, run.device, run.folder, quiet=run.quiet or alone)
    with shown.progress("Immunizing", len(orders), len(orders) - len(missing)) as bar:
        for index, (model, notes) in executor.run(_work, _Workshop(grounds, run), missing):
            order = missing[index]
            own.keep(order.made_of, model, notes)
            shutil.rmtree(_workplace(run, order), ignore_errors=True)
            bar.tick(str(order))
    return {(o.setting, o.label, o.seed): _taken(own, o, grounds[o.setting].original) for o in orders}


def _taken(own: Shelf, order: Order, original: SplitModel) -> Made:
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


def _workplace(run: Run, order: Order) -> Path:
    assert run.folder is not None
    return run.folder / "checkpoints" / "immunizing" / fingerprint(order.made_of)


@dataclass(frozen=True)
class _Workshop:
    """What all immunizations need; it travels once to each worker."""

    grounds: Mapping[str, Ground]
    run: Run


def _work(workshop: _Workshop, order: Order) -> tuple[SplitModel, dict[str, Any]]:
    """Makes one immunized model."""
    ground, run = workshop.grounds[order.setting], workshop.run
    place = _workplace(run, order)
    # A worker on another machine does not see the folder, and works without checkpoints.
    own = Run(order.run_seed, run.device, place if place.is_dir() else None, run.quiet)
    run.say(f"Immunizing {order}")
    begin = time.perf_counter()
    model, record = order.defense.immunize(ground.original, ground.benign, ground.defenders, run=own)
    seconds = time.perf_counter() - begin
    score = ground.benign.audit_score(model)
    notes = {
        "result": order.defense.told(record, ground.original, model).model_dump(mode="json"),
        "benign": score if math.isfinite(score) else None,
        "seconds": round(seconds, 3),
    }
    return model.to("cpu"), notes
