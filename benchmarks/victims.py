"""The victims of `choose_standard.py`: shams of images, their originals, a fresh network, and real defended models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from holdfast.adversaries import Adversary, listed
from holdfast.defenses import NTL, SignalFrontier, Sophon, TrajectoryErasure
from holdfast.models import SplitModel, architecture_differences, load_model
from holdfast.runtime.run import Run
from holdfast.tasks import Task, TaskSpec, load_task
from holdfast.tasks.splits import halves

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo  # it belongs to the tests

BASE = listed("quick-v2")
"""Measured on every victim, and members of the battery whatever is chosen."""
MNIST = tuple(f"mnist[{which}]" for which in ("0-4", "5-9"))


@dataclass(frozen=True)
class Victim:
    """A model to attack, and what the adversary has.

    Attributes:
        name: after `sham: `, `held out: `, `released: `, `original of later ones: `, `original: `, `looks: `,
            `control: ` or `real: `.
        model: the model. A sham is as its answer meets it: as released, or inside the original's code. Where that
            differs, it is there once more as released.
        benign: its own task.
        restricted: the adversary's half.
        shots: samples a class.
        budgets: steps.
        first: what attacks it in the first round.
        like: equal for models with the same weights in the same code, on the same tasks; None: the model's code is not
            known to be the same as another's.
    """

    name: str
    model: SplitModel
    benign: Task
    restricted: Task
    shots: int
    budgets: tuple[int, ...]
    first: tuple[Adversary, ...] = BASE
    like: str | None = None

    @property
    def sham(self) -> bool:
        """Whether knowledge is only hidden in it."""
        return self.name.startswith("sham: ")


def victims(runs: list[Path], data: Path | None) -> Iterator[Victim]:
    """Every victim; `runs` are finished runs of the recipe trajectory-erasure/mnist."""
    shams = {name: row for name, row in zoo.ZOO.items() if row.domain == "vision" and not row.held_out}
    for setting in sorted({row.setting for row in shams.values()}):
        yield _original(setting)
    for name in shams:
        yield from _sham(name)
    yield from defended()
    yield from mnist(runs, data)


def held_out() -> Iterator[Victim]:
    """Shams of images that had no part in the choice, as their answers meet them, and before them their originals."""
    shams = {name: row for name, row in zoo.ZOO.items() if row.domain == "vision" and row.held_out}
    for setting in sorted({row.setting for row in shams.values()}):
        yield _of(f"original of later ones: {setting}", zoo.SETTINGS[setting].original, zoo.SETTINGS[setting], BASE)
    for name in shams:
        yield replace(list(_sham(name))[-1], name=f"held out: {name}")


def _of(name: str, model: SplitModel, setting: zoo.Setting, first: tuple[Adversary, ...]) -> Victim:
    like = None
    if not architecture_differences(model, setting.original):
        like = f"{setting.shown} {model.facts().sha256}"
    return Victim(name, model, setting.benign, setting.restricted, setting.shots, setting.budgets, first, like)


def _original(name: str) -> Victim:
    rows = (row for row in zoo.ZOO.values() if row.setting == name and not row.held_out)
    plain = (attack for row in rows for attack in row.plain)
    setting = zoo.SETTINGS[name]
    # Settings whose restricted images have a look of their own share an original: the choice needs it once.
    kind = "looks" if setting.shown.startswith("CNN; ") else "original"
    return _of(f"{kind}: {name}", setting.original, setting, unique((*BASE, *plain)))


def _sham(name: str) -> Iterator[Victim]:
    case, row = zoo.case(name), zoo.ZOO[name]
    if row.inside:
        yield _of(f"released: {name}", case.model, case.setting, row.plain)
        yield _of(f"sham: {name}", case.victim(), case.setting, unique((*BASE, row.answer)))
    else:
        yield _of(f"sham: {name}", case.model, case.setting, unique((*BASE, *row.plain, row.answer)))


def defended() -> Iterator[Victim]:
    """A fresh network, and the CNN with BatchNorm after defenses of the package."""
    setting, run = zoo.SETTINGS["batch"], Run(seed=0, device=torch.device("cpu"))
    brief = {"iterations": 60, "steps": 10, "batch_sizes": (20,), "guard": False}
    defenses = {
        "SOPHON": Sophon(**brief, learning_rates=(1e-4, 1e-3, 1e-2)),
        "trajectory erasure": TrajectoryErasure(**brief, recovery_loops=0),
        "NTL": NTL(iterations=200),
        "signal frontier": SignalFrontier(epsilon=1e-3),
    }
    with run.seeded("initialise"):
        yield _of("control: scratch", setting.original.fresh(), setting, BASE)
    for name, defense in defenses.items():
        model, _ = defense.immunize(setting.original, setting.benign, setting.defender, run=run)
        yield _of(f"real: {name}", model, setting, BASE)


def mnist(runs: list[Path], data: Path | None) -> Iterator[Victim]:
    """What the recipe immunized, and its original, with five images a class."""
    if not runs:
        return
    benign, whole = (load_task(TaskSpec(data=which, image_size=14, test_limit=400), data_dir=data) for which in MNIST)
    restricted, budgets = halves(whole)[1], (0, 10, 20, 50)
    files = {"control: original, MNIST": runs[0] / "checkpoints" / "original.safetensors"}
    files |= {f"real: trajectory erasure, MNIST, {folder.name}": folder / "model.safetensors" for folder in runs}
    for name, file in files.items():
        yield Victim(name, load_model(str(file), benign), benign, restricted, 5, budgets)


def unique(adversaries: tuple[Adversary, ...]) -> tuple[Adversary, ...]:
    """Adversaries without those of the same name."""
    return tuple({adversary.name: adversary for adversary in adversaries}.values())
