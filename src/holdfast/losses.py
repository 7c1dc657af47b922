"""Losses that a defender minimises so that a model becomes worse at a restricted task.

Ascending the cross-entropy does not converge: its gradient grows with the error (SOPHON, Eq. 10). The gradients of
SOPHON's two losses for classifiers (section 4.3.1) vanish at the defender's goal. Symbols as in the paper: logits z,
p = softmax(z) (there: y-hat), label y, C classes; for a denoiser (section 4.3.2), noise epsilon and its prediction
epsilon-hat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import HoldfastError

SuppressionLoss = Callable[[Tensor, Tensor], Tensor]


def inverse_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """ICE, Eq. 11: the mean of -log(1 - p_y); it needs labels and suppresses only this labelling.

    Derivation of the stable form: with a = z_y - log(sum over j != y of exp(z_j)) we have p_y = sigmoid(a), so that
    -log(1 - p_y) = softplus(a). Its gradient is Eq. 12: p_y at the label and -p_i p_y / (1 - p_y) elsewhere. It takes
    no difference of large numbers, so value and gradient are finite for any finite logits (tested up to 1e4).

    Args:
        logits: shape (N, C), floating point, C >= 2.
        labels: shape (N,), int64 in [0, C).

    Returns:
        A scalar of the dtype of ``logits``, at least 0, and 0 where the label's probability is 0.

    Raises:
        HoldfastError: if there are fewer than two classes.

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


