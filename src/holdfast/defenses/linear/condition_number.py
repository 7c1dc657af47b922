"""Algorithm 1 of *Model Immunization from a Condition Number Perspective* (ICML 2025), and R_ill alone.

    theta' = theta - eta grad L(omega, theta) - eta lambda_P K_P^-1 grad R_well(H_P(theta))
                   - eta lambda_H K_H^-1 grad R_ill(H_H(theta))

K^-1 makes the step on theta one on the eigenvalues of H (Theorem 4.3). In full batch it cancels the K of Theorem 4.2
exactly: K^-1 grad_theta R(H) = 2 theta grad R(H), and no system is solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from holdfast.defenses.base import DefenseRecord
from holdfast.defenses.linear.base import GradientDescent, IterativeDefense, LinearProblem, _Descent
from holdfast.defenses.registry import register_defense
from holdfast.errors import HoldfastError
from holdfast.results import Event
from holdfast.runtime.run import Run
from holdfast.spectral.least_squares import LeastSquares
from holdfast.spectral.preconditioning import PreconditionedLinear, Preconditioner
from holdfast.spectral.regularizers import (
    ill_gradient,
    ill_step_bound,
    r_ill,
    r_ill_of_features,
    r_well_of_features,
    well_gradient,
    well_step_bound,
)

RESOLVED = 1e12
"""The largest condition number of a Hessian that guaranteed steps may reach: float64 cannot resolve more."""

CITATION = "Zheng, Bai, Bullins, Yeh, Model Immunization from a Condition Number Perspective, ICML 2025"


@register_defense
@dataclass
class ConditionNumber(IterativeDefense):
    """Algorithm 1: R_well on the benign task, R_ill on the restricted one, and the benign loss, together.

    The benign loss is the squared error of a linear classifier omega, which is trained together with theta (line 4).

    Attributes:
        lambda_well: lambda_P; None: balanced, so that at the start its term has the norm of the loss's gradient (C.2).
        lambda_ill: lambda_H; None: balanced likewise.
        well_multiple: multiplies the balanced lambda_P. The paper searches over multiples and prints none; ours are
            from House Prices and six MNIST pairs.
        ill_multiple: multiplies the balanced lambda_H.
        more_multiples: values of `well_multiple` to try in turn if no iterate has (i) above 1 and (ii) at most 1; each
            attempt is an event. Only with `keep="definition"` and fixed steps.
        step: "fixed": the joint update above with `optimizer` and `learning_rate`. "guaranteed": the two regularizers
            in turn, each with `guarantee` of its largest step of Theorem 4.3, so that each makes its own kappa
            monotone; it stops where an extreme eigenvalue is no longer simple, and has no loss term.
        guarantee: share of the largest step, in (0, 1).
        batch_size: samples a step, of both tasks; None: all (exact K^-1). The released code uses 64.
        batch_ridge: added to the K of a batch before it is inverted; the released code uses 1.
    """

    name: ClassVar[str] = "condition"
    citation: ClassVar[str] = CITATION

    lambda_well: float | None = None
    lambda_ill: float | None = None
    well_multiple: float = 1000.0
    ill_multiple: float = 1.0
    more_multiples: tuple[float, ...] = (10_000.0,)
    step: Literal["fixed", "guaranteed"] = "fixed"
    guarantee: float = 0.5
    batch_size: int | None = None
    batch_ridge: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unknown("step", ("fixed", "guaranteed"))
        self.refuse_negative("lambda_well", "lambda_ill", "well_multiple", "ill_multiple")
        self.require(lambda value: all(0 < m < math.inf for m in value), "numbers above 0", "more_multiples")
        self.refuse_no_share("guarantee")
        self.require(lambda value: value >= 2, "at least 2, or none for all", "batch_size")
        self.refuse_not_above_zero("batch_ridge")
        if self.step == "guaranteed" and self.batch_size is not None:
            raise HoldfastError(f"{self.name}: guaranteed steps use all samples; leave batch_size out.")

    def extractor(self, problem: LinearProblem, *, run: Run) -> tuple[Tensor, DefenseRecord]:
        """Descends; tries the next of `more_multiples` if the result is not an immunization."""
        theta, record = super().extractor(problem, run=run)
        if self.keep != "definition" or self.step == "guaranteed" or not self.more_multiples:
            return theta, record
        ratios = problem.ratios(theta)
        if ratios.immunized and ratios.benign <= 1:
            return theta, record
        multiple, *rest = self.more_multiples
        theta, retry = replace(self, well_multiple=multiple, more_multiples=tuple(rest)).extractor(problem, run=run)
        message = f"no immunization with well_multiple {self.well_multiple:g}; tried {multiple:g}"
        events = [*record.events, Event(iteration=self.iterations, message=message), *retry.events]
        return theta, replace(retry, events=events)

    def start(self, problem: LinearProblem, theta: Tensor, generator: torch.Generator) -> _Descent:
        """See `IterativeDefense.start`."""
        if self.step == "guaranteed":
            return _Guaranteed(self, problem, theta)
        return _Algorithm1(self, problem, theta, generator)


@register_defense
@dataclass
class RIllOnly(IterativeDefense):
    """The paper's first baseline: R_ill of the restricted task alone, by its plain gradient.

    Its gradient is scaled to norm 1 at the start, so that one learning rate serves all data.
    """

    name: ClassVar[str] = "r-ill"
    citation: ClassVar[str] = CITATION

    def start(self, problem: LinearProblem, theta: Tensor, generator: torch.Generator) -> _Descent:
        """See `IterativeDefense.start`."""
        return _RIll(self, problem, theta)


def eigenpairs(task: LeastSquares, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the non-zero eigenvalues of H = theta' K theta, descending, and its eigenvectors."""
    _, sigma, v = task.through(theta).svd
    return sigma.square(), v


