"""Defenses by a linear extractor theta: the problem in coordinates, the descent, and theta in a network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from holdfast.defenses.base import Defense, DefenseRecord
from holdfast.models import SplitModel, check_feature_width, check_fits, feature_precision, features
from holdfast.results import Event
from holdfast.runtime.run import Run
from holdfast.spectral.condition_numbers import EPS
from holdfast.spectral.frontier import SPACES, Frontier, SpaceName
from holdfast.spectral.least_squares import LeastSquares
from holdfast.spectral.rir import Ratios, relative_immunization_ratio
from holdfast.tasks import Task

LOGIT_TOLERANCE = 1e-5
"""Benign outputs may change by this share of the largest one before an event says so."""

MEASURE_EVERY = 10
"""Iterations between two measurements of the ratios."""


@dataclass(frozen=True)
class LinearProblem:
    """Two tasks as a linear extractor sees them, in coordinates of a subspace that both use.

    Attributes:
        frontier: both tasks, and the limits of what an extractor can do.
        benign: features and targets (x, y) before the change of coordinates, shapes (N, D) and (N, C).
        restricted: features and targets of the restricted task, likewise.
    """

    frontier: Frontier
    benign: tuple[Tensor, Tensor]
    restricted: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls,
        benign: tuple[Tensor, Tensor],
        restricted: tuple[Tensor, Tensor],
        *,
        space: SpaceName = "common",
        ridge: float = 0.01,
        precision: float = EPS,
    ) -> LinearProblem:
        """Prepares features and targets of two tasks; see `Frontier.of` and `LeastSquares`."""
        problems = [LeastSquares.of(*task, precision=precision) for task in (benign, restricted)]
        return cls(Frontier.of(*problems, space=space, ridge=ridge), benign, restricted)

    @cached_property
    def samples(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Benign and restricted samples in coordinates, for mini-batches: float64, shapes (N, s) and (N, C)."""
        benign, restricted = (
            (x.to(torch.float64) @ self.frontier.basis, y.to(torch.float64).reshape(len(y), -1))
            for x, y in (self.benign, self.restricted)
        )
        return benign, restricted

    @property
    def width(self) -> int:
        """s, the dimension of the subspace."""
        return self.frontier.basis.shape[1]

    def ratios(self, theta: Tensor) -> Ratios:
        """Returns Eq. 15 for an extractor in coordinates."""
        return relative_immunization_ratio(theta, self.frontier.benign, self.frontier.restricted)


@dataclass
class LinearDefense(Defense):
    """A defense that is a linear extractor theta.

    theta is inserted between a network's body and its head, and theta^-1 is folded into the head: benign outputs stay
    the same. theta is scaled so that the benign features keep their energy.

    Attributes:
        space: "common": rescale only directions that both tasks use; "ridge": rescale all of them, with `ridge` per
            sample added to both Gram matrices.
        ridge: see `space`.
    """

    space: SpaceName = "common"
    ridge: float = 0.01

    def __post_init__(self) -> None:
        self.refuse_unknown("space", SPACES)
        super().__post_init__()
        self.refuse_not_above_zero("ridge")

    @abstractmethod
    def extractor(self, problem: LinearProblem, *, run: Run) -> tuple[Tensor, DefenseRecord]:
        """Returns theta in coordinates, shape (s, s), invertible, and the record of how it was made."""

    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, *, run: Run
    ) -> tuple[SplitModel, DefenseRecord]:
        """Inserts the extractor into a copy of the model; see `Defense.immunize`.

        Raises:
            HoldfastError: if model and tasks do not fit, or the tasks' features share no direction.
        """
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
        check_feature_width(model, benign)
        immunized = model.clone().to(run.device).eval()
        x, y = features(immunized, benign, "train")
        problem = LinearProblem.of(
            (x, y),
            features(immunized, restricted, "train"),
            space=self.space,
            ridge=self.ridge,
            precision=feature_precision(immunized, benign),
        )
        theta, record = self.extractor(problem, run=run)
        extractor = problem.frontier.full(theta)
        extractor = extractor * (x.norm() / (x @ extractor).norm())
        inputs = next(iter(benign.sweep("train", 500, device=run.device))).x
        with torch.no_grad():
            before = immunized(inputs)
            immunized.insert_extractor(extractor)
            change = float((immunized(inputs) - before).abs().max() / before.abs().max())
        if change > LOGIT_TOLERANCE:
            message = (
                f"benign outputs change by {change:.1e} of the largest one: the extractor is worse conditioned than "
                f"{immunized.head.weight.dtype} can resolve; use a larger epsilon or a smaller stretch"
            )
            record.events.append(Event(iteration=0, message=message))
        record.history.setdefault("output_change", []).append(change)
        return immunized, record