def released_inverse_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of SOPHON's released code, CE(1 - z), in place of Eq. 11.

    The 1 cancels in a softmax, so this is CE(-z): the mean of logsumexp(-z) + z_y. It falls until the label's logit is
    far *below* all others, so it still has a gradient where that of Eq. 11 has vanished. With C equal logits its
    gradient at the label is 1 - 1/C, that of Eq. 11 is 1/C: nine times as much with ten classes.

    Args:
        logits: shape (N, C), floating point, C >= 2.
        labels: shape (N,), int64 in [0, C).

    Returns:
        A scalar of the dtype of ``logits``, at least 0.

    Raises:
        HoldfastError: if there are fewer than two classes.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0, 1.0]])
        >>> released_inverse_cross_entropy(z, torch.tensor([0])) == F.cross_entropy(1 - z, torch.tensor([0]))
        tensor(True)
    """
    if logits.shape[-1] < 2:
        raise HoldfastError(f"Inverse cross-entropy needs at least 2 classes, got logits {tuple(logits.shape)}.")
    return F.cross_entropy(1 - logits, labels)


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


def denial_of_service(outputs: Tensor, noise: Tensor | None = None) -> Tensor:
    """DoS, Eq. 16: the mean square of a denoiser's outputs; at its minimum all outputs are 0, for any image.

    Its gradient is 2 epsilon-hat over the number of values, and vanishes at the goal. The paper writes a squared norm;
    as for its L_MSE, we take the mean over pixels, which differs by a factor.

    Args:
        outputs: epsilon-hat, shape (N, ...), floating point.
        noise: ignored; accepted so that all suppression losses are called alike.

    Returns:
        A scalar of the dtype of ``outputs``, at least 0.

    Example:
        >>> import torch
        >>> denial_of_service(torch.tensor([[3.0, 1.0]])).item()
        5.0
    """
    return outputs.square().mean()


def squared_error_ascent(outputs: Tensor, noise: Tensor) -> Tensor:
    """The negated mean squared error: the unstable baseline of SOPHON's Figure 14, unbounded below (Eq. 15).

    Args:
        outputs: epsilon-hat, shape (N, ...), floating point.
        noise: epsilon, of the same shape.

    Returns:
        A scalar of the dtype of ``outputs``, at most 0.

    Example:
        >>> import torch
        >>> squared_error_ascent(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])).item()
        -2.0
    """
    return -F.mse_loss(outputs, noise.to(outputs.dtype))


def ridge_probe(features: Tensor, labels: Tensor, ridge: float = 0.01) -> Tensor:
    """R2 of the best linear probe: the share of the labels' energy that ridge regression on the features explains.

    With features Z and one-hot labels Y, both centred,

        R2 = tr(Y' Z (Z'Z + lambda I)^-1 Z'Y) / ||Y||^2,    lambda = ridge * ||Z||_F^2 / min(N, D).

    It contains no head, so an adversary gains nothing by a new one. lambda is relative to the mean eigenvalue: scaling,
    shifting or rotating Z changes nothing. Shrinking one direction against the others does: directions of less energy
    than lambda count little here, but a probe that whitens still reads them. A smaller ridge hides less there, and
    needs more samples.

    By the push-through identity Z (Z'Z + lambda I)^-1 Z' = ZZ' (ZZ' + lambda I)^-1, so the smaller of the two Gram
    matrices is enough. R2 is at most min(N - 1, D) / (min(N - 1, D) + ridge), and noise is explained as well: use
    several times as many samples as features, or a large ridge.

    Args:
        features: shape (N, D), floating point; the result is computed in float64.
        labels: classes, int64 of shape (N,), at least two different ones; or values to predict, shape (N, M).
        ridge: relative strength of the regularisation, above 0.

    Returns:
        A scalar of the dtype of ``features`` in [0, 1): 0 where the features do not predict the labels.

    Raises:
        HoldfastError: if the ridge is not above 0, or all labels are the same.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> telling = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
        >>> silent = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
        >>> round(ridge_probe(telling, labels).item(), 3), round(ridge_probe(silent, labels).item(), 3)
        (0.99, 0.0)
    """
    if not ridge > 0:
        raise HoldfastError(f"The ridge of a probe is {ridge}; expected a number above 0.")
    z, y = _centred(features, labels)
    energy = z.square().sum()
    side = min(z.shape)
    # With constant features the numerator is 0, whatever lambda is.
    strength = torch.where(energy > 0, ridge * energy / side, torch.ones_like(energy))
    gram, right = _smaller_gram(z, y)
    # Non-finite features give nan, which the guard notices, and not an exception.
    factor, info = torch.linalg.cholesky_ex(gram + strength * torch.eye(side, dtype=z.dtype, device=z.device))
    solved = torch.cholesky_solve(right, factor)
    # In the N x N case: y' K (K + lambda)^-1 y = y'y - lambda y' (K + lambda)^-1 y.
    explained = y.square().sum() - strength * (y * solved).sum() if len(z) <= z.shape[1] else (right * solved).sum()
    share = torch.where(info == 0, explained / y.square().sum(), torch.full_like(energy, math.nan))
    return share.to(features.dtype)


def descended_probe(features: Tensor, labels: Tensor, steps: int) -> Tensor:
    """The share of the labels' energy that gradient descent on a linear probe has explained after t steps.

    With features Z and one-hot labels Y, both centred, w_0 = 0 and the step 1 / lambda_max of K = Z Z', the residual is
    Y_t = (I - K / lambda_max)^t Y, so that

        share = 1 - ||Y_t||^2 / ||Y||^2 = tr(Y' K S_2t(K) Y) / ||Y||^2,
        S_n(K) = sum over j < n of (I - K / lambda_max)^j / lambda_max,

    which needs neither inverse nor eigenvectors: S_2m = S_m + (I - K / lambda_max)^m S_m doubles n with two products,
    and as K S(K) = Z S(Z'Z) Z' the smaller Gram matrix is enough. With many steps it approaches the R2 of the closed
    form; few steps explain only what lies in directions of much energy. lambda_max is part of the adversary, and is not
    differentiated.

    Args:
        features: shape (N, D), floating point; the result is computed in float64.
        labels: shape (N,), int64; at least two different ones.
        steps: t, at least 1.

    Returns:
        A scalar of the dtype of ``features`` in [0, 1]: 0 where the features do not predict the labels.

    Raises:
        HoldfastError: if steps is below 1, or all labels are the same.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> slow = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [3.0, 1.0], [-3.0, 1.0]])  # the label is in the small one
        >>> [round(descended_probe(slow, labels, t).item(), 2) for t in (1, 10, 100)]
        [0.05, 0.43, 1.0]
    """
    if steps < 1:
        raise HoldfastError(f"The number of steps of a probe is {steps}; expected at least 1.")
    z, y = _centred(features, labels)
    gram, right = _smaller_gram(z, y)
    if not bool(gram.detach().isfinite().all()):
        return features.sum() * math.nan
    largest = torch.linalg.eigvalsh(gram.detach())[-1]
    if not largest > 0:
        return features.sum() * 0.0
    one = torch.eye(len(gram), dtype=z.dtype, device=z.device)
    power, total = one - gram / largest, one / largest  # for n = 1, the first binary digit of 2t
    step = power
    for digit in bin(2 * steps)[3:]:
        total, power = total + power @ total, power @ power
        if digit == "1":
            total, power = total + power / largest, power @ step
    if len(z) <= z.shape[1]:
        total = gram @ total
    share: Tensor = (right * (total @ right)).sum() / y.square().sum()
    return share.to(features.dtype)


def _smaller_gram(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Z Z' and Y if there are at most as many samples as features, else Z'Z and Z'Y."""
    return (z @ z.T, y) if len(z) <= z.shape[1] else (z.T @ z, z.T @ y)


