"""IMMA (Zheng and Yeh, ECCV 2024) for deep networks: the training of a linear probe is differentiated through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.defenses.deep.base import DeepDefense
from holdfast.defenses.deep.settings import FeatureBatch
from holdfast.defenses.linear.imma import IMMA
from holdfast.defenses.registry import register_defense


@register_defense
@dataclass
class DeepIMMA(DeepDefense):
    """Bi-level optimization: a probe descends the restricted loss below; the body raises its final loss above.

    Below, w_0 = 0 and w_{j+1} = w_j - eta grad_w L(D_H, w_j, theta), with the cross-entropy L of a batch and
    eta = 2 / lambda_max(Z'Z / N), as the Hessian of the cross-entropy is at most half of that Gram matrix. Above, theta
    ascends L(D_H, w_J(theta), theta), back-propagated through every w_j; the step size is part of the adversary and is
    not differentiated.

    Attributes:
        inner_steps: J, the simulated probe's steps.
        lambda_inner: weight of the loss that theta ascends; None: balanced (see `DeepSettings.weights`).
        inner_multiple: multiplies the balanced weight.
    """

    name: ClassVar[str] = "deep-imma"
    citation: ClassVar[str] = IMMA.citation
    terms: ClassVar[tuple[str, ...]] = ("probe_ascent",)
    classes: ClassVar[bool] = True

    inner_steps: int = 10
    lambda_inner: float | None = None
    inner_multiple: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_below_one("inner_steps")
        self.refuse_negative("lambda_inner", "inner_multiple")

    def regularizers(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """See `DeepSettings.regularizers`."""
        return {"probe_ascent": -probe_loss(batch.restricted, batch.labels, self.inner_steps)}

    def weights(self) -> dict[str, tuple[float | None, float]]:
        """See `DeepSettings.weights`."""
        return {"probe_ascent": (self.lambda_inner, self.inner_multiple)}


def probe_loss(features: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Returns the cross-entropy of a linear probe after some steps of gradient descent from zero, with its graph.

    The gradient by the weights is Z' (softmax(Z w) - Y) / N, in closed form.

    Args:
        features: Z, shape (N, D), floating point.
        labels: shape (N,), int64.
        steps: J.

    Returns:
        A float64 scalar.

    Example:
        >>> z, y = torch.eye(2), torch.tensor([0, 1])
        >>> [round(probe_loss(z, y, steps).item(), 3) for steps in (0, 1, 10)]
        [0.693, 0.127, 0.022]
    """
    z = features.double()
    classes, index = torch.unique(labels, return_inverse=True)
    targets = F.one_hot(index, len(classes)).to(z)
    eta = 2 * len(z) / torch.linalg.matrix_norm(z.detach(), 2).square().clamp_min(1e-300)
    w = z.new_zeros(z.shape[1], len(classes))
    for _ in range(steps):
        w = w - eta / len(z) * z.T @ (torch.softmax(z @ w, -1) - targets)
    return F.cross_entropy(z @ w, index)
