"""Newton's method for a linear head: the second-order solver of `Probe`, exact for classes as for values.

The step solves (H + damping) d = g for the Hessian H of the task's own loss, by conjugate gradients on products with H,
in coordinates in which the features are white. Newton's steps do not depend on linear maps of the features, so a badly
conditioned body does not slow them; for values, whose loss is a square, H is that of Gauss and Newton, and one step is
the solution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import torch
from torch import Tensor

DAMPING: Final = 1e-6
"""Added to the Hessian, whose entries are at most about 1 for white features."""

ITERATIONS: Final = 100
"""Of conjugate gradients, at most."""

HALVINGS: Final = 40
SUFFICIENT: Final = 1e-4
"""Share of the decrease that the gradient promises with which the line search is content."""

Loss = Callable[[Tensor], Tensor]


def descend_by_newton(loss: Loss, start: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Minimises a convex function; yields the point and its value after each step, endlessly.

    Args:
        loss: differentiable twice; takes a tensor of the shape of `start`, returns a scalar.
        start: the first point; float64.

    Example:
        >>> steps = descend_by_newton(lambda w: (w - 3).square().sum(), torch.zeros(2, dtype=torch.float64))
        >>> [round(float(x), 3) for x in next(steps)[0]]
        [3.0, 3.0]
    """
    point = start
    while True:
        at = point.detach().requires_grad_(True)
        here = loss(at)
        (graph,) = torch.autograd.grad(here, at, create_graph=True)
        gradient, value = graph.detach(), float(here.detach())
        direction = _solve(partial(_product, at, graph), -gradient)
        slope = float((gradient * direction).sum())
        length = 1.0
        for _ in range(HALVINGS):
            ahead = float(loss(point + length * direction))
            if ahead <= value + SUFFICIENT * length * slope:
                point, value = point + length * direction, ahead
                break
            length /= 2
        yield point, start.new_tensor(value)


def _product(at: Tensor, gradient: Tensor, vector: Tensor) -> Tensor:
    """The Hessian at a point, times a vector, given the gradient there with its graph."""
    (image,) = torch.autograd.grad(gradient, at, vector, retain_graph=True)
    return image


def _solve(product: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Solves (H + damping) x = target by conjugate gradients, given products with H."""
    x, residual = torch.zeros_like(target), target
    direction, size = residual, residual.square().sum()
    least = 1e-20 * size
    for _ in range(ITERATIONS):
        if not bool(size > least):
            break
        image = product(direction) + DAMPING * direction
        step = size / (direction * image).sum()
        x, residual = x + step * direction, residual - step * image
        size, before = residual.square().sum(), size
        direction = residual + size / before * direction
    return x