def _centred(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features and one-hot labels (or values) of a batch, centred, float64."""
    z = features.to(torch.float64)
    if labels.dim() == 2:
        y = labels.to(torch.float64)
        return z - z.mean(0), y - y.mean(0)
    classes, index = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise HoldfastError("A probe needs samples of at least 2 classes; the batch has one. Take a larger batch.")
    y = F.one_hot(index, len(classes)).to(torch.float64)
    return z - z.mean(0), y - y.mean(0)


def distillation_loss(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) at temperature T: its gradient does not shrink with T.

    Args:
        logits: the student's logits, shape (N, C).
        wanted: the teacher's logits, of the same shape.
        temperature: T, above 0.

    Example:
        >>> distillation_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 3.0]]), 2.0).item()
        0.0
    """
    student, teacher = (F.log_softmax(z / temperature, -1) for z in (logits, wanted))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def negative_entropy(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """The mean of sum over j of p_j log p_j: TAR's loss, at its minimum where all classes are equally likely.

    Like KLU it has its minimum at the uniform distribution, but it is bounded: a wrong class that is certain costs 0,
    not more. Its gradient, p_i (log p_i - sum over j of p_j log p_j), vanishes at the minimum, and where the model is
    certain of one class.

    Args:
        logits: shape (..., C), floating point; the mean is over all axes but the last.
        labels: ignored; accepted so that all suppression losses are called alike.

    Returns:
        A scalar of the dtype of ``logits``, from -log C to 0; finite for any finite logits.

    Example:
        >>> even, certain = torch.zeros(1, 4), torch.tensor([[100.0, 0.0, 0.0, 0.0]])
        >>> round(negative_entropy(even).exp().item(), 4), abs(negative_entropy(certain).item()) < 1e-6
        (0.25, True)
    """
    log = F.log_softmax(logits, -1)
    return (log.exp() * log).sum(-1).mean()


def mmd(
    x: Tensor, y: Tensor, *, kernels: int = 5, multiplier: float = 2.0, bandwidth: Tensor | float | None = None
) -> Tensor:
    """Returns the squared maximum mean discrepancy of two batches of features, by a sum of Gaussian kernels.

    With k(u, v) = sum_i exp(-||u - v||^2 / s_i), i = 0..m-1, and s_i = s * q^(i - floor(m / 2)),

        MMD = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

    over all pairs, a sample with itself included (the biased estimate): never negative, and below 2 m. It is the
    squared norm of the difference of the mean embeddings; papers on NTL leave out "squared".

    Args:
        x: shape (N, D).
        y: shape (M, D).
        kernels: m.
        multiplier: q, from one kernel's width to the next.
        bandwidth: s; None: the mean of ||u - v||^2 over different samples of both batches, without its gradient, as
            usual; 1 if all samples are equal.

    Example:
        >>> near, far = torch.zeros(4, 2), torch.full((4, 2), 9.0)
        >>> float(mmd(near, near)), round(float(mmd(near, far)), 2)
        (0.0, 7.47)
    """
    z = torch.cat([x, y])
    z = z - z.detach().mean(0)  # otherwise small distances would be lost in the rounding of large products
    norms = z.square().sum(1)
    squared = (norms[:, None] + norms[None, :] - 2 * z @ z.T).clamp_min(0)
    if bandwidth is None:
        mean = squared.detach().sum() / max(len(z) * (len(z) - 1), 1)
        bandwidth = torch.where(mean > 0, mean, torch.ones_like(mean))
    widths = [bandwidth * multiplier ** (i - kernels // 2) for i in range(kernels)]
    kernel = sum((torch.exp(-squared / width) for width in widths), torch.zeros_like(squared))
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


@dataclass(frozen=True)
class Objective:
    """What a defender minimises at a simulated adversary: a loss of its logits, and the share that probes explain.

    Attributes:
        loss: of logits and labels, at every step; None: no such loss.
        probe_weight: of `ridge_probe` at the end of a simulation, counted once for each of its steps; 0: no probe.
        ridge: of that probe.
        probe_batch: samples that it is fitted on.
        probe_depth: number of last blocks whose features are probed; the mean over them counts.
    """

    loss: SuppressionLoss | None
    probe_weight: float = 0.0
    ridge: float = 0.01
    probe_batch: int = 250
    probe_depth: int = 1


LOSSES: Final[dict[str, SuppressionLoss]] = {
    "ice": inverse_cross_entropy,
    "klu": kl_from_uniform,
    "released": released_inverse_cross_entropy,
    "ce-ascent": cross_entropy_ascent,
    "dos": denial_of_service,
    "mse-ascent": squared_error_ascent,
}
"""Suppression losses by their names in recipes and on the command line."""

OF_DENOISING: Final = frozenset({"dos", "mse-ascent"})
"""The losses for denoisers; the others are for classifiers."""
