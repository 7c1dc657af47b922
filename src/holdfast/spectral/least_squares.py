"""The least-squares problem of a linear probe, from arrays or from a stream."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.spectral.condition_numbers import EPS, Spectrum, _matrix, check_finite


@dataclass(frozen=True)
class LeastSquares:
    """A linear probe's problem, 1/2 ||X w - Y||_F^2, in compressed form.

    Gradient descent depends on X and Y only through K = X'X and X'Y; `root` and `target` represent both without
    squaring the condition number.

    Attributes:
        root: R, shape (m, D) with m <= D, float64: R'R = X'X.
        target: T, shape (m, C), float64: R'T = X'Y.
        samples: N.
        rest: ||Y||_F^2 - ||T||_F^2, which no probe explains, because it is orthogonal to all features.
        precision: eps of the arithmetic that computed the features. Singular values below 8 eps, relative to the
            largest, count as zero, because in a float32 network rounding makes dependent features independent. Behind
            an extractor, which may be badly conditioned on purpose, it is eps of float64 again.

    Example:
        >>> x, y = torch.eye(3, dtype=torch.float64)[:, :2], torch.ones(3, 1, dtype=torch.float64)
        >>> problem = LeastSquares.of(x, y)
        >>> problem.spectrum.hessian_condition, round(problem.rest, 12)
        (1.0, 1.0)
    """

    root: Tensor
    target: Tensor
    samples: int
    rest: float = 0.0
    precision: float = EPS

    @classmethod
    def of(cls, x: Tensor, y: Tensor | None = None, *, precision: float = EPS) -> Self:
        """Compresses features and targets.

        Args:
            x: shape (N, D), any floating type, finite.
            y: shape (N, C) or (N,); None: no targets, C = 0.
            precision: eps of the arithmetic that computed x, if it was not float64.

        Raises:
            HoldfastError: if shapes disagree, there is no sample, or a value is not finite.
        """
        return cls.stream([(x, y)], precision=precision)

    @classmethod
    def stream(
        cls,
        batches: Iterable[tuple[Tensor, Tensor | None]],
        *,
        method: Literal["qr", "gram"] = "qr",
        precision: float = EPS,
    ) -> Self:
        """Compresses a stream of batches of any number; memory is O(D^2 + batch).

        Args:
            batches: pairs like the arguments of `of`.
            method: "qr" keeps all digits (each batch is merged into R by a QR decomposition); "gram" adds up X'X in
                float64, which is faster, but loses singular values below 1e-7 sigma_max.
            precision: see `of`.

        Raises:
            HoldfastError: see `of`.
        """
        moments = (_QR if method == "qr" else _Gram)()
        widths: tuple[int, int] | None = None
        for x, y in batches:
            features, targets = _matrix(x, "The features"), _targets(x, y)
            width, outputs = widths = widths or (features.shape[1], targets.shape[1])
            if features.shape[1] != width:
                raise HoldfastError(f"A batch has {features.shape[1]} features and those before it {width}.")
            if targets.shape[1] != outputs:
                raise HoldfastError("Two batches have different numbers of targets; each needs the same ones, or none.")
            moments.add(features, targets)
        if not moments.samples:
            raise HoldfastError("There are no samples to take a spectrum of; give at least one.")
        return cls(*moments.result(), precision=precision)

    @property
    def features(self) -> int:
        """D, the number of features."""
        return self.root.shape[1]

    @property
    def gram(self) -> Tensor:
        """K = X'X, shape (D, D); the Hessian of the probe."""
        return self.root.T @ self.root

    @property
    def cross(self) -> Tensor:
        """X'Y, shape (D, C)."""
        return self.root.T @ self.target

    @cached_property
    def spectrum(self) -> Spectrum:
        """The singular values of X."""
        # Without a decomposition at hand, the values alone are half the work.
        values = self._decomposed[1] if "_decomposed" in self.__dict__ else torch.linalg.svdvals(self.root)
        # Rounding errors of an exact zero: of this decomposition, and of the arithmetic that computed the features.
        relative = max(self.samples, *self.root.shape) * EPS
        if self.precision > EPS:
            relative = max(relative, 8 * self.precision)
        tolerance = relative * (values[0].item() if len(values) else 0.0)
        return Spectrum(values[values > tolerance], tolerance, len(values))

    @cached_property
    def _decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        check_finite(self.root, "The features")
        u, sigma, vh = torch.linalg.svd(self.root, full_matrices=False)
        return u, sigma, vh

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, r), sigma (r,) descending, V (D, r) of the root, over the non-zero spectrum."""
        u, s, vh = self._decomposed
        rank = self.spectrum.rank
        return u[:, :rank], s[:rank], vh[:rank].T

    @property
    def condition(self) -> float:
        """Kappa of the Hessian over its non-zero spectrum."""
        return self.spectrum.hessian_condition

    def through(self, theta: Tensor) -> LeastSquares:
        """Returns the problem on the features X theta of a linear extractor.

        Args:
            theta: shape (D, D_out); need not be square.

        Raises:
            HoldfastError: if the rows of theta are not D.
        """
        if theta.dim() != 2 or len(theta) != self.features:
            raise HoldfastError(
                f"The extractor has shape {tuple(theta.shape)}; expected ({self.features}, D_out): a row a feature."
            )
        return replace(self, root=self.root @ theta.to(self.root), precision=EPS)

    def with_ridge(self, ridge: float) -> LeastSquares:
        """Returns the problem with ridge * N added to the Hessian's diagonal: `ridge` is per sample.

        Raises:
            HoldfastError: if the ridge is negative or not finite.
        """
        if not 0 <= ridge < math.inf:
            raise HoldfastError(f"ridge is {ridge}; expected a number of at least 0.")
        if ridge == 0:
            return self
        extra = torch.eye(self.features, dtype=torch.float64, device=self.root.device) * math.sqrt(ridge * self.samples)
        rows = torch.cat([self.root, extra])
        target = torch.cat([self.target, self.target.new_zeros(self.features, self.target.shape[1])])
        again = LeastSquares.of(rows, target)
        return replace(again, samples=self.samples, rest=self.rest + again.rest)


class _QR:
    """R and Q'Y of all batches so far: the triangle of [X Y]."""

    def __init__(self) -> None:
        self.triangle: Tensor | None = None
        self.width = self.samples = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        both = torch.cat([x, y], 1)
        stacked = both if self.triangle is None else torch.cat([self.triangle, both])
        self.triangle = torch.linalg.qr(stacked, mode="r").R if len(stacked) > 1 else stacked
        self.width, self.samples = x.shape[1], self.samples + len(x)

    def result(self) -> tuple[Tensor, Tensor, int, float]:
        assert self.triangle is not None
        root, target = self.triangle[: self.width, : self.width], self.triangle[: self.width, self.width :]
        return root, target, self.samples, self.triangle[self.width :, self.width :].square().sum().item()


