"""The closed-form optimum of linear immunization: a bound for all linear extractors, and extractors that reach it.

K_P and K_H are the Gram matrices of the benign and the restricted task, positive definite on a common subspace. Behind
a linear extractor theta the probes' Hessians are H_P = theta' K_P theta and H_H = theta' K_H theta (Eq. 9).

**Bound.** Let B = K_P^(1/2) theta and M = K_P^(-1/2) K_H K_P^(-1/2). Then H_P = B'B and H_H = B'MB, and as
mu_min |Bv|^2 <= v'B'MBv <= mu_max |Bv|^2 for every v, kappa(H_H) <= kappa(M) kappa(H_P) for *every* theta of full
column rank. In the paper's ratios (Eq. 15), (i) = kappa(H_H)/kappa(K_H) and (ii) = kappa(H_P)/kappa(K_P):

    RIR = (i) / (ii) <= RIR* := kappa(M) kappa(K_P) / kappa(K_H).

**It is reached.** theta = K_P^(-1/2) M^t gives B = M^t, H_P = M^(2t) and H_H = M^(2t+1), so kappa(H_P) = kappa(M)^(2t)
and kappa(H_H) = kappa(M) kappa(H_P): equality. t = 0 whitens the benign task ((ii) = 1/kappa(K_P)); with
t = log kappa(K_P) / (2 log kappa(M)) the benign condition number does not change, (ii) = 1, and (i) = RIR*: the
*stretch*, the optimum of Definition 3.1, which requires a large (i) **and** (ii) <= 1. Both have the same RIR.

**Signal frontier.** kappa bounds the worst direction, not the directions that carry labels. In benign-whitened
coordinates let S be an orthonormal basis of the benign signal K_P^(-1/2) X_P'Y_P (at most C columns), and
theta = K_P^(-1/2) (S S' + epsilon (I - S S')). Then H_P has eigenvalue 1 on S, where all benign label energy lies, and
epsilon^2 elsewhere: one step of gradient descent of size 1 solves the benign task for every epsilon, while label
energy of the restricted task outside S needs about 1/epsilon^2 steps. (ii) = 1 / (epsilon^2 kappa(K_P)), hence
epsilon = kappa(K_P)^(-1/2) meets Definition 3.1 (b) with equality.

An orthogonal map of the output changes no condition number and no step of gradient descent. In the form above no axis
of the output is special, so that optimizers that rescale coordinates, such as Adam, gain less. With `rotate=False` the
axes are the eigenvectors: each has one scale, which standardising undoes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from holdfast.errors import HoldfastError, unknown
from holdfast.spectral.least_squares import LeastSquares, common_subspace

SpaceName = Literal["common", "ridge"]
SPACES: tuple[SpaceName, ...] = ("common", "ridge")


@dataclass(frozen=True)
class Frontier:
    """The limits of linear extractors for a pair of tasks, computed without training.

    Attributes:
        benign: the benign task in coordinates of `basis`.
        restricted: the restricted task, likewise.
        basis: orthonormal, shape (D, s); maps features to the coordinates.
        space: the subspace: "common" to both tasks, or all directions with a "ridge".

    Example:
        >>> from holdfast.spectral.rir import relative_immunization_ratio
        >>> p, h = torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([3.0, 1.0]))
        >>> frontier = Frontier.of(LeastSquares.of(p), LeastSquares.of(h))
        >>> round(frontier.bound), round(frontier.kappa_m)
        (81, 81)
        >>> ratios = relative_immunization_ratio(frontier.stretch(), frontier.benign, frontier.restricted)
        >>> round(ratios.restricted, 9), round(ratios.benign, 9)
        (81.0, 1.0)
    """

    benign: LeastSquares
    restricted: LeastSquares
    basis: Tensor
    space: SpaceName

    def __post_init__(self) -> None:
        # Decomposed here, so that the last digits of results do not depend on the order of calls.
        _ = self.benign.svd, self.restricted.svd

    @classmethod
    def of(
        cls, benign: LeastSquares, restricted: LeastSquares, *, space: SpaceName = "common", ridge: float = 0.01
    ) -> Self:
        """Prepares a pair of tasks.

        Args:
            benign: D features.
            restricted: the same D features.
            space: "common": only directions that both tasks use, where all ratios are bounded. "ridge": all directions,
                with `ridge` per sample added to both Gram matrices.
            ridge: see `LeastSquares.with_ridge`; ignored for "common".

        Raises:
            HoldfastError: if the tasks share no direction, or the ridge is not above 0.
        """
        if space not in SPACES:
            raise unknown("space", space, SPACES)
        if space == "ridge":
            if not ridge > 0:
                raise HoldfastError(f"ridge is {ridge}; expected a number above 0, or take the common subspace.")
            identity = torch.eye(benign.features, dtype=torch.float64, device=benign.root.device)
            return cls(benign.with_ridge(ridge), restricted.with_ridge(ridge), identity, space)
        basis = common_subspace(benign, restricted)
        if basis.shape[0] == basis.shape[1]:
            return cls(benign, restricted, basis, space)
        return cls(_within(benign, basis), _within(restricted, basis), basis, space)

    @cached_property
    def whitening(self) -> Tensor:
        """K_P^(-1/2), shape (s, s)."""
        _, sigma, v = self.benign.svd
        return (v / sigma) @ v.T

    @cached_property
    def _m(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues mu, descending, and eigenvectors of M."""
        _, sigma, vh = torch.linalg.svd(self.restricted.root @ self.whitening, full_matrices=False)
        return sigma.square(), vh.T

    @property
    def mu(self) -> Tensor:
        """Eigenvalues of M, descending, shape (s,): restricted curvature where the benign task has 1."""
        return self._m[0]

    @property
    def kappa_m(self) -> float:
        """kappa(M): the slope of the frontier kappa_H = kappa(M) kappa_P."""
        return (self.mu[0] / self.mu[-1]).item()

    @property
    def bound(self) -> float:
        """RIR*, which no linear extractor exceeds."""
        return self.kappa_m * self.benign.condition / self.restricted.condition

    def stretch(self, amount: float = 1.0, *, rotate: bool = True) -> Tensor:
        """Returns theta = K_P^(-1/2) M^t, shape (s, s), an extractor on the frontier.

        Args:
            amount: the benign condition number becomes kappa(K_P)^amount: 0 whitens, 1 (the optimum of Definition 3.1)
                keeps it; more violates condition (b) for a slower restricted task.
            rotate: whether no axis of the output is special; see the top of this file.

        Raises:
            HoldfastError: if amount is negative or not finite.
        """
        if not 0 <= amount < math.inf:
            raise HoldfastError(f"stretch is {amount}; expected a number of at least 0.")
        log_kappa = math.log(self.kappa_m)
        if log_kappa <= 1e-9:
            # K_H is a multiple of K_P: every extractor reaches the bound, which is then kappa(K_P)/kappa(K_H) = 1.
            _, sigma, v = self.benign.svd
            aligned = v * sigma ** (amount - 1)
            return aligned @ v.T if rotate else aligned
        mu, vectors = self._m
        power = amount * math.log(self.benign.condition) / (2 * log_kappa)
        scaled = (mu / math.sqrt(mu[0].item() * mu[-1].item())) ** power
        aligned = self.whitening @ (vectors * scaled)
        return aligned @ vectors.T if rotate else aligned

    @cached_property
    def signal(self) -> Tensor:
        """An orthonormal basis of the benign signal in whitened coordinates, shape (s, at most C).

        Raises:
            HoldfastError: if the benign task has no targets, or they are orthogonal to all its features.
        """
        u, _, v = self.benign.svd
        signal: Tensor
        signal, sigma, _ = torch.linalg.svd(v @ (u.T @ self.benign.target), full_matrices=False)
        if len(sigma):
            signal = signal[:, sigma > 1e-9 * max(sigma[0].item(), 1e-300)]
        if not signal.shape[1]:
            raise HoldfastError("The benign task has no targets that its features explain: there is no signal to keep.")
        return signal

    def protect_signal(self, epsilon: float | None = None, *, rotate: bool = True) -> Tensor:
        """Returns theta = K_P^(-1/2) (S S' + epsilon (I - S S')), shape (s, s), of the signal frontier.

        Args:
            epsilon: in (0, 1]; None: kappa(K_P)^(-1/2), with which (ii) = 1.
            rotate: whether no axis of the output is special; see the top of this file.

        Raises:
            HoldfastError: if epsilon is out of range, or there is no benign signal.
        """
        if epsilon is None:
            epsilon = self.benign.condition**-0.5
        if not 0 < epsilon <= 1:
            raise HoldfastError(f"epsilon is {epsilon}; expected a number above 0 and at most 1.")
        basis, _ = torch.linalg.qr(self.signal, mode="complete")
        scales = basis.new_full((len(basis),), epsilon)
        scales[: self.signal.shape[1]] = 1
        aligned = self.whitening @ (basis * scales)
        theta: Tensor = aligned @ basis.T if rotate else aligned
        return theta

    def leak(self) -> float:
        """Returns the share of the restricted label energy that a probe on the benign signal alone explains.

        The signal frontier cannot slow this part down, for any epsilon. NaN without restricted targets.
        """
        total = explained(self.restricted)
        part = explained(self.restricted.through(self.whitening @ self.signal))
        return part / total if total else math.nan

    def full(self, theta: Tensor) -> Tensor:
        """Returns the invertible extractor in all D features: theta on the subspace, a uniform scale on the rest.

        The scale is the geometric mean of theta's singular values, so that the rest is neither lost nor dominant.
        """
        width, inside = self.basis.shape
        extractor = self.basis @ theta @ self.basis.T
        if width > inside:
            scale = torch.linalg.svdvals(theta).log().mean().exp()
            extractor = extractor + scale * (torch.eye(width).to(self.basis) - self.basis @ self.basis.T)
        return extractor


