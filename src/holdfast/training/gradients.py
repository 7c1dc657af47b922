"""What an optimizer receives instead of the gradient: see `Strategy.gradient`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn

from holdfast.training.strategy import Gradient

LEAST_SIZE: Final = 0.01
"""Root mean square that a vector (a bias, a scale) counts with at least, as many are 0 at first."""

QUINTIC: Final = (3.4445, -4.7750, 2.0315)
ITERATIONS: Final = 5
"""Of the iteration X <- a X + b (XX')X + c (XX')^2 X of Muon (Jordan et al., 2024): five of them bring every singular
value above 1e-3 into about [0.7, 1.2], with matrix products alone."""


def reshape_gradient(parameters: Iterable[nn.Parameter], gradient: Gradient) -> None:
    """Changes gradients in place as `Strategy.gradient` says.

    Example:
        >>> p = nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3e-30, 4e-30])
        >>> reshape_gradient([p], "normalised")
        >>> p.grad
        tensor([0.6000, 0.8000])
        >>> w = nn.Parameter(2 * torch.eye(2))
        >>> w.grad = torch.tensor([[3e-30, 0.0], [0.0, 4e-20]])
        >>> reshape_gradient([w], "layerwise")
        >>> round(float(w.grad.norm() / w.detach().norm()), 4)
        1.0
    """
    moved = [(p, p.grad) for p in parameters if p.grad is not None]
    if not moved or gradient == "raw":
        return
    grads = [g for _, g in moved]
    for g in grads:
        torch.nan_to_num_(g)
    if gradient == "sign":
        torch._foreach_sign_(grads)
    elif gradient == "normalised":
        _normalise(grads)
    else:
        for parameter, g in moved:
            if gradient == "orthogonal" and g.dim() > 1:
                g.copy_(orthogonalised(g.flatten(1)).view(g.shape))
            _scale(g, _size(parameter.detach()))


def _normalise(grads: list[Tensor]) -> None:
    largest = max(float(g.abs().max()) for g in grads)
    if not largest > 0:
        return
    for g in grads:
        g.div_(largest)  # first, as a defense may leave gradients so tiny that all their squares are 0
    length = math.hypot(*(float(g.norm()) for g in grads))
    for g in grads:
        g.div_(length)


def _scale(g: Tensor, length: float) -> None:
    """Gives a gradient a length, unless it is 0."""
    largest = float(g.abs().max()) if g.numel() else 0.0
    if largest > 0:
        g.div_(largest)  # likewise
        g.mul_(length / float(g.norm()))


def _size(parameter: Tensor) -> float:
    """The length that a tensor's gradient gets: the tensor's own; see `LEAST_SIZE`."""
    largest = float(parameter.abs().max()) if parameter.numel() else 0.0
    length = largest * float((parameter / largest).norm()) if largest > 0 else 0.0
    least = LEAST_SIZE * math.sqrt(parameter.numel())
    return max(length, least) if parameter.dim() < 2 or not length > 0 else length


def orthogonalised(matrix: Tensor) -> Tensor:
    """Returns about U V' of a matrix U S V': all singular values that were not tiny become about 1.

    Args:
        matrix: shape (M, N), floating point.

    Returns:
        A matrix of the same shape and dtype; zeros for a matrix of zeros.

    Example:
        >>> made = orthogonalised(torch.diag(torch.tensor([1.0, 0.1, 0.01])))
        >>> bool((torch.linalg.svdvals(made) - 0.95).abs().max() < 0.3)
        True
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x: Tensor = matrix if wide else matrix.T
    largest = x.abs().max()
    if not bool(largest > 0):
        return torch.zeros_like(matrix)
    x = x / largest
    x = x / x.norm()
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T