class _Gram:
    """X'X, X'Y and ||Y||^2 of all batches so far."""

    def __init__(self) -> None:
        self.gram = self.cross = torch.empty(0)
        self.samples, self.energy = 0, 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        if not self.gram.numel():
            self.gram, self.cross = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], y.shape[1])
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, y)
        self.energy += y.square().sum().item()
        self.samples += len(x)

    def result(self) -> tuple[Tensor, Tensor, int, float]:
        values, vectors = torch.linalg.eigh(self.gram)
        keep = values > max(self.samples, len(values)) * EPS * values[-1]
        sigma, v = values[keep].sqrt(), vectors[:, keep]
        target = (v.T @ self.cross) / sigma[:, None]
        return sigma[:, None] * v.T, target, self.samples, max(0.0, self.energy - target.square().sum().item())


def common_subspace(first: LeastSquares, second: LeastSquares) -> Tensor:
    """Returns an orthonormal basis of the directions that the features of both problems span.

    A direction that one task does not use has no curvature in that task: stretching it costs the task nothing, and
    ratios of condition numbers are unbounded. The basis spans the orthogonal complement of both null spaces together.

    Args:
        first: a problem with D features.
        second: a problem with the same D features.

    Returns:
        Shape (D, s), float64; the identity if both have full rank.

    Raises:
        HoldfastError: if the numbers of features differ, or both use no common direction.

    Example:
        >>> x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> common_subspace(LeastSquares.of(x), LeastSquares.of(x.roll(1, 1))).abs().round(decimals=12).T.tolist()
        [[0.0, 1.0, 0.0]]
    """
    width = first.features
    if second.features != width:
        raise HoldfastError(f"The two tasks have {width} and {second.features} features; they must have the same ones.")
    null = torch.cat([_null_space(first), _null_space(second)], 1)
    if not null.shape[1]:
        return torch.eye(width, dtype=torch.float64, device=first.root.device)
    u, sigma, _ = torch.linalg.svd(null, full_matrices=True)
    # Null spaces have an error of about eps kappa; vectors of both that agree to 1e-7 are the same direction.
    used = int((sigma > 1e-7).sum())
    if used == width:
        raise HoldfastError(
            "No direction is used by both tasks: their features have disjoint supports, and there is nothing to "
            "compare. Check that both are the same columns; or add a ridge."
        )
    basis: Tensor = u[:, used:]
    return basis


def _null_space(problem: LeastSquares) -> Tensor:
    _, _, vh = torch.linalg.svd(problem.root, full_matrices=True)
    null: Tensor = vh[problem.spectrum.rank :].T
    return null


def _targets(x: Tensor, y: Tensor | None) -> Tensor:
    if y is None:
        return x.new_zeros(len(x), 0, dtype=torch.float64)
    y = _matrix(y[:, None] if y.dim() == 1 else y, "The targets")
    if len(y) != len(x):
        raise HoldfastError(f"There are {len(x)} rows of features and {len(y)} of targets; they must agree.")
    return y