class _Algorithm1(GradientDescent):
    """The joint update, in full batch or in mini-batches."""

    def __init__(
        self, defense: ConditionNumber, problem: LinearProblem, theta: Tensor, generator: torch.Generator
    ) -> None:
        shape = (problem.width, problem.frontier.benign.target.shape[1])
        omega = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(problem.width)
        super().__init__(defense, theta, omega.to(theta.device))
        self.defense, self.problem, self.generator = defense, problem, generator
        loss, _, well, ill = self._terms()
        self.well, self.ill = (
            given if given is not None else multiple * _balance(loss, term)
            for given, multiple, term in (
                (defense.lambda_well, defense.well_multiple, well),
                (defense.lambda_ill, defense.ill_multiple, ill),
            )
        )

    def gradients(self) -> list[Tensor]:
        loss, of_omega, well, ill = self._terms()
        return [loss + self.well * well + self.ill * ill, of_omega]

    def _terms(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients by theta and omega of the loss, and the preconditioned ones of R_well and R_ill by theta."""
        theta, (omega,) = self.theta, self.others
        size = self.defense.batch_size
        if size is None:
            benign, restricted = self.problem.frontier.benign, self.problem.frontier.restricted
            loss, of_omega = _loss_gradients(benign.root, benign.target, theta, omega, benign.samples)
            well = 2 * theta @ well_gradient(*eigenpairs(benign, theta))
            ill = 2 * theta @ ill_gradient(*eigenpairs(restricted, theta))
            return loss, of_omega, well, ill
        (x, y), (x_restricted, _) = (_draw(pair, size, self.generator) for pair in self.problem.samples)
        loss, of_omega = _loss_gradients(x, y, theta, omega, len(x))
        well, ill = self._batch(r_well_of_features, x), self._batch(r_ill_of_features, x_restricted)
        return loss, of_omega, well, ill

    def _batch(self, regularizer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        layer = PreconditionedLinear(self.theta)
        z = layer(x, Preconditioner(x, self.defense.batch_ridge))
        regularizer(z).backward()  # type: ignore[no-untyped-call]
        assert layer.theta.grad is not None
        return layer.theta.grad


class _Guaranteed(_Descent):
    """Steps of Theorem 4.3, R_well and R_ill in turn; each makes its own condition number monotone."""

    def __init__(self, defense: ConditionNumber, problem: LinearProblem, theta: Tensor) -> None:
        self.theta, self.share, self.problem = theta, defense.guarantee, problem

    def step(self) -> None:
        benign, restricted = self.problem.frontier.benign, self.problem.frontier.restricted
        sigma, v = eigenpairs(benign, self.theta)
        self._move(self.share * well_step_bound(sigma), well_gradient(sigma, v))
        sigma, v = eigenpairs(restricted, self.theta)
        self._move(min(self.share * ill_step_bound(sigma), _resolved_step(sigma)), ill_gradient(sigma, v))

    def _move(self, step: float, gradient: Tensor) -> None:
        if 0 < step < math.inf:
            moved = self.theta - 2 * step * self.theta @ gradient
            self.theta = moved * (math.sqrt(len(moved)) / moved.norm())  # kappa ignores the scale; floats do not


def _resolved_step(sigma: Tensor) -> float:
    """The step with which kappa(H_H) reaches `RESOLVED`: a guaranteed step alone may cube kappa at once.

    A step makes kappa' = kappa ((1 + a step) / (1 - b step))^2; see `ill_step_bound`.
    """
    k, first, last = len(sigma), sigma[0].item(), sigma[-1].item()
    growth = math.sqrt(RESOLVED * last / first)
    if k < 2 or growth <= 1 or first <= last:
        return 0.0
    denominator = 1 / r_ill(torch.diag(sigma)).item()
    a, b = 2 * first / (k * denominator**2), 2 * last * (k - 1) / (k * denominator**2)
    return (growth - 1) / (a + growth * b)


class _RIll(GradientDescent):
    def __init__(self, defense: RIllOnly, problem: LinearProblem, theta: Tensor) -> None:
        super().__init__(defense, theta)
        self.task = problem.frontier.restricted
        self.scale = 1 / max(self._gradient().norm().item(), 1e-300)

    def _gradient(self) -> Tensor:
        return 2 * self.task.gram @ self.theta @ ill_gradient(*eigenpairs(self.task, self.theta))

    def gradients(self) -> list[Tensor]:
        return [self.scale * self._gradient()]


def _loss_gradients(x: Tensor, y: Tensor, theta: Tensor, omega: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Gradients of 1/N ||X theta omega - Y||^2 by theta and omega; X and Y may be a root and its target."""
    z = x @ theta
    residual = (2 / samples) * (z @ omega - y)
    return x.T @ residual @ omega.T, z.T @ residual


def _balance(loss: Tensor, term: Tensor) -> float:
    """The factor that gives a term the norm of the loss's gradient, or norm 1 if that gradient is 0."""
    size = term.norm().item()
    return (loss.norm().item() or 1.0) / size if size > 0 else 0.0


def _draw(pair: tuple[Tensor, Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = pair
    index = torch.randperm(len(x), generator=generator)[:size].to(x.device)
    return x[index], y[index]
