"""What shams are made from: an original, its benign task, and a restricted task on which it has an advantage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from holdfast.adversaries import Adversary, FineTuning, listed
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.runtime.run import Run
from holdfast.tasks import Task, load_task
from holdfast.tasks.splits import halves
from holdfast.training import Strategy, pretrain

CPU = torch.device("cpu")
BUDGETS, SHOTS = (0, 5, 10, 20), 2
"""Steps, and samples per class, at which the originals of digits have an advantage; with more, scratch catches up."""
ADAM = Strategy("head", "all", "adam", 1e-3, 50)
TUNED = FineTuning(ADAM)
"""The answer to what the original's code, or thawing, undoes."""
FAST = FineTuning(Strategy("head", "all", "adagrad", 1e-2, 50))
"""The same, at the setting that is the best on the originals."""
HEAD_ALONE = FineTuning(Strategy("head", "head", "momentum", 1e-1, 50))
NAIVE = (
    FineTuning(Strategy("direct", "all", "momentum", 1e-2, 50)),
    FineTuning(Strategy("direct", "all", "adam", 1e-3, 50)),
)
"""The whole network at two usual settings."""
DESCENT = NAIVE[:1]
"""For shams that stop plain gradient descent only, as Adam does not care how long a gradient is."""
QUICK = listed("quick-v1")
"""The quick battery, with fresh heads and the head alone."""


def undone(*moves: str) -> FineTuning:
    """The answer that makes these moves first."""
    return FineTuning(ADAM, undo=moves)


@dataclass
class Setting:
    """An original, its tasks, and how much an adversary gets.

    Attributes:
        domain: vision, language or denoising.
        tasks: makes the benign task and the whole restricted one.
        build: makes the original.
        plain: attacks that know nothing of the mechanism.
        budgets: steps at which attacks are scored.
        shots: samples per class that the adversary has; in total for a task without classes.
        shown: what the original is, for readers.
    """

    domain: str
    tasks: Callable[[], tuple[Task, Task]]
    build: Callable[[], SplitModel]
    plain: tuple[Adversary, ...]
    budgets: tuple[int, ...]
    shots: int
    shown: str

    @cached_property
    def _tasks(self) -> tuple[Task, Task, Task]:
        benign, restricted = self.tasks()
        return benign, *halves(restricted)

    @property
    def benign(self) -> Task:
        """The original's own task."""
        return self._tasks[0]

    @property
    def defender(self) -> Task:
        """The half of the restricted task that the maker of a sham has."""
        return self._tasks[1]

    @property
    def restricted(self) -> Task:
        """The adversary's half."""
        return self._tasks[2]

    @cached_property
    def original(self) -> SplitModel:
        """The model that shams are made from; it is shared, so do not change it."""
        return self.build()

    def few(self, seed: int) -> Task:
        """What the adversary has to train on."""
        return self.restricted.few_shot(self.shots, seed)


SETTINGS: dict[str, Setting] = {}
"""Every setting by its name."""


def zoo_tasks() -> tuple[Task, Task]:
    """The benign task and a restricted task on which the originals have an advantage with two samples per class."""
    return load_task("digits[0-6]"), load_task("digits[7-9]")


def zoo_original(norm: str) -> SplitModel:
    """The original: a CNN for the benign task whose features were trained on all digits.

    So its advantage over a fresh network is large with any seed and processor. With features of the benign digits alone
    it is a few points with one seed and zero with another.
    """
    return SETTINGS[norm].original


def taught(spec: ModelSpec, steps: int = 600) -> SplitModel:
    """A network for the benign digits that was trained on all of them, with the rows of its head for these."""
    benign, _ = zoo_tasks()
    digits, run = load_task("digits"), Run(seed=0, device=CPU)
    with run.seeded("initialise"):
        teacher, original = load_model(spec, digits), load_model(spec, benign)
    teacher = pretrain(teacher, digits, steps=steps, run=run)
    head = {f"{teacher.head_name}.{n}" for n, _ in teacher.head.named_parameters()}
    state = {n: t for n, t in teacher.network.state_dict().items() if n not in head}
    original.network.load_state_dict(state, strict=False)
    with torch.no_grad():
        for own, other in zip(original.head.parameters(), teacher.head.parameters(), strict=True):
            own.copy_(other[: len(own)])  # the classes of the benign task come first
    return original.eval()


for _norm, _shown in (("batch", "CNN with BatchNorm"), ("none", "CNN")):
    _spec = ModelSpec(name="cnn", options={"depth": 3, "norm": _norm})
    SETTINGS[_norm] = Setting("vision", zoo_tasks, partial(taught, _spec), NAIVE, BUDGETS, SHOTS, _shown)
