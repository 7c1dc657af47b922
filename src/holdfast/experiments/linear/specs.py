"""The keys of a linear study in a recipe: pairs of tasks, methods, measurements."""

from __future__ import annotations

import itertools
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from holdfast.adversaries import listed
from holdfast.errors import unknown
from holdfast.models import ModelSpec
from holdfast.spectral.frontier import SpaceName
from holdfast.tasks import TaskSpec

IDENTITY = "identity"
"""The row of the features without an extractor."""


class PairSpec(BaseModel):
    """A benign and a restricted task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benign: TaskSpec
    restricted: TaskSpec


class ClassPairsSpec(BaseModel):
    """All ordered pairs of classes of one data set, as in the paper's MNIST task; the inputs of a class are a domain.

    A domain has one class, so the target of every sample is 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: TaskSpec
    mean: float = Field(0.0, description="Subtracted from inputs (images are in [0, 1]).")
    std: float = Field(1.0, gt=0, description="Divides the inputs afterwards.")


class StudyTable(BaseModel):
    """One table of a study."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    pair: PairSpec | None = None
    class_pairs: ClassPairsSpec | None = None
    space: SpaceName = Field("common", description="See `Frontier.of`; the same for all methods and measurements.")
    ridge: float = Field(0.01, gt=0)
    held_out: bool = Field(False, description="Measure (i) and (ii) on the tasks' test splits as well.")
    paper: dict[str, dict[str, float]] = Field({}, description="The paper's numbers: method, cell, value.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.pair is None) == (self.class_pairs is None):
            raise ValueError("give either `pair` or `class_pairs`")
        if self.class_pairs is not None and self.held_out:
            raise ValueError("held_out needs a `pair`: `class_pairs` have no test split")
        return self


class ProbesSpec(BaseModel):
    """Linear probes to run on the features of every method, for single pairs of classification tasks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    battery: str = "probes-v1"
    budgets: tuple[int, ...] = (1, 10, 100)
    benign: tuple[str, ...] = Field((), description="Adversaries of the battery to run on the benign task, too.")

    @model_validator(mode="after")
    def _known(self) -> Self:
        names = [a.name for a in listed(self.battery)]
        for name in self.benign:
            if name not in names:
                raise unknown(f"adversary of {self.battery}:", name, names)
        if not self.budgets or self.budgets[0] < 1 or any(a >= b for a, b in itertools.pairwise(self.budgets)):
            raise ValueError(f"budgets are {list(self.budgets)}; expected at least one, ascending, from 1 on")
        return self


class StudySpec(BaseModel):
    """The keys of a study in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: int = Field(1, ge=1, description="Repetitions of every method.")
    model: ModelSpec | None = Field(None, description="Model whose features the probes get; null: the inputs.")
    tables: dict[str, StudyTable]
    methods: dict[str, dict[str, Any]] = Field(
        description="Linear defenses by the name of their row: `name`, settings."
    )
    tau_q: float = Field(0.9, gt=0, lt=1, description="Share of the removable loss in tau_q.")
    tau_steps: int = Field(1000, ge=0, description="Steps to run for the measured tau_q; 0: only predict it.")
    norm_ratio_steps: int = Field(0, ge=0, description="Steps of the norm-ratio curves of single pairs; 0: no curves.")
    probes: ProbesSpec | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.methods or IDENTITY in self.methods:
            raise ValueError(f"methods has {list(self.methods)}; give at least one, and none called {IDENTITY!r}")
        if self.probes is not None and not all(t.pair and t.held_out for t in self.tables.values()):
            raise ValueError("probes need every table to be a `pair` with `held_out: true`")
        return self