def explained(problem: LeastSquares) -> float:
    """Returns the label energy that the best linear probe explains, ||Y||_F^2 minus its loss.

    Example:
        >>> explained(LeastSquares.of(torch.eye(2)[:, :1], torch.tensor([3.0, 4.0])))
        9.0
    """
    u, _, _ = problem.svd
    return (u.T @ problem.target).square().sum().item()


def angles(benign: LeastSquares, restricted: LeastSquares) -> Tensor:
    """Returns |cos| of the angles between the tasks' singular vectors, sorted by singular value (cf. Proposition 3.2).

    Angles do not determine RIR*: with aligned directions, too, it is above 1, unless the eigenvalues mu of M are
    largest in the direction of the largest singular value and smallest in that of the smallest. See `Frontier.bound`.

    Returns:
        Shape (rank_P, rank_H), in [0, 1].

    Example:
        >>> angles(LeastSquares.of(torch.eye(2)[:, [1, 0]] * torch.tensor([2.0, 1.0])), LeastSquares.of(torch.eye(2)))
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    return (benign.svd[2].T @ restricted.svd[2]).abs().clamp(max=1.0)


def _within(problem: LeastSquares, basis: Tensor) -> LeastSquares:
    inside = problem.through(basis)
    again = LeastSquares.of(inside.root, inside.target)
    return LeastSquares(again.root, again.target, problem.samples, problem.rest + again.rest)
