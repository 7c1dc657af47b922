"""Suppression of linear probes: the body is trained so that its features explain little of the restricted labels.

kappa bounds how slow plain gradient descent may be, but ignores where the labels are. These two defenses use the
labels, and contain no head (docs/probe-suppression.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from holdfast.defenses.deep.base import DeepDefense
from holdfast.defenses.deep.settings import FeatureBatch
from holdfast.defenses.registry import register_defense
from holdfast.losses import descended_probe, ridge_probe


@dataclass
class ProbeSuppression(DeepDefense):
    """The common settings of both: how benign features are preserved, and the weight of suppression.

    Attributes:
        weight: mu, weight of the share that a probe explains.
    """

    citation: ClassVar[str] = "Holdfast, docs/probe-suppression.md"
    terms: ClassVar[tuple[str, ...]] = ("explained",)
    classes: ClassVar[bool] = True

    batch_size: int = 128
    restricted_batch: int | None = 500
    optimizer: str = "adam"
    label_smoothing: float = 0.0
    distillation: float = 1.0
    matching: float = 1.0
    mixing: float | None = None
    weight: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_not_above_zero("weight")

    def weights(self) -> dict[str, tuple[float | None, float]]:
        """See `DeepSettings.weights`."""
        return {"explained": (self.weight, 1.0)}


@register_defense
@dataclass
class RidgeProbeSuppression(ProbeSuppression):
    """Minimises R2, the share of the restricted labels' energy that the best linear probe explains.

    What the closed form cannot explain, no other linear probe can, whitened or not. The features of benign samples, and
    of mixtures of them, are kept near the original's, so that other tasks stay learnable.

    Attributes:
        ridge: relative strength of the probe's regularization; see `holdfast.losses.ridge_probe`.
    """

    name: ClassVar[str] = "ridge-probe"

    ridge: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_not_above_zero("ridge")

    def regularizers(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """See `DeepSettings.regularizers`."""
        return {"explained": ridge_probe(batch.restricted, batch.labels, self.ridge)}


@register_defense
@dataclass
class SlowProbeSuppression(ProbeSuppression):
    """Minimises the share that gradient descent on a linear probe has explained after some steps.

    It leaves labels in directions of little energy, so it removes less than `RidgeProbeSuppression`; but whitening
    brings them back. The head is not simulated; features are centred, which has the effect of a bias.

    Attributes:
        steps: t, of the simulated descent.
    """

    name: ClassVar[str] = "slow-probe"

    steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_below_one("steps")

    def regularizers(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """See `DeepSettings.regularizers`."""
        return {"explained": descended_probe(batch.restricted, batch.labels, self.steps)}
