"""A linear layer whose gradient is multiplied by an inverse Gram matrix, the preconditioned layer of ICML 2025."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from holdfast.errors import HoldfastError
from holdfast.spectral.condition_numbers import check_finite


class Preconditioner:
    """(K + ridge I)^-1 for the Gram matrix K = X'X of a task's inputs, factorised once.

    With fewer samples than features only XX' + ridge I is factorised, by the Woodbury identity
    (X'X + r I)^-1 = (I - X' (XX' + r I)^-1 X) / r. Otherwise the factor is the Cholesky factor of K + r I, taken from
    a QR decomposition of X over sqrt(r) I, which does not square the condition number.

    Args:
        x: inputs, shape (N, D), float64 recommended.
        ridge: r, at least 0; 1 for the benign task in the released code.

    Raises:
        HoldfastError: if the ridge is negative, a value is not finite, or K is singular and there is no ridge.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> Preconditioner(x, ridge=1.0).solve(torch.eye(2, dtype=torch.float64)).diag().round(decimals=9).tolist()
        [0.5, 0.2]
    """

    def __init__(self, x: Tensor, ridge: float = 1.0) -> None:
        if not 0 <= ridge < math.inf:
            raise HoldfastError(f"The preconditioner's ridge is {ridge}; expected a number of at least 0.")
        check_finite(x, "The preconditioner's inputs")
        self.x, self.ridge, self.wide = x, ridge, ridge > 0 and x.shape[0] < x.shape[1]
        if self.wide:
            square = x @ x.T
            square.diagonal().add_(ridge)
            self.factor = torch.linalg.cholesky(square)
            return
        rows = torch.cat([x, math.sqrt(ridge) * torch.eye(x.shape[1]).to(x)]) if ridge else x
        q, self.factor = torch.linalg.qr(rows)
        self.basis = q[: len(x)]
        pivots = self.factor.diagonal().abs()
        if len(pivots) < x.shape[1] or pivots.min() <= max(x.shape) * torch.finfo(x.dtype).eps * pivots.max():
            raise HoldfastError(
                f"K = X'X of {x.shape[0]} samples with {x.shape[1]} features is singular, so K^-1 does not exist. Give "
                "a ridge above 0, or use the common subspace."
            )

    def solve(self, g: Tensor) -> Tensor:
        """Returns (K + ridge I)^-1 G.

        Args:
            g: shape (D, M).
        """
        if self.wide:
            return (g - self.x.T @ torch.cholesky_solve(self.x @ g, self.factor)) / self.ridge
        solved: Tensor = torch.cholesky_solve(g, self.factor, upper=True)
        return solved

    def pull_back(self, upstream: Tensor) -> Tensor:
        """Returns (K + ridge I)^-1 X' G, a linear layer's preconditioned gradient, with a single product with X.

        Args:
            upstream: G, the gradient by the layer's output, shape (N, M).
        """
        if self.wide:  # (X'X + r I)^-1 X' = X' (XX' + r I)^-1
            return self.x.T @ torch.cholesky_solve(upstream, self.factor)
        pulled: Tensor = torch.linalg.solve_triangular(self.factor, self.basis.T @ upstream, upper=True)
        return pulled


class PreconditionedLinear(nn.Module):
    """The "dummy layer" of section 4.4 and appendix C.3: computes x theta, and multiplies theta's gradient by K^-1.

    So one backward pass through R(H(theta)) gives the update of Algorithm 1, line 6, with any optimizer.

    Args:
        theta: initial extractor, shape (D_in, D_out).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> layer = PreconditionedLinear(torch.eye(2, dtype=torch.float64))
        >>> layer(x, Preconditioner(x, ridge=0.0)).sum().backward()
        >>> layer.theta.grad.tolist()  # K^-1 X' 1
        [[1.0, 1.0], [0.5, 0.5]]
    """

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())

    def forward(self, x: Tensor, preconditioner: Preconditioner | None = None) -> Tensor:
        """Returns x theta, shape (N, D_out).

        Args:
            x: shape (N, D_in).
            preconditioner: made from this x; multiplies the gradient of theta, not of x. None: the ordinary gradient.

        Raises:
            HoldfastError: if the preconditioner was made from other inputs.
        """
        if preconditioner is not None and preconditioner.x is not x:
            raise HoldfastError("The preconditioner was made for other inputs; make it from the x that is passed.")
        return _Preconditioned.apply(x, self.theta, preconditioner)  # type: ignore[no-any-return]


class _Preconditioned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, preconditioner: Preconditioner | None) -> Tensor:
        ctx.save_for_backward(x, theta)
        ctx.preconditioner = preconditioner
        return x @ theta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, theta = ctx.saved_tensors
        of_x = upstream @ theta.T if ctx.needs_input_grad[0] else None
        of_theta = None
        if ctx.needs_input_grad[1]:
            pull_back = None if ctx.preconditioner is None else ctx.preconditioner.pull_back
            of_theta = x.T @ upstream if pull_back is None else pull_back(upstream)
        return of_x, of_theta, None
