"""What a linear study measures of an extractor on a pair of tasks: ratios of condition numbers, steps of a probe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from torch import Tensor

from holdfast.experiments.linear.specs import StudySpec, StudyTable
from holdfast.models import SplitModel, feature_precision, features
from holdfast.spectral.condition_numbers import EPS, PUBLISHED_FLOOR
from holdfast.spectral.convergence import measured_tau, norm_ratios, predicted_tau
from holdfast.spectral.frontier import Frontier
from holdfast.spectral.least_squares import LeastSquares
from holdfast.spectral.rir import published_kappa, published_ratio, ratios_behind, relative_immunization_ratio
from holdfast.tasks import Task

Role = Literal["restricted", "benign"]


ROLES: Final[tuple[Role, ...]] = ("restricted", "benign")


Values = dict[str, float | None]


XY = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Domain:
    """The samples of one task, and their least squares, computed once."""

    name: str
    train: XY
    test: XY | None
    task: Task | None = None
    precision: float = EPS

    @cached_property
    def problem(self) -> LeastSquares:
        """The least squares of a probe on the training samples."""
        return LeastSquares.of(*self.train, precision=self.precision)

    @cached_property
    def held_out(self) -> LeastSquares:
        """The least squares of a probe on the test samples."""
        assert self.test is not None
        return LeastSquares.of(*self.test)

    @cached_property
    def published(self) -> float:
        """The published condition number, which every extractor behind these features is compared with."""
        return published_kappa(self.train[0])


Pairs = list[tuple[str, Domain, Domain]]


MAIN: Final = ("ratio_restricted", "ratio_benign", "rir", "rir_bound", "immunized")


HELD_OUT: Final = ("held_out_ratio_restricted", "held_out_ratio_benign")


CONVERGENCE: Final = (
    "tau_restricted",
    "tau_restricted_measured",
    "tau_restricted_ratio",
    "tau_benign",
    "tau_benign_measured",
    "tau_benign_ratio",
)


PUBLISHED: Final = ("published_ratio_restricted", "published_ratio_benign", "published_rir")


def pairs_of(table: StudyTable, tasks: Sequence[Task], model: SplitModel | None) -> Pairs:
    """Returns the pairs of a table, with their names: one pair of tasks, or every ordered pair of classes."""
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
    """Makes the measurements of an extractor of their entry in the journal; refuses any that are not as `measure`'s."""
    names = {*MAIN, *PUBLISHED, *CONVERGENCE, *(HELD_OUT if held_out else ())}
    series = {f"{variant}norm_ratios_{role}" for variant in ("", "published_") for role in ROLES} if curves else set()
    found = dict(entry)
    if found.keys() != names | series:
        raise ValueError(f"it lacks or adds {sorted(found.keys() ^ (names | series))}")
    for name in names:
        if found[name] is not None:
            refuse_no_number(name, found[name])
    for name in series:
        if not isinstance(found[name], list) or len(found[name]) != curves + 1:
            raise ValueError(f"{name} is not a list of {curves + 1} numbers")
        for value in found[name]:
            if value is not None:
                refuse_no_number(name, value)
    return found


def refuse_no_number(name: str, value: Any) -> None:
    """Raises a ValueError for anything but a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, and not a number")


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
        frontier: the tasks, in coordinates.
        theta: the extractor, in coordinates.
        raw: benign and restricted features before the change of coordinates, as the released code takes them.
        spec: q and step limits.
        before: published condition numbers of `raw`, where they are at hand; None: they are taken here.
        curves: steps of the norm-ratio curves; 0: none.
        held_out: benign and restricted task on other samples, before the change of coordinates.

    Returns:
        Numbers by the name of their cell, None where infinite or undefined, and curves by task.
    """
    original = {"benign": frontier.benign, "restricted": frontier.restricted}
    behind = {role: task.through(theta) for role, task in original.items()}
    for task in behind.values():
        _ = task.svd  # decomposed once, for the ratios and for the steps
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
        there = relative_immunization_ratio(theta, *(task.through(frontier.basis) for task in held_out))
        values |= {"held_out_ratio_restricted": there.restricted, "held_out_ratio_benign": there.benign}
    return {
        key: [finite(v) for v in value] if isinstance(value, list) else finite(value) for key, value in values.items()
    }


def finite(value: float | None) -> float | None:
    """Returns a number as JSON holds it: None where it is infinite or undefined."""
    return None if value is None or not math.isfinite(value) else float(value)
