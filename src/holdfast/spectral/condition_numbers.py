"""Singular values, numerical rank and condition numbers of matrices, such as the features of a linear probe.

A linear probe on features X (N, D) with targets Y (N, C) minimises 1/2 ||X w - Y||_F^2. Its Hessian is the Gram matrix
K = X'X (Eq. 9 of *Model Immunization from a Condition Number Perspective*, ICML 2025), and behind a linear extractor
theta it is theta' K theta. Forming K squares the condition number and loses half of the digits, so a *root* of K is
used where possible: a small matrix R with R'R = K, from a QR decomposition, which has the singular values of X. All
computations are in float64, for any input dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.errors import HoldfastError

EPS = torch.finfo(torch.float64).eps
PUBLISHED_FLOOR = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """The non-zero singular values of a matrix.

    Attributes:
        values: shape (rank,), float64, descending.
        tolerance: singular values up to this count as zero.
        size: number of all singular values of the matrix, zeros included.
    """

    values: Tensor
    tolerance: float
    size: int

    @property
    def rank(self) -> int:
        """Number of singular values above the tolerance."""
        return len(self.values)

    @property
    def condition(self) -> float:
        """kappa, Eq. 1: the largest over the smallest non-zero singular value; NaN for a matrix of rank 0."""
        return (self.values[0] / self.values[-1]).item() if self.rank else math.nan

    @property
    def hessian_condition(self) -> float:
        """Kappa of the probe's Hessian X'X, for the spectrum of features X: the square of `condition`."""
        return self.condition**2


def spectrum(x: Tensor, *, samples: int | None = None) -> Spectrum:
    """Returns the non-zero singular values of a matrix.

    The tolerance is max(N, D) eps sigma_max, with eps of float64: the size of rounding errors of an exact zero.

    Args:
        x: shape (N, D), floating point; only the smaller side is decomposed.
        samples: N in the tolerance, if x replaces a larger matrix with the same singular values.

    Raises:
        HoldfastError: if x is not a matrix or has values that are not finite.

    Example:
        >>> found = spectrum(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.5, 0.0]]))
        >>> found.rank, found.condition, found.hessian_condition
        (2, 2.0, 4.0)
    """
    x = _matrix(x, "The matrix")
    values = torch.linalg.svdvals(x)
    tolerance = max(samples or 0, *x.shape) * EPS * (values[0].item() if len(values) else 0.0)
    return Spectrum(values[values > tolerance], tolerance, len(values))


def condition_number(x: Tensor) -> float:
    """Returns kappa(x) over the non-zero spectrum, Eq. 1; see `spectrum` for the rank tolerance.

    Example:
        >>> condition_number(torch.diag(torch.tensor([4.0, 2.0, 0.0])))
        2.0
    """
    return spectrum(x).condition


def gram_spectrum(gram: Tensor, *, samples: int = 0) -> Spectrum:
    """Returns the non-zero singular values of X from its Gram matrix X'X.

    The Gram matrix has sigma^2 with an error of about max(N, D) eps sigma_max^2, so that singular values below
    sqrt(max(N, D) eps) sigma_max, about 1e-7, cannot be distinguished from zero: use the features if you have them.

    Args:
        gram: shape (D, D), symmetric, positive semi-definite.
        samples: N, for the tolerance.

    Raises:
        HoldfastError: if the matrix is not square, not symmetric, not finite, or has a clearly negative eigenvalue.

    Example:
        >>> gram_spectrum(torch.diag(torch.tensor([9.0, 4.0, 0.0]))).values.tolist()
        [3.0, 2.0]
    """
    gram = _symmetric(gram)
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0)
    top = eigenvalues[0].item() if len(eigenvalues) else 0.0
    tolerance = max(samples, len(gram)) * EPS * max(top, 0.0)
    if len(eigenvalues) and -eigenvalues[-1] > 100 * max(samples, len(gram)) * EPS * eigenvalues.abs().max():
        raise HoldfastError(
            f"The Gram matrix has eigenvalue {eigenvalues[-1]:.3g}: it is not positive semi-definite. Give X'X."
        )
    return Spectrum(eigenvalues[eigenvalues > tolerance].sqrt(), math.sqrt(tolerance), len(gram))


def published_condition_number(gram: Tensor, floor: float = PUBLISHED_FLOOR) -> float:
    """Returns the condition number as the paper's released code computes it; only to explain its printed numbers.

    It adds `floor` to every eigenvalue of the Hessian and keeps those above `floor`, so that rounding errors decide
    whether a null direction counts. Do not use it to judge a model.

    Args:
        gram: shape (D, D), the Hessian.
        floor: 1e-6 in the released code.

    Example:
        >>> published_condition_number(torch.diag(torch.tensor([1.0, 1e-3])))
        999.0...
    """
    eigenvalues = torch.linalg.eigvalsh(_symmetric(gram)) + floor
    kept = eigenvalues[eigenvalues > floor]
    return (kept.max() / kept.min()).item() if len(kept) else math.nan


@dataclass(frozen=True)
class Pair:
    """A singular value with its vectors: x v = value u."""

    value: Tensor
    left: Tensor
    right: Tensor


def extreme_pairs(x: Tensor) -> tuple[Pair, Pair, int]:
    """Returns the largest and the smallest non-zero singular pair of features, and the rank.

    The smaller Gram matrix is decomposed: with N < D the N x N one, which has the same non-zero spectrum, else the
    D x D one. A batch of 64 in 784 dimensions takes 0.5 ms instead of 80 ms for the full decomposition. Singular values
    below 1e-7 sigma_max are lost; see `gram_spectrum`.

    Args:
        x: shape (N, D), float64.

    Raises:
        HoldfastError: if a value is not finite, or every singular value is zero.

    Example:
        >>> top, bottom, rank = extreme_pairs(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64))
        >>> top.value.item(), bottom.value.item(), rank
        (3.0, 1.0, 2)
    """
    check_finite(x, "The features")
    wide = x.shape[0] < x.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    tolerance = max(x.shape) * EPS * max(eigenvalues[-1].item(), 0.0)
    rank = int((eigenvalues > tolerance).sum())
    if rank == 0:
        raise HoldfastError("All features are zero: there is no singular pair. Check the data and the extractor.")

    def pair(index: int) -> Pair:
        value, vector = eigenvalues[index].sqrt(), vectors[:, index]
        other = (x.T if wide else x) @ vector / value
        return Pair(value, vector, other) if wide else Pair(value, other, vector)

    return pair(-1), pair(len(eigenvalues) - rank), rank


def _matrix(x: Tensor, what: str) -> Tensor:
    if x.dim() != 2:
        raise HoldfastError(f"{what}: shape {tuple(x.shape)}; expected two axes, (N, D).")
    x = x.detach().to(torch.float64)
    check_finite(x, what)
    return x


def check_finite(x: Tensor, what: str) -> None:
    """Raises a HoldfastError with row and column of the first value of a matrix that is not finite."""
    if not bool(x.isfinite().all()):
        row, column = (~x.isfinite()).nonzero()[0].tolist()
        raise HoldfastError(
            f"{what}: not finite at row {row}, column {column} ({x[row, column]}); fill or drop such values first."
        )


def _symmetric(gram: Tensor) -> Tensor:
    gram = _matrix(gram, "The Gram matrix")
    if gram.shape[0] != gram.shape[1]:
        raise HoldfastError(f"The Gram matrix has shape {tuple(gram.shape)}; expected a square matrix, X'X.")
    if len(gram) and (gram - gram.T).abs().max() > 1e-8 * gram.abs().max():
        raise HoldfastError("The Gram matrix is not symmetric; give X'X.")
    return (gram + gram.T) / 2
