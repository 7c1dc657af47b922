"""Losses that a defender minimises so that a model becomes worse at a restricted classification task.

Ascending the cross-entropy does not converge: its gradient grows with the error (SOPHON, Eq. 10). The two losses
of SOPHON, section 4.3.1, vanish where the defender wants to be. Symbols as in the paper: logits z,
p = softmax(z) (there: y-hat), label y, C classes.
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
    """ICE, Eq. 11: the mean of -log(1 - p_y); it needs labels and suppresses this labelling only.

    Derivation of the stable form: with a = z_y - log(sum over j != y of exp(z_j)) we have p_y = sigmoid(a), so that
    -log(1 - p_y) = softplus(a). Its gradient is Eq. 12: p_y at the label and -p_i p_y / (1 - p_y) elsewhere. No
    difference of large numbers is taken, so value and gradient are finite for any finite logits (tested up to 1e4).

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
    """KLU, Eq. 13: the mean of -(1/C) sum over j of log(C p_j); it ignores labels.

    As log p_j = z_j - logsumexp(z), this is logsumexp(z) - mean(z) - log C; its gradient is Eq. 14, p_i - 1/C.

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