@dataclass
class IterativeDefense(LinearDefense):
    """A linear defense that descends from an initial theta.

    Attributes:
        iterations: steps.
        optimizer: "adam" (the paper's, for linear models) or "gd".
        learning_rate: of theta.
        initialisation: "identity", or "random" (torch's default for a linear layer, as in the paper).
        keep: which of the measured iterates is the result: "definition", the one with the largest (i) among those with
            (ii) <= 1, as Definition 3.1 requires (the initial theta if no other qualifies); "rir", the one with the
            largest RIR, by which the paper stops early; "last".
    """

    iterations: int = 300
    optimizer: Literal["adam", "gd"] = "adam"
    learning_rate: float = 3e-3
    initialisation: Literal["identity", "random"] = "identity"
    keep: Literal["definition", "rir", "last"] = "definition"

    history_names: ClassVar[tuple[str, ...]] = ("iteration", "ratio_restricted", "ratio_benign", "rir")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unknown("optimizer", ("adam", "gd"))
        self.refuse_unknown("initialisation", ("identity", "random"))
        self.refuse_unknown("keep", ("definition", "rir", "last"))
        self.refuse_below_one("iterations")
        self.refuse_not_above_zero("learning_rate")

    @abstractmethod
    def start(self, problem: LinearProblem, theta: Tensor, generator: torch.Generator) -> _Descent:
        """Returns the descent from theta; it holds everything else that is trained."""

    def extractor(self, problem: LinearProblem, *, run: Run) -> tuple[Tensor, DefenseRecord]:
        """Descends, and returns one of the iterates; see `keep`."""
        generator = run.generator(self.name)
        theta = torch.eye(problem.width, dtype=torch.float64)
        if self.initialisation == "random":
            bound = 1 / math.sqrt(problem.width)  # torch.nn.Linear's default
            theta = (2 * torch.rand(theta.shape, generator=generator, dtype=torch.float64) - 1) * bound
        descent = self.start(problem, theta.to(problem.frontier.basis.device), generator)
        record = DefenseRecord(history={name: [] for name in self.history_names})
        best: tuple[tuple[float, float], Tensor] | None = None
        for iteration in range(self.iterations + 1):
            if iteration:
                descent.step()
            if not bool(descent.theta.isfinite().all()):
                record.events.append(Event(iteration=iteration, message="the extractor is not finite; stopped"))
                break
            if iteration % MEASURE_EVERY == 0 or iteration == self.iterations:
                ratios = problem.ratios(descent.theta)
                values = (iteration, ratios.restricted, ratios.benign, ratios.rir)
                for name, value in zip(self.history_names, values, strict=True):
                    record.history[name].append(value)
                rank = self._rank(iteration, ratios)
                if best is None or rank > best[0]:
                    best = rank, descent.theta.clone()
        assert best is not None
        ratios = problem.ratios(best[1])
        if self.keep == "definition" and not (ratios.restricted > 1 + 1e-9 and ratios.benign <= 1 and not ratios.lost):
            message = "no iterate had (i) above 1 and (ii) at most 1; this one does not meet Definition 3.1"
            record.events.append(Event(iteration=self.iterations, message=message))
        return best[1], record

    def _rank(self, iteration: int, ratios: Ratios) -> tuple[float, float]:
        if self.keep == "last":
            return iteration, 0.0
        if self.keep == "rir":
            return ratios.rir, 0.0
        return (1.0, ratios.restricted) if ratios.benign <= 1 and not ratios.lost else (0.0, ratios.rir)


class _Descent(ABC):
    """A descent of theta; a subclass defines the step."""

    theta: Tensor

    @abstractmethod
    def step(self) -> None:
        """Moves theta once."""


class GradientDescent(_Descent):
    """Moves theta and further parameters by an optimizer; a subclass computes the gradients.

    Args:
        defense: optimizer and learning rate.
        theta: the initial theta.
        others: further parameters.
    """

    def __init__(self, defense: IterativeDefense, theta: Tensor, *others: Tensor) -> None:
        self.theta = theta.clone()
        self.others = [t.clone() for t in others]
        optimizer = torch.optim.Adam if defense.optimizer == "adam" else torch.optim.SGD
        self._optimizer = optimizer([self.theta, *self.others], lr=defense.learning_rate)

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Returns the gradient of theta, then those of the others."""

    def step(self) -> None:
        """Moves everything once."""
        for parameter, gradient in zip([self.theta, *self.others], self.gradients(), strict=True):
            parameter.grad = gradient
        self._optimizer.step()
