"""The registry of the zoo: every sham defense with its mechanism, and the adversary that undoes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from holdfast.adversaries import Adversary
from holdfast.models import SplitModel, transplant
from holdfast.tasks import Task
from zoo.settings import SETTINGS, Setting

Make = Callable[[SplitModel, Task, Task], SplitModel]
"""A function of the original, its benign task, and the defender's half of the restricted task."""


@dataclass(frozen=True)
class Sham:
    """A sham defense.

    Attributes:
        name: in the registry.
        setting: name of the `Setting` with its original and its tasks.
        mechanism: what hinders fine-tuning, in a sentence: the docstring of `make`.
        answer: the adversary that undoes it.
        inside: whether the answer attacks the weights inside the original's code, as audits do besides.
        make: builds it; random draws are from torch's global generator.
        plain: attacks under which it looks resistant, if they are not those of the setting.
        family: the module that defines it.
        held_out: whether it was made after the newest battery was chosen and had no part in the choice.
    """

    name: str
    setting: str
    mechanism: str
    answer: Adversary
    inside: bool
    make: Make
    plain: tuple[Adversary, ...]
    family: str
    held_out: bool = False

    @property
    def domain(self) -> str:
        """Vision, language or denoising."""
        return SETTINGS[self.setting].domain


ZOO: dict[str, Sham] = {}
"""Every sham by its name."""


def sham(
    setting: str,
    answer: Adversary,
    *,
    inside: bool = False,
    plain: tuple[Adversary, ...] | None = None,
    name: str | None = None,
    held_out: bool = False,
) -> Callable[[Make], Make]:
    """Returns a decorator that registers a function under its name; see `Sham` for the arguments."""

    def register(function: Make) -> Make:
        own = name or function.__name__.replace("_", "-")
        mechanism = " ".join((function.__doc__ or "").split())
        if own in ZOO or not mechanism:
            raise ValueError(f"the sham {own!r} needs an unused name and a docstring")
        fit = SETTINGS[setting].plain if plain is None else plain
        family = function.__module__.rpartition(".")[2]
        ZOO[own] = Sham(own, setting, mechanism, answer, inside, function, fit, family, held_out)
        return function

    return register


@dataclass(frozen=True)
class Case:
    """A sham that was built, with all that an audit of it needs.

    Attributes:
        sham: its row of the registry.
        setting: budgets, shots, tasks and the original.
        model: the sham defense itself.
    """

    sham: Sham
    setting: Setting
    model: SplitModel

    @property
    def original(self) -> SplitModel:
        """What the sham was made from."""
        return self.setting.original

    def victim(self) -> SplitModel:
        """The model that the answer attacks: the sham, or its weights inside the original's code."""
        if not self.sham.inside:
            return self.model
        inside = transplant(self.model, self.original)
        if inside is None:
            raise ValueError(f"{self.sham.name}: the original's code does not take its weights")
        return inside


def make(name: str) -> SplitModel:
    """Builds a sham by name, reproducibly."""
    chosen = ZOO[name]
    setting = SETTINGS[chosen.setting]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return chosen.make(setting.original, setting.benign, setting.defender).eval()


def case(name: str) -> Case:
    """Builds a sham with its original, tasks, budgets and shots.

    The adversary's half of the restricted task is `setting.restricted`, with `setting.few(seed)` to train on.
    """
    return Case(ZOO[name], SETTINGS[ZOO[name].setting], make(name))
