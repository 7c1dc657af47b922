"""The relative immunization ratio (ICML 2025, Eq. 15) of an extractor, rank-aware and as in the released code."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.spectral.condition_numbers import published_condition_number
from holdfast.spectral.least_squares import LeastSquares


@dataclass(frozen=True)
class Ratios:
    """The relative immunization ratio, Eq. 15, with its parts.

    Attributes:
        restricted: (i), how much worse conditioned the restricted task's probe became; should be above 1.
        benign: (ii), the same for the benign task; should be at most 1.
        lost: number of benign directions that the extractor maps to zero, up to float64 rounding. kappa is over
            non-zero singular values, so that losing the slowest direction improves (ii) but harms the benign task.
    """

    restricted: float
    benign: float
    lost: int = field(default=0, repr=False)

    @property
    def rir(self) -> float:
        """(i) / (ii)."""
        return self.restricted / self.benign

    @property
    def immunized(self) -> bool:
        """Whether Definition 3.1 (a) and (b) hold, (ii) up to rounding, and no benign direction is lost."""
        return self.restricted > 1 and self.benign <= 1 + 1e-3 and not self.lost


def relative_immunization_ratio(theta: Tensor, benign: LeastSquares, restricted: LeastSquares) -> Ratios:
    """Returns Eq. 15 for a linear extractor, over the non-zero spectra.

    Args:
        theta: shape (D, D_out).
        benign: the benign task before the extractor.
        restricted: the restricted task before the extractor.

    Raises:
        HoldfastError: if a spectrum vanishes behind theta.

    Example:
        >>> import torch
        >>> p, h = LeastSquares.of(torch.diag(torch.tensor([1.0, 2.0]))), LeastSquares.of(torch.eye(2))
        >>> relative_immunization_ratio(torch.diag(torch.tensor([1.0, 0.5])), p, h)
        Ratios(restricted=4.0, benign=0.25)
    """
    return ratios_behind(benign.through(theta), restricted.through(theta), benign, restricted)


def ratios_behind(
    benign: LeastSquares, restricted: LeastSquares, benign_before: LeastSquares, restricted_before: LeastSquares
) -> Ratios:
    """Returns Eq. 15 from the problems behind and before the extractor; see `relative_immunization_ratio`.

    Example:
        >>> import torch
        >>> p, h = LeastSquares.of(torch.diag(torch.tensor([1.0, 2.0]))), LeastSquares.of(torch.eye(2))
        >>> ratios_behind(p, h, p, h)
        Ratios(restricted=1.0, benign=1.0)
    """
    if not (benign.spectrum.rank and restricted.spectrum.rank):
        raise HoldfastError("The extractor maps all features of a task to zero; nothing can be learned behind it.")
    return Ratios(
        restricted.condition / restricted_before.condition,
        benign.condition / benign_before.condition,
        max(0, benign_before.spectrum.rank - benign.spectrum.rank),
    )


def published_ratio(
    theta: Tensor, benign: Tensor, restricted: Tensor, before: tuple[float, float] | None = None
) -> Ratios:
    """Returns Eq. 15 as the paper's released code computes it; see `published_condition_number`.

    Args:
        theta: shape (D, D_out), float64.
        benign: features before the extractor, shape (N, D), float64. Not a root of them: if there are null directions,
            the number depends on the rounding errors of X'X.
        restricted: likewise.
        before: published condition numbers of the benign and the restricted features before the extractor, if known;
            None: they are computed.

    Example:
        >>> import torch
        >>> p, h = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)), torch.eye(2, dtype=torch.float64)
        >>> round(published_ratio(torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64)), p, h).rir, 3)
        16.0
    """
    of_benign, of_restricted = before or (published_kappa(benign), published_kappa(restricted))
    return Ratios(published_kappa(restricted @ theta) / of_restricted, published_kappa(benign @ theta) / of_benign)


def published_kappa(features: Tensor) -> float:
    """Returns the published condition number of features; see `published_ratio`.

    Example:
        >>> import torch
        >>> round(published_kappa(torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))), 3)
        4.0
    """
    return published_condition_number(features.T @ features)
