"""Suppression of linear probes: the body is trained so that its features say little of the restricted labels.

kappa bounds how slowly plain gradient descent may go; it does not see where the labels are. These two do, and no head
occurs in them (docs/probe-suppression.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from holdfast.defenses.deep.base import DeepDefense
from holdfast.defenses.deep.settings import FeatureBatch
from holdfast.defenses.registry import register_defense
from holdfast.losses import descended_probe, ridge_probe

_OURS = "Holdfast, docs/probe-suppression.md"


@dataclass
class ProbeSuppression(DeepDefense):
    """What both have in common: how the model is held, and the weight of what is suppressed.

    Attributes:
        weight: mu, of what a probe explains.
    """

    citation: ClassVar[str] = _OURS
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

    What is hidden from the closed form is hidden from every other linear probe, whitened or not. The features of benign
    samples, and of mixtures of them, are held where the original has them, so that other tasks stay learnable.

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

    What lies in directions of little energy is then hidden well enough, so that less has to be removed; whitening
    brings it back. The head is not simulated, and the features are centred, as a bias would.

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
