r"""Losses that a defender minimises so that a model becomes worse at a restricted classification task.

Ascending the cross-entropy does not converge: its gradient grows with the error (SOPHON, Eq. 10). The two losses
of SOPHON, section 4.3.1, vanish where the defender wants to be. Symbols as in the paper: logits :math:`z`,
:math:`\hat y = \mathrm{softmax}(z)`, label :math:`y`, :math:`C` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import HoldfastError

SuppressionLoss = Callable[[Tensor, Tensor], Tensor]


def inverse_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""ICE, Eq. 11: the mean of :math:`-\log(1 - \hat y_y)`; it needs labels and suppresses this labelling only.

    Derivation of the stable form: with :math:`a = z_y - \log \sum_{j \ne y} e^{z_j}` we have
    :math:`\hat y_y = \mathrm{sigmoid}(a)`, so :math:`-\log(1 - \hat y_y) = \mathrm{softplus}(a)`. Its gradient is
    Eq. 12: :math:`\hat y_y` at the label and :math:`-\hat y_i \hat y_y / (1 - \hat y_y)` elsewhere. No difference of
    large numbers is taken, so value and gradient are finite for any finite logits (tested up to 1e4).

    Args:
        logits: shape (N, C), floating point, C >= 2.
        labels: shape (N,), int64 in [0, C).

    Returns:
        A scalar of the dtype of ``logits``, at least 0, and 0 where the label's probability is 0.

    Raises:
        HoldfastError: if there are fewer than two classes: then no answer but the label is possible.

    Example:
        >>> import torch
        >>> z = torch.log(torch.tensor([[0.25, 0.75]]))
        >>> round(inverse_cross_entropy(z, torch.tensor([0])).exp().item(), 4)  # 1 / (1 - 0.25)
        1.3333
    """
    if logits.shape[-1] < 2:
        raise HoldfastError(f"Inverse cross-entropy needs at least 2 classes, got logits {tuple(logits.shape)}.")
    label = labels.unsqueeze(-1)
    others = logits.scatter(-1, label, -math.inf).logsumexp(-1)
    return F.softplus(logits.gather(-1, label).squeeze(-1) - others).mean()


def kl_from_uniform(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    r"""KLU, Eq. 13: the mean of :math:`-\sum_j \frac1C \log(C \hat y_j)`; it ignores labels.

    As :math:`\log \hat y_j = z_j - \mathrm{logsumexp}(z)`, the sum is :math:`\mathrm{logsumexp}(z) - \bar z - \log C`;
    its gradient is Eq. 14, :math:`\hat y_i - 1/C`.

    Args:
        logits: shape (N, C), floating point.
        labels: ignored; accepted so that all suppression losses are called alike.

    Returns:
        A scalar of the dtype of ``logits``, at least 0, and 0 for equal logits.

    Example:
        >>> import torch
        >>> kl_from_uniform(torch.zeros(3, 5)).abs().item() < 1e-6
        True
    """
    classes = logits.shape[-1]
    return (logits.logsumexp(-1) - logits.mean(-1)).mean() - math.log(classes)


def cross_entropy_ascent(logits: Tensor, labels: Tensor) -> Tensor:
    """The negated cross-entropy: the unstable baseline of SOPHON's Figure 13, unbounded below.

    Args:
        logits: shape (N, C), floating point.
        labels: shape (N,), int64 in [0, C).

    Returns:
        A scalar of the dtype of ``logits``, at most 0.

    Example:
        >>> import torch
        >>> round(cross_entropy_ascent(torch.zeros(1, 2), torch.tensor([1])).item(), 4)  # -log 2
        -0.6931
    """
    return -F.cross_entropy(logits, labels)


LOSSES: Final[dict[str, SuppressionLoss]] = {
    "ice": inverse_cross_entropy,
    "klu": kl_from_uniform,
    "ce-ascent": cross_entropy_ascent,
}
"""Suppression losses by the name that recipes and the command line use."""
