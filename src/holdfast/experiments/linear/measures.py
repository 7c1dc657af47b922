"""Measurements of a linear study: ratios of condition numbers and steps of a probe, for an extractor and two tasks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from torch import Tensor

from holdfast.experiments.linear.specs import StudySpec, StudyTable
from holdfast.models import SplitModel, feature_precision, features
from holdfast.results.tables import finite
from holdfast.spectral.condition_numbers import EPS, PUBLISHED_FLOOR
from holdfast.spectral.convergence import measured_tau, norm_ratios, predicted_tau
from holdfast.spectral.frontier import Frontier
from holdfast.spectral.least_squares import LeastSquares
from holdfast.spectral.rir import published_kappa, published_ratio, ratios_behind, relative_immunization_ratio
from holdfast.tasks import Task

Role = Literal["restricted", "benign"]

ROLES: Final[tuple[Role, ...]] = ("restricted", "benign")

XY = tuple[Tensor, Tensor]
"""Features and targets."""

MAIN: Final = ("ratio_restricted", "ratio_benign", "rir", "rir_bound", "immunized")
HELD_OUT: Final = ("held_out_ratio_restricted", "held_out_ratio_benign")
CONVERGENCE: Final = (
    "tau_restricted", "tau_restricted_measured", "tau_restricted_ratio", "tau_benign", "tau_benign_measured",
    "tau_benign_ratio",
)  # fmt: skip
PUBLISHED: Final = ("published_ratio_restricted", "published_ratio_benign", "published_rir")


@dataclass(frozen=True)
class Domain:
    """The samples of one task, and their least squares problems, solved once."""

    name: str
    train: XY
    test: XY | None
    task: Task | None = None
    precision: float = EPS

    @cached_property
    def problem(self) -> LeastSquares:
        """Least squares of a probe on the training samples."""
        return LeastSquares.of(*self.train, precision=self.precision)

    @cached_property
    def held_out(self) -> LeastSquares:
        """Least squares of a probe on the test samples."""
        assert self.test is not None
        return LeastSquares.of(*self.test)

    @cached_property
    def published(self) -> float:
        """Condition number of the features as the released code computes it; extractors are compared with it."""
        return published_kappa(self.train[0])


Pairs = list[tuple[str, Domain, Domain]]
"""Name, benign and restricted task of each pair."""


def pairs_of(table: StudyTable, tasks: Sequence[Task], model: SplitModel | None) -> Pairs:
    """Returns the pairs of a table: one pair of tasks, or every ordered pair of classes."""
    if table.class_pairs is None:
        benign, restricted = (domain_of(task, model, table.held_out) for task in tasks)
        return [(f"{benign.name} -> {restricted.name}", benign, restricted)]
    spec, (task,) = table.class_pairs, tasks
    x, y = features(model, task, "train")
    x, precision = (x - spec.mean) / spec.std, feature_precision(model, task)
    domains = [
        Domain(str(c), (x[own], y[own, c : c + 1]), None, None, precision)
        for c in range(y.shape[1])
        if (own := y[:, c] > 0).any()
    ]
    return [(f"{a.name} -> {b.name}", a, b) for a, b in itertools.permutations(domains, 2)]


def domain_of(task: Task, model: SplitModel | None, held_out: bool) -> Domain:
    """Returns the samples of a task as the probes see them."""
    test = features(model, task, "test") if held_out else None
    return Domain(task.name, features(model, task, "train"), test, task, feature_precision(model, task))


def measured_entry(spec: StudySpec, held_out: bool, curves: int, entry: Any) -> dict[str, Any]:
    """Reads the measurements of an extractor from their entry in the journal; refuses what `measure` cannot return."""
    names = {*MAIN, *PUBLISHED, *CONVERGENCE, *(HELD_OUT if held_out else ())}
    series = {f"{variant}norm_ratios_{role}" for variant in ("", "published_") for role in ROLES} if curves else set()
    values = dict(entry)
    if values.keys() != names | series:
        raise ValueError(f"it lacks or adds {sorted(values.keys() ^ (names | series))}")
    for name in names:
        check_numbers(name, [values[name]])
    for name in series:
        if not isinstance(values[name], list) or len(values[name]) != curves + 1:
            raise ValueError(f"{name} is not a list of {curves + 1} numbers")
        check_numbers(name, values[name])
    return values


def check_numbers(name: str, values: Sequence[Any]) -> None:
    """Raises a ValueError if a value is neither a number nor None."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{name} is {value!r}, not a number")


def measure(
    frontier: Frontier,
    theta: Tensor,
    raw: tuple[Tensor, Tensor],
    spec: StudySpec,
    *,
    before: tuple[float, float] | None = None,
    curves: int = 0,
    held_out: tuple[LeastSquares, LeastSquares] | None = None,
) -> dict[str, Any]:
    """Measures one extractor on one pair of tasks.

    Args:
        frontier: the tasks, in the frontier's coordinates.
        theta: the extractor, in the same coordinates.
        raw: benign and restricted features before the change of coordinates, as the released code uses them.
        spec: q and step limits.
        before: published condition numbers of `raw`, if they are known; None: they are computed here.
        curves: steps of the norm-ratio curves; 0: no curves.
        held_out: benign and restricted task on other samples, before the change of coordinates.

    Returns:
        Numbers by the name of their cell, None if infinite or undefined; and curves by task.
    """
    original = {"benign": frontier.benign, "restricted": frontier.restricted}
    behind = {role: task.through(theta) for role, task in original.items()}
    for task in behind.values():
        _ = task.svd  # computed once, for the ratios and for the steps
    ratios = ratios_behind(**behind, benign_before=frontier.benign, restricted_before=frontier.restricted)
    published = published_ratio(frontier.full(theta), *raw, before)
    values: dict[str, Any] = {
        "ratio_restricted": ratios.restricted,
        "ratio_benign": ratios.benign,
        "rir": ratios.rir,
        "rir_bound": frontier.bound,
        "immunized": float(ratios.immunized),
        "published_ratio_restricted": published.restricted,
        "published_ratio_benign": published.benign,
        "published_rir": published.rir,
    }
    for role, task in behind.items():
        tau = predicted_tau(task, spec.tau_q)
        values[f"tau_{role}"] = tau
        values[f"tau_{role}_ratio"] = tau / predicted_tau(original[role], spec.tau_q)
        measured = measured_tau(task, spec.tau_q, max_steps=spec.tau_steps) if tau <= spec.tau_steps else None
        values[f"tau_{role}_measured"] = measured
        if curves:
            values[f"norm_ratios_{role}"] = norm_ratios(task, curves)
            values[f"published_norm_ratios_{role}"] = norm_ratios(task, curves, floor=PUBLISHED_FLOOR)
    if held_out is not None:
        other = relative_immunization_ratio(theta, *(task.through(frontier.basis) for task in held_out))
        values |= {"held_out_ratio_restricted": other.restricted, "held_out_ratio_benign": other.benign}
    return {
        key: [finite(v) for v in value] if isinstance(value, list) else finite(value) for key, value in values.items()
    }
