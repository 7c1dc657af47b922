"""Linear probes: a linear head is trained on the prepared features of a frozen body, with one of several solvers.

Condition-number defenses are designed against one of them, plain gradient descent on raw features. The others are
obvious next attempts: standardising or whitening the features, Adam, L-BFGS, Newton's method, or the closed form.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from holdfast.adversaries.base import KINDS, Adversary
from holdfast.adversaries.newton import descend_by_newton
from holdfast.errors import HoldfastError, unknown
from holdfast.models import SplitModel
from holdfast.spectral.convergence import descend
from holdfast.spectral.least_squares import LeastSquares
from holdfast.tasks import Batch, Task

Solver = Literal["gd", "line-search", "adam", "lbfgs", "ridge", "newton"]
Preparation = Literal["raw", "standardised", "whitened"]
SOLVERS: tuple[Solver, ...] = ("line-search", "gd", "adam", "lbfgs", "ridge", "newton")
PREPARATIONS: tuple[Preparation, ...] = ("raw", "standardised", "whitened")

RIDGES = (0.0, *(10.0**e for e in range(-24, 1, 2)))
"""Ridge strengths to try, relative to the mean eigenvalue; 0: the pseudo-inverse."""
HELD_OUT = 0.2


@KINDS.register("probe")
@dataclass(frozen=True)
class Probe(Adversary):
    """A linear probe, trained on all samples at every step.

    "line-search", "gd" and "ridge" fit one-hot classes (or the values) by least squares; "adam", "lbfgs" and "newton"
    minimise the task's own loss. The first three have no bias on raw features, as in the condition-number theory; on
    standardised and whitened features, which are centred, they have one.

    Attributes:
        solver: "line-search": gradient descent with exact line search. "gd": gradient descent with the constant step
            1 / lambda_max. "adam" with `learning_rate`. "lbfgs". "ridge": closed form at the first step; its strength
            is chosen on a fifth of the samples. "newton": damped Newton steps with line search, on white features
            whatever the preparation is, as the steps do not depend on it.
        preparation: transformation of the features, estimated on the adversary's own samples.
        learning_rate: for Adam; other solvers ignore it.
        name: by default made from the settings.

    Raises:
        HoldfastError: for an unknown solver or preparation, or a learning rate out of range.

    Example:
        >>> Probe("adam", "whitened", 0.1).name
        'probe adam 0.1 whitened'
    """

    solver: Solver = "line-search"
    preparation: Preparation = "raw"
    learning_rate: float = 1e-2
    name: str = field(default="")

    frozen_body: ClassVar[bool] = True
    batch_size: ClassVar[int] = sys.maxsize  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise unknown("solver", self.solver, SOLVERS)
        if self.preparation not in PREPARATIONS:
            raise unknown("preparation", self.preparation, PREPARATIONS)
        if not self.learning_rate > 0:
            raise HoldfastError(f"learning_rate is {self.learning_rate}; expected a number above 0.")
        rate = f" {self.learning_rate:g}" if self.solver == "adam" else ""
        object.__setattr__(self, "name", self.name or f"probe {self.solver}{rate} {self.preparation}")

    def not_applicable(self, model: SplitModel, task: Task) -> str | None:
        """See `Adversary.not_applicable`."""
        return task.no_features

    def config(self) -> dict[str, Any]:
        """See `Adversary.config`."""
        settings = {k: v for k, v in asdict(self).items() if k != "name"}
        if self.solver != "adam":
            del settings["learning_rate"]
        return {"kind": "probe", **settings}

    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        """See `Adversary.run`; `model` is a head, and the inputs of `task` are features."""
        batch = next(task.sweep("train", task.size("train"), device=device))
        mean, scale = prepare(batch.x, self.preparation)
        ready = Batch((batch.x - mean) @ scale, batch.y)
        yield torch.zeros((), device=device)
        solve = {"adam": _by_loss, "lbfgs": _by_loss, "newton": _by_newton}.get(self.solver, _by_least_squares)
        for weight, bias, loss in solve(self, task, ready, generator):
            with torch.no_grad():
                model.head.weight.copy_((scale @ weight).T)
                assert model.head.bias is not None
                model.head.bias.copy_(bias - mean @ scale @ weight)
            yield loss


def prepare(x: Tensor, preparation: Preparation) -> tuple[Tensor, Tensor]:
    """Returns the mean m (D,) and the map A (D, D') of the prepared features (x - m) A.

    The covariance of whitened features is the identity, over the non-zero spectrum.

    Example:
        >>> mean, scale = prepare(torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=torch.float64), "standardised")
        >>> mean.tolist(), scale.diag().tolist()
        ([1.0, 1.0], [1.0, 1.0])
    """
    width = x.shape[1]
    if preparation == "raw":
        return x.new_zeros(width), torch.eye(width).to(x)
    mean = x.mean(0)
    if preparation == "standardised":
        deviation = (x - mean).square().mean(0).sqrt()
        constant = deviation <= 1e-12 * deviation.max()
        return mean, torch.diag(torch.where(constant, 1.0, 1 / deviation.clamp_min(1e-300)))
    _, sigma, v = LeastSquares.of(x - mean).svd
    return mean, v * (len(x) ** 0.5 / sigma)


def _by_least_squares(
    probe: Probe, task: Task, ready: Batch, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields weights, bias and loss after each step of the least-squares solvers."""
    targets = task.targets(ready.y)
    offset = targets.mean(0) if probe.preparation != "raw" else torch.zeros_like(targets[0])
    problem = LeastSquares.of(ready.x, targets - offset)
    if probe.solver == "ridge":
        w = _ridge(ready.x, targets - offset, generator)
        while True:
            yield w, offset, _mean_loss(problem, w)
    steps = descend(problem, line_search=probe.solver == "line-search")
    next(steps)  # the start, zero
    for w in steps:
        yield w, offset, _mean_loss(problem, w)


