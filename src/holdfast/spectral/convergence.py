"""How fast a linear probe learns: predicted from the spectrum, and measured by running it.

Gradient descent from w = 0 with step eta on 1/2 ||X w - Y||_F^2 leaves, of the loss that any probe can remove,
sum_i (1 - eta lambda_i)^(2t) ||u_i'Y||^2, where lambda_i and u_i are the squared singular values and left singular
vectors of X. So the condition number bounds the slowest direction, but label energy in slow directions slows a probe.
tau_q is the first t at which a share q of the removable loss is gone, with eta = 1 / lambda_max.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.spectral.least_squares import LeastSquares

LIMIT = 10**15
"""Number of steps above which tau_q is infinite."""


def predicted_tau(problem: LeastSquares, q: float = 0.9) -> float:
    """Returns tau_q of constant-step gradient descent, computed from the spectrum.

    Args:
        problem: features and targets.
        q: share of the removable loss, in (0, 1).

    Returns:
        A whole number of steps; infinite above 1e15; NaN if the features do not explain the targets at all.

    Raises:
        HoldfastError: if q is out of range.

    Example:
        >>> x = torch.diag(torch.tensor([1.0, 0.1]))
        >>> predicted_tau(LeastSquares.of(x, torch.tensor([0.0, 1.0])), 0.9)  # (1 - 0.01)^(2t) <= 0.1
        115.0
    """
    _check_share(q)
    u, sigma, _ = problem.svd
    energy = (u.T @ problem.target).square().sum(1)
    total = energy.sum().item()
    if not total > 0:
        return math.nan
    rate = torch.log1p(-(sigma / sigma[0]).square().clamp(max=1.0))  # -inf in the fastest direction

    def left(t: int) -> float:
        return float((energy * torch.exp(2 * t * rate)).sum()) if t else total

    goal = (1 - q) * total
    low, high = 0, 1
    while left(high) > goal:
        low, high = high, 2 * high
        if high > LIMIT:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= goal else (middle, high)
    return float(high)


def descend(problem: LeastSquares, *, line_search: bool = False, start: Tensor | None = None) -> Iterator[Tensor]:
    """Runs gradient descent on a probe, endlessly: yields w_0, w_1, ...

    Args:
        problem: features and targets.
        line_search: choose each step to minimise the loss exactly (as the paper's Figure 1), else 1 / lambda_max.
        start: w_0, shape (D, C); zero by default.

    Example:
        >>> problem = LeastSquares.of(torch.eye(2), torch.tensor([1.0, 2.0]))
        >>> steps = descend(problem)
        >>> next(steps).flatten().tolist(), next(steps).flatten().tolist()
        ([0.0, 0.0], [1.0, 2.0])
    """
    root, target = problem.root, problem.target
    w = root.new_zeros(root.shape[1], target.shape[1]) if start is None else start
    # If all features are zero, w stays where it is.
    constant = 1 / problem.spectrum.values[0].square() if problem.spectrum.rank else 0.0
    while True:
        yield w
        gradient = root.T @ (root @ w - target)
        curvature = (root @ gradient).square().sum()
        step = gradient.square().sum() / curvature if line_search and curvature > 0 else constant
        w = w - step * gradient


def measured_tau(problem: LeastSquares, q: float = 0.9, *, max_steps: int = 1000) -> float | None:
    """Runs constant-step gradient descent and returns the first step at which a share q of the removable loss is gone.

    Returns:
        Number of steps; None if it is above `max_steps`.

    Raises:
        HoldfastError: if q is out of range.

    Example:
        >>> x = torch.diag(torch.tensor([1.0, 0.1]))
        >>> measured_tau(LeastSquares.of(x, torch.tensor([0.0, 1.0])), 0.9)
        115
    """
    _check_share(q)
    u, _, _ = problem.svd
    inside = u @ (u.T @ problem.target)
    goal = (1 - q) * inside.square().sum()
    for t, w in enumerate(descend(problem)):
        if (problem.root @ w - inside).square().sum() <= goal:
            return t
        if t >= max_steps:
            return None
    raise AssertionError("descend is endless")


def norm_ratios(problem: LeastSquares, steps: int, *, floor: float = 0.0) -> list[float]:
    """Returns the norm ratio ||w_t - w*||^2 / ||w_0 - w*||^2, Eq. 16, for t = 0..steps under exact line search.

    Args:
        problem: features and targets.
        steps: number of steps from w_0 = 0.
        floor: added to the Hessian's diagonal; 1e-6 in the paper's released code, only to explain its figures.

    Returns:
        steps + 1 numbers, the first 1; w* is the solution of least norm. NaN if w* is 0.

    Example:
        >>> problem = LeastSquares.of(torch.diag(torch.tensor([1.0, 0.5])), torch.tensor([1.0, 1.0]))
        >>> [round(r, 3) for r in norm_ratios(problem, 3)]
        [1.0, 0.405, 0.07, 0.028]
    """
    if floor:
        problem = problem.with_ridge(floor / problem.samples)
    u, sigma, v = problem.svd
    solution = v @ ((u.T @ problem.target) / sigma[:, None])
    initial = solution.square().sum()
    path = descend(problem, line_search=True)
    return [float((next(path) - solution).square().sum() / initial) for _ in range(steps + 1)]


def _check_share(q: float) -> None:
    if not 0 < q < 1:
        raise HoldfastError(f"q is {q}; expected a share between 0 and 1.")
