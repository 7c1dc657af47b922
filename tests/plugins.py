"""What packages of other people add, each in one module: a defense, an adversary, a kind of task, a measurement."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest

from holdfast.runtime.registry import Registry

NOISE = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.defenses import Defense, register_defense
from holdfast.defenses.base import DefenseRecord


@register_defense
@dataclass
class Noise(Defense):
    name: ClassVar[str] = "noise"
    citation: ClassVar[str] = "a test"

    scale: float = 0.1

    def immunize(self, model, benign, restricted, *, run):
        immunized = model.clone().to(run.device)
        with run.seeded("noise"), torch.no_grad():
            for parameter in immunized.parameters():
                parameter.add_(self.scale * torch.randn_like(parameter))
        return immunized.eval(), DefenseRecord()
"""

HEAD_DESCENT = '''
from dataclasses import asdict, dataclass

import torch

from holdfast.adversaries import KINDS, Adversary, FineTuning, register_battery, undo_move
from holdfast.training import Strategy


@KINDS.register("head-descent")
@dataclass(frozen=True)
class HeadDescent(Adversary):
    """Plain gradient descent on the head, on all samples."""

    rate: float = 0.1
    name: str = "head descent"
    batch_size = 10**6

    def run(self, model, task, *, benign, generator, device):
        model.put_head(torch.nn.Linear(model.head.in_features, task.num_outputs))
        model.eval()
        yield torch.zeros(())
        for batch in task.batches("train", self.batch_size, generator=generator, device=device):
            loss = task.loss(model, batch)
            gradients = torch.autograd.grad(loss, list(model.head.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.head.parameters(), gradients):
                    parameter.sub_(self.rate * gradient)
            yield loss.detach()

    def config(self):
        return {"kind": "head-descent", **asdict(self)}


@undo_move("negate")
def negate(model, reference, task, generator, device):
    with torch.no_grad():
        model.head.weight.neg_()


register_battery(
    "descent-v1", (HeadDescent(0.5), FineTuning(Strategy("direct", "all", "sgd", 0.05, 10), undo=("negate",)))
)
'''

TAGS = '''
    """Tags: each sample has any number of them, and the score is the share of tags that are told rightly."""

    import numpy as np
    import torch
    import torch.nn.functional as F

    from holdfast.results.terms import Words
    from holdfast.tasks import TASKS, InMemoryTask


    class TagsTask(InMemoryTask):
        kind = "tagging"
        higher_is_better = True
        audit_unit = "share of tags"
        words = Words(guess="the commonest tags", samples="tagged samples", by_class=False)

        def __init__(self, name, x_train, y_train, x_test, y_test, tags):
            self.name, self.class_names = name, list(tags)
            x = {"train": self._inputs(x_train, "x_train"), "test": self._inputs(x_test, "x_test")}
            y = {"train": np.asarray(y_train, np.int64), "test": np.asarray(y_test, np.int64)}
            self._check_lengths(x, y, "rows of tags")
            self._set(*({s: torch.from_numpy(a) for s, a in part.items()} for part in (x, y)))

        def _set(self, x, y):
            super()._set(x, y)
            self.num_outputs = y["train"].shape[1]
            common = (y["train"].double().mean(0) > 0.5).long()
            self.chance = float((y["test"] == common).double().mean())

        def targets(self, y):
            return y.to(torch.float64)

        def loss_of(self, outputs, batch):
            return F.binary_cross_entropy_with_logits(outputs, batch.y.to(outputs.dtype))

        def outcomes_of(self, outputs, batch):
            return ((outputs > 0) == (batch.y > 0)).double().mean(1)

        def score_of(self, outputs, batch):
            return float(self.outcomes_of(outputs.detach(), batch).mean())


    def _tags(name, seed):
        rng = np.random.default_rng(0)
        own = np.random.default_rng(seed)
        directions = own.normal(size=(8, 3))
        x = rng.normal(size=(160, 8)) + seed
        y = (x - seed) @ directions > 0
        return TagsTask(name, x[:120], y[:120], x[120:], y[120:], ["red", "round", "large"])


    @TASKS.register("tags-seen")
    def seen():
        return _tags("tags-seen", 1)


    @TASKS.register("tags-hidden")
    def hidden():
        return _tags("tags-hidden", 2)
'''

WEIGHT_NORM = """
from holdfast.errors import HoldfastError
from holdfast.experiments.measurements.base import MEASUREMENTS, Measurement
from holdfast.results.tables import Cell, Outcome, Table
from holdfast.runtime.jobs import Job, JournalStore, run_jobs
from holdfast.runtime.journal import Journal


@MEASUREMENTS.register("weight-norm")
class WeightNorm(Measurement):
    order: int = 2

    def check(self, settings):
        if self.order < 1:
            raise HoldfastError(f"weight-norm: order is {self.order}; expected at least 1.")

    def measure(self, protocol):
        models = protocol.context.models
        jobs = [Job(str(place), place, str(place)) for place in models]
        run = protocol.context.run
        journal = Journal(run.path("weight-norm.jsonl"), {"order": self.order})
        store = JournalStore(journal, {j.key: float for j in jobs})
        found = run_jobs(norm, (self.order, models), jobs, store, run=run, executor=protocol.executor)
        rows = [{"model": place[1], "norm": Cell.of([value])} for place, value in zip(models, found)]
        return Outcome({"weight_norm": Table(title="Norm of all weights", rows=rows)}, {}, ["Norms were taken."])


def norm(context, place):
    order, models = context
    return sum(float(p.detach().norm(order) ** order) for p in models[place].parameters()) ** (1 / order)
"""


@contextmanager
def installed(folder: Path, modules: Mapping[str, tuple[str, str]], registries: list[Registry]) -> Iterator[None]:
    """Inside the block a package is installed.

    Args:
        folder: is put on the path.
        modules: by name: group of the entry point, and code.
        registries: forget afterwards what the package registered.
    """
    with pytest.MonkeyPatch.context() as patch:
        for registry in registries:
            len(registry)  # Holdfast's own register once, before what is patched here is undone
            patch.setattr(registry, "_members", dict(registry._members))
            patch.setattr(registry, "_loaded", False)
        points = []
        for name, (group, code) in modules.items():
            (folder / f"{name}.py").write_text(dedent(code))
            points.append(f"[{group}]\n{name} = {name}\n")
        facts = folder / "others-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text("\n".join(points))
        patch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            for name in modules:
                sys.modules.pop(name, None)