def _mean_loss(problem: LeastSquares, w: Tensor) -> Tensor:
    return ((problem.root @ w - problem.target).square().sum() + problem.rest) / (2 * problem.samples)


def _ridge(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the closed-form weights, with the ridge strength that is best on held-out samples."""
    order = torch.randperm(len(x), generator=generator).to(x.device)
    held, kept = order[: int(HELD_OUT * len(x))], order[int(HELD_OUT * len(x)) :]
    strength = RIDGES[0]
    if len(held):
        fits = _ridge_path(x[kept], y[kept])
        losses = [float((x[held] @ w - y[held]).square().sum()) for w in fits]
        strength = RIDGES[losses.index(min(losses))]
    return _ridge_path(x, y, (strength,))[0]


def _ridge_path(x: Tensor, y: Tensor, strengths: tuple[float, ...] = RIDGES) -> list[Tensor]:
    problem = LeastSquares.of(x, y)
    u, sigma, v = problem.svd
    inside = u.T @ problem.target
    mean = sigma.square().sum() / x.shape[1]
    return [v @ (inside * (sigma / (sigma.square() + s * mean))[:, None]) for s in strengths]


def _by_loss(
    probe: Probe, task: Task, ready: Batch, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields weights, bias and loss after each step of the solvers that minimise the task's own loss."""
    head = nn.Linear(ready.x.shape[1], task.num_outputs).to(ready.x)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer: torch.optim.Optimizer
    if probe.solver == "adam":
        optimizer = torch.optim.Adam(head.parameters(), lr=probe.learning_rate)
    else:
        # By default one iteration evaluates the loss only once, and small gradients end it: the attack would stop just
        # where features are badly conditioned.
        optimizer = torch.optim.LBFGS(
            head.parameters(), max_iter=1, max_eval=50, tolerance_grad=0, tolerance_change=0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(head, ready)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    while True:
        loss = optimizer.step(closure)  # type: ignore[no-untyped-call]
        assert isinstance(loss, Tensor)
        yield head.weight.detach().T, head.bias.detach(), loss.detach()


def _by_newton(
    probe: Probe, task: Task, ready: Batch, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields weights, bias and loss after each step of Newton's method; see `holdfast.adversaries.newton`."""
    mean, scale = prepare(ready.x, "whitened")
    white = (ready.x - mean) @ scale
    inputs = torch.cat([white, white.new_ones(len(white), 1)], 1)  # the last row of the weights is the bias
    start = inputs.new_zeros(inputs.shape[1], task.num_outputs)
    for point, loss in descend_by_newton(lambda w: task.loss_of(inputs @ w, ready), start):
        weight = scale @ point[:-1]
        yield weight, point[-1] - mean @ weight, loss
