"""R_well and R_ill, which lower and raise a condition number, with closed-form gradients.

R_well is from Nenov et al. 2024 (Eq. 3 of *Model Immunization from a Condition Number Perspective*), R_ill from that
paper (Eq. 12). Both use the non-zero singular values sigma_1 >= ... >= sigma_k > 0 of S, with k = p = rank(S), so that
the theorems hold for matrices of any rank. As sums of differences neither loses digits:

    R_well(S) = 1/2 sigma_1^2 - 1/(2p) ||S||_F^2           = 1/(2p) sum_i (sigma_1^2 - sigma_i^2)
    R_ill(S)  = 1 / (1/(2k) ||S||_F^2 - 1/2 sigma_k^2)     = 1 / (1/(2k) sum_i (sigma_i^2 - sigma_k^2))

Gradients (Theorem A.1 (3), Eq. 13). d sigma_i = <u_i v_i', dS> where sigma_i is simple, hence

    grad R_well = sigma_1 u_1 v_1' - S / p
    grad R_ill  = (sigma_k u_k v_k' - S / k) / (1/(2k) ||S||_F^2 - 1/2 sigma_k^2)^2

For the Hessian S = Z'Z of a probe on features Z, dS = dZ' Z + Z' dZ and the gradient is symmetric, so that by the chain
rule grad_Z R(Z'Z) = 2 Z grad R(Z'Z). With Z = X theta this is Theorem 4.2: grad_theta = 2 K theta grad R(H(theta)).

If the extreme singular value is not simple, R is not differentiable. We use the mean over its singular subspace, which
is in the (sub)differential and does not depend on the basis that the decomposition returns. If all singular values are
equal (kappa = 1; also rank 1), R_ill is infinite and no direction is better than another: its gradient is 0. For S = 0,
R_well is 0, R_ill infinite, and both gradients are 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from holdfast.errors import HoldfastError

TIE = 1e-12
"""Singular values with a smaller relative difference count as equal."""


def r_well(s: Tensor) -> Tensor:
    """R_well, Eq. 3: an upper bound of log kappa if sigma_min is bounded away from 0; 0 exactly if kappa is 1.

    Args:
        s: shape (M, N), float64 recommended.

    Returns:
        A scalar, at least 0. It can be differentiated once.

    Example:
        >>> s = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)).requires_grad_()
        >>> value = r_well(s)
        >>> value.backward()
        >>> value.item(), s.grad.diag().tolist()  # 4/2 - 5/4; sigma_1 - sigma_1/2 and -sigma_2/2
        (0.75, [1.0, -0.5])
    """
    return _OfMatrix.apply(s, False)  # type: ignore[no-any-return]


def r_ill(s: Tensor) -> Tensor:
    """R_ill, Eq. 12: sigma_max^2 times it is an upper bound of 1 / log kappa; infinite exactly if kappa is 1.

    Args:
        s: shape (M, N), float64 recommended.

    Returns:
        A scalar above 0. It can be differentiated once.

    Example:
        >>> s = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)).requires_grad_()
        >>> value = r_ill(s)
        >>> value.backward()
        >>> round(value.item(), 4), [round(g, 4) for g in s.grad.diag().tolist()]  # 1 / 0.75; (-1, 1 - 1/2) / 0.75^2
        (1.3333, [-1.7778, 0.8889])
    """
    return _OfMatrix.apply(s, True)  # type: ignore[no-any-return]


def r_well_of_features(z: Tensor) -> Tensor:
    """R_well(Z'Z), the regularizer of the Hessian of a probe on features Z.

    With fewer samples than features only the N x N Gram matrix is decomposed.

    Args:
        z: shape (N, D), float64 recommended.

    Returns:
        A scalar; differentiating it costs two products with Z (Theorem 4.2).

    Example:
        >>> z = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
        >>> torch.allclose(r_well_of_features(z), r_well(z.T @ z))
        True
    """
    return _OfFeatures.apply(z, False)  # type: ignore[no-any-return]


def r_ill_of_features(z: Tensor) -> Tensor:
    """R_ill(Z'Z); see `r_well_of_features`.

    Example:
        >>> z = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
        >>> torch.allclose(r_ill_of_features(z), r_ill(z.T @ z))
        True
    """
    return _OfFeatures.apply(z, True)  # type: ignore[no-any-return]


def well_step_bound(sigma: Tensor) -> float:
    """Returns the largest step of Theorem 4.3 (1) under which kappa(H) falls: theta' = theta - step K^-1 grad R_well.

    K^-1 cancels the K of Theorem 4.2, so that theta' = theta (I - 2 step grad R_well(H)) and every eigenvalue of H is
    multiplied by itself: sigma_1 by (1 - a step)^2 with a = 2 sigma_1 (p-1)/p, the others by (1 + 2 step sigma_i/p)^2.
    The order is kept, and hence kappa falls, while sqrt(sigma_1) (1 - a step) >= sqrt(sigma_2) (1 + 2 step sigma_2/p).

    Args:
        sigma: the non-zero eigenvalues of H, descending; shape (p,).

    Returns:
        The bound; 0 where sigma_1 is not simple, infinite for p = 1.

    Example:
        >>> well_step_bound(torch.tensor([4.0, 1.0]))  # (2 - 1) / (4 * 2 + 1)
        0.111...
    """
    p = len(sigma)
    if p < 2:
        return math.inf
    first, second = sigma[0].item(), sigma[1].item()
    if first - second <= TIE * first:
        return 0.0
    a, b = 2 * first * (p - 1) / p, 2 * second / p
    return (math.sqrt(first) - math.sqrt(second)) / (a * math.sqrt(first) + b * math.sqrt(second))


def ill_step_bound(sigma: Tensor) -> float:
    """Returns the largest step of Theorem 4.3 (2) under which kappa(H) grows: theta' = theta - step K^-1 grad R_ill.

    As in `well_step_bound` every eigenvalue is multiplied by itself: sigma_k by (1 - 2 step sigma_k (k-1)/(k d^2))^2,
    the others by (1 + 2 step sigma_i/(k d^2))^2, with d the denominator of R_ill. sigma_k stays the smallest and falls
    while the first bracket is positive.

    Args:
        sigma: the non-zero eigenvalues of H, descending; shape (k,).

    Returns:
        The bound, exclusive; 0 where sigma_k is not simple.

    Example:
        >>> ill_step_bound(torch.tensor([2.0, 1.0]))  # 2 * 0.75^2 / (2 * 1 * 1)
        0.5625
    """
    k = len(sigma)
    if k < 2:
        return 0.0
    last, above = sigma[-1].item(), sigma[-2].item()
    if above - last <= TIE * above:
        return 0.0
    denominator = _denominator(sigma).item()
    return k * denominator**2 / (2 * (k - 1) * last)


def well_gradient(sigma: Tensor, vectors: Tensor) -> Tensor:
    """Returns grad R_well of a symmetric positive semi-definite matrix from its eigenpairs (Theorem A.1 (3)).

    Args:
        sigma: non-zero eigenvalues, descending; shape (p,).
        vectors: the eigenvectors, shape (D, p).

    Example:
        >>> well_gradient(torch.tensor([2.0, 1.0]), torch.eye(2)).diag().tolist()
        [1.0, -0.5]
    """
    return (vectors * _well_weights(sigma)) @ vectors.T


def ill_gradient(sigma: Tensor, vectors: Tensor) -> Tensor:
    """Returns grad R_ill of a symmetric positive semi-definite matrix (Eq. 13); arguments as for `well_gradient`."""
    return (vectors * _ill_weights(sigma)) @ vectors.T


def _denominator(sigma: Tensor) -> Tensor:
    """1/(2k) ||S||_F^2 - 1/2 sigma_k^2, without cancellation."""
    return ((sigma - sigma[-1]) * (sigma + sigma[-1])).sum() / (2 * len(sigma))


def _well_value(sigma: Tensor) -> Tensor:
    if not len(sigma):
        return sigma.new_zeros(())
    return ((sigma[0] - sigma) * (sigma[0] + sigma)).sum() / (2 * len(sigma))


def _ill_value(sigma: Tensor) -> Tensor:
    if not len(sigma) or sigma[0] <= sigma[-1] * (1 + TIE):  # kappa is 1 up to rounding, where the gradient is 0
        return sigma.new_full((), math.inf)
    return 1 / _denominator(sigma)


def _well_weights(sigma: Tensor) -> Tensor:
    """What multiplies u_i v_i' in grad R_well."""
    tied = sigma >= sigma[:1] * (1 - TIE)
    return torch.where(tied, sigma / tied.sum(), 0) - sigma / max(len(sigma), 1)


def _ill_weights(sigma: Tensor) -> Tensor:
    """What multiplies u_i v_i' in grad R_ill."""
    if not len(sigma) or sigma[0] <= sigma[-1] * (1 + TIE):
        return torch.zeros_like(sigma)
    tied = sigma <= sigma[-1] * (1 + TIE)
    return (torch.where(tied, sigma / tied.sum(), 0) - sigma / len(sigma)) / _denominator(sigma) ** 2


def _finite(values: Tensor) -> Tensor:
    values = values.detach()
    if values.dim() != 2 or 0 in values.shape:
        raise HoldfastError(f"A regularizer got shape {tuple(values.shape)}; expected a matrix, (M, N).")
    if not bool(values.isfinite().all()):
        raise HoldfastError("A regularizer got a matrix that is not finite; lower the step size.")
    return values


class _ClosedForm(torch.autograd.Function):
    """A function whose gradient is computed, and saved, in the forward pass."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None


class _OfMatrix(_ClosedForm):
    """R of a matrix; see the derivation at the top of this file."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, ill: bool) -> Tensor:
        u, sigma, vh = torch.linalg.svd(_finite(s), full_matrices=False)
        top = sigma[0] if len(sigma) else 0.0
        rank = int((sigma > max(s.shape) * torch.finfo(s.dtype).eps * top).sum())
        u, sigma, vh = u[:, :rank], sigma[:rank], vh[:rank]
        ctx.save_for_backward((u * (_ill_weights if ill else _well_weights)(sigma)) @ vh)
        return (_ill_value if ill else _well_value)(sigma)


class _OfFeatures(_ClosedForm):
    """R of Z'Z. Its gradient, 2 Z grad R(Z'Z), is 2 U diag(s w) V' for Z = U diag(s) V' and grad R = V diag(w) V'.

    For a wide Z only U is computed; as V' = diag(1/s) U'Z, the gradient is 2 U diag(w) U'Z.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, ill: bool) -> Tensor:
        z = _finite(z)
        wide = z.shape[0] < z.shape[1]
        sigma, vectors = torch.linalg.eigh(z @ z.T if wide else z.T @ z)
        sigma, vectors = sigma.flip(0), vectors.flip(1)
        rank = int((sigma > max(z.shape) * torch.finfo(z.dtype).eps * sigma[0].clamp_min(0)).sum())
        sigma, vectors = sigma[:rank], vectors[:, :rank]
        weighted = (vectors * (_ill_weights if ill else _well_weights)(sigma)) @ vectors.T
        ctx.save_for_backward(2 * (weighted @ z if wide else z @ weighted))
        return (_ill_value if ill else _well_value)(sigma)
