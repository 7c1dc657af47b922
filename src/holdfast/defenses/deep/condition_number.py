"""Algorithm 1 for deep networks (ICML 2025, section 5.3), and the baselines that differ from it in the regularizer.

R_well is of the benign batch's feature Gram matrix and R_ill of the restricted one's, each computed on its smaller side
and in float64. theta is not linear, so there is no K to precondition with, and gradients are the plain ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.defenses.deep.base import DeepDefense
from holdfast.defenses.deep.settings import FeatureBatch
from holdfast.defenses.linear.condition_number import CITATION
from holdfast.defenses.registry import register_defense
from holdfast.spectral.regularizers import r_ill_of_features, r_well_of_features


@register_defense
@dataclass
class DeepCondition(DeepDefense):
    """Algorithm 1: R_well on the benign features, R_ill on the restricted ones, and the benign loss, together.

    Avoid batches with as many samples as there are features: such a Gram matrix is badly conditioned by chance.

    Attributes:
        lambda_well: lambda_P; None: balanced (see `DeepSettings.weights`).
        lambda_ill: lambda_H; None: balanced.
        well_multiple: multiplies the balanced lambda_P. The paper searches over multiples and prints none.
        ill_multiple: multiplies the balanced lambda_H.
    """

    name: ClassVar[str] = "deep-condition"
    citation: ClassVar[str] = CITATION
    terms: ClassVar[tuple[str, ...]] = ("r_well", "r_ill")
    spectral: ClassVar[bool] = True

    lambda_well: float | None = None
    lambda_ill: float | None = None
    well_multiple: float = 1.0
    ill_multiple: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_negative("lambda_well", "lambda_ill", "well_multiple", "ill_multiple")

    def regularizers(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """See `DeepSettings.regularizers`."""
        return {
            "r_well": r_well_of_features(batch.benign.double()),
            "r_ill": r_ill_of_features(batch.restricted.double()),
        }

    def weights(self) -> dict[str, tuple[float | None, float]]:
        """See `DeepSettings.weights`."""
        return {"r_well": (self.lambda_well, self.well_multiple), "r_ill": (self.lambda_ill, self.ill_multiple)}


@register_defense
@dataclass
class DeepRIll(DeepDefense):
    """The paper's first baseline: the body minimises R_ill of the restricted features alone; the head, the benign loss.

    Attributes:
        lambda_ill: lambda_H; None: balanced (see `DeepSettings.weights`).
        ill_multiple: multiplies the balanced lambda_H.
    """

    name: ClassVar[str] = "deep-r-ill"
    citation: ClassVar[str] = CITATION
    terms: ClassVar[tuple[str, ...]] = ("r_ill",)
    spectral: ClassVar[bool] = True

    benign_loss: bool = False
    lambda_ill: float | None = None
    ill_multiple: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_negative("lambda_ill", "ill_multiple")

    def regularizers(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """See `DeepSettings.regularizers`."""
        return {"r_ill": r_ill_of_features(batch.restricted.double())}

    def weights(self) -> dict[str, tuple[float | None, float]]:
        """See `DeepSettings.weights`."""
        return {"r_ill": (self.lambda_ill, self.ill_multiple)}


@register_defense
@dataclass
class DeepOptKappa(DeepDefense):
    """Opt kappa: descends the benign loss and kappa(H_P) - kappa(H_H), or the difference of their logarithms.

    Attributes:
        log: take logarithms; the plain difference is the paper's baseline.
        lambda_kappa: weight of the difference; None: balanced (see `DeepSettings.weights`).
        kappa_multiple: multiplies the balanced weight.
    """

    name: ClassVar[str] = "deep-opt-kappa"
    citation: ClassVar[str] = CITATION
    terms: ClassVar[tuple[str, ...]] = ("kappa_difference",)
    spectral: ClassVar[bool] = True

    log: bool = False
    lambda_kappa: float | None = None
    kappa_multiple: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_negative("lambda_kappa", "kappa_multiple")

    def regularizers(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """See `DeepSettings.regularizers`."""
        benign, restricted = log_kappa(batch.benign), log_kappa(batch.restricted)
        return {"kappa_difference": benign - restricted if self.log else benign.exp() - restricted.exp()}

    def weights(self) -> dict[str, tuple[float | None, float]]:
        """See `DeepSettings.weights`."""
        return {"kappa_difference": (self.lambda_kappa, self.kappa_multiple)}


def log_kappa(features: Tensor) -> Tensor:
    """Returns log kappa(Z'Z) over the non-zero spectrum, with its graph.

    Args:
        features: Z, shape (N, D), floating point; their precision decides what counts as zero. The result is float64.

    Example:
        >>> round(log_kappa(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])).exp().item(), 6)
        4.0
    """
    sigma = torch.linalg.svdvals(features.double())
    floor = max(features.shape) * torch.finfo(features.dtype).eps * sigma.detach()[0]
    kept = sigma[sigma.detach() > floor]
    log: Tensor = 2 * (kept[0].log() - kept[-1].log()) if len(kept) else 0 * sigma.sum()
    return log
