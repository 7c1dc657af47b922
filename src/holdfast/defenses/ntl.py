"""NTL: non-transferable learning (Wang et al., ICLR 2022), the SOPHON paper's baseline B3.

The model unlearns the restricted task as it stands; nothing prepares it for somebody who goes on training. Of batches
(x_P, y_P) of the benign task and (x_H, y_H) of the restricted one, with features z and the one head of the model,

    L = KL_P - min(c, a KL_H) * min(c, b MMD(z_P, z_H)),        a = b = 0.1, c = 1.

KL is the divergence of the predictions from the labels: for one-hot labels, whose entropy is 0, the cross-entropy. So
the restricted labels are classes of the benign head, as they are numbered.

**Where the gradient vanishes.** Let A = min(c, a KL_H) and B = min(c, b MMD). Then

    dL/dKL_H = -a B  up to KL_H = c/a,  0 above;        dL/dMMD = -b A  up to MMD = c/b,  0 above.

1. Above KL_H = c/a (10 with the defaults) the restricted labels pull no more: confidently wrong is enough.
2. Above MMD = c/b (10) the features move apart no more. A kernel's part of the MMD is below 2, so with five kernels it
   never comes to that.
3. Above both, only the benign loss is left. L is never more than c^2 below it: the restricted part cannot run away.
4. Where one factor is 0, the other has no gradient: while the features of the two tasks coincide (MMD = 0), the
   restricted loss is not pushed up at all.

Nothing in L looks at what fine-tuning does. The features of the restricted task are moved, and an adversary who lowers
KL_H again starts from a trained network all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.defenses.base import Record
from holdfast.defenses.trainer import GuardedDefense, Immunization
from holdfast.errors import HoldfastError, unknown
from holdfast.models import SplitModel, check_fits
from holdfast.runtime.run import Run
from holdfast.tasks import Task
from holdfast.training import OPTIMIZERS


def squared_distances(z: Tensor) -> Tensor:
    """Returns ||z_i - z_j||^2, shape (N, N).

    Features are centred first: the products of large numbers would otherwise swallow small distances.
    """
    z = z - z.detach().mean(0)
    square = z.square().sum(1)
    return (square[:, None] + square[None, :] - 2 * z @ z.T).clamp_min(0)


def mean_distance(z: Tensor) -> Tensor:
    """Returns the mean of ||z_i - z_j||^2 over pairs i != j, without a graph; 1 where it is 0."""
    mean = squared_distances(z.detach()).sum() / max(len(z) * (len(z) - 1), 1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def mmd(
    x: Tensor, y: Tensor, *, kernels: int = 5, multiplier: float = 2.0, bandwidth: Tensor | float | None = None
) -> Tensor:
    """Returns the squared maximum mean discrepancy of two batches of features, by a sum of Gaussian kernels.

    With k(u, v) = sum_i exp(-||u - v||^2 / s_i), i = 0..m-1, and s_i = s * q^(i - floor(m / 2)),

        MMD = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

    over all pairs, a sample with itself included (the biased estimate): never negative, and below 2 m. It is the
    squared norm of the difference of the mean embeddings; the literature on NTL leaves "squared" out.

    Args:
        x: shape (N, D).
        y: shape (M, D).
        kernels: m.
        multiplier: q, from one kernel's width to the next.
        bandwidth: s; None: the mean of ||u - v||^2 over different samples of both batches, for which no gradient is
            taken, as usual.

    Example:
        >>> near, far = torch.zeros(4, 2), torch.full((4, 2), 9.0)
        >>> float(mmd(near, near)), round(float(mmd(near, far)), 2)
        (0.0, 7.47)
    """
    both = torch.cat([x, y])
    s = mean_distance(both) if bandwidth is None else bandwidth
    squared = squared_distances(both)
    kernel = sum(
        (torch.exp(-squared / (s * multiplier ** (i - kernels // 2))) for i in range(kernels)),
        torch.zeros_like(squared),
    )
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def ntl_loss(
    benign: Tensor, restricted: Tensor, distance: Tensor, *, alpha: float = 0.1, beta: float = 0.1, clamp: float = 1.0
) -> Tensor:
    """Returns L of the two tasks' losses and the features' MMD; see the module for where its gradient vanishes.

    Example:
        >>> values = torch.tensor(0.5), torch.tensor(4.0), torch.tensor(5.0)
        >>> round(float(ntl_loss(*values)), 6)  # 0.5 - 0.4 * 0.5
        0.3
    """
    return benign - (alpha * restricted).clamp_max(clamp) * (beta * distance).clamp_max(clamp)


@dataclass
class NTL(GuardedDefense):
    """NTL's hyper-parameters: the loss's are the paper's, and those of the training ours.

    Both batches pass through the network together: BatchNorm normalises them alike, as it will when the model is used.

    The guard keeps the last state whose held-out benign score was good enough. A low score on the way is no reason to
    go back, because L holds the benign loss, which repairs it; but at the end only a good state is returned.

    Attributes:
        iterations: steps of the optimizer.
        learning_rate: its rate.
        optimizer: a name of `holdfast.training.OPTIMIZERS`.
        weight_decay: at least 0.
        batch_size: samples of each of the two tasks in a step.
        alpha: a, weight of the restricted loss (the paper: 0.1).
        beta: b, weight of the MMD (the paper: 0.1).
        clamp: c, upper bound of both factors (the paper: 1).
        kernels: Gaussian kernels of the MMD (the paper: 5).
        multiplier: from one kernel's width to the next (the paper: 2).
        guard: watch for non-finite values, after which it goes back and halves the rate, and for the benign score;
            without it, a non-finite value ends the defense.
        guard_every: steps between two looks at the benign score.
        max_benign_drop: how far the held-out benign score may fall below the original's in a good state.
        max_rollbacks: the guard gives up after as many; the last good state is then the result.
        holdout: share of the benign training data kept back for the guard.

    Raises:
        HoldfastError: for a value out of range.
    """

    name: ClassVar[str] = "ntl"
    citation: ClassVar[str] = (
        "Wang et al., Non-Transferable Learning: A New Approach for Model Ownership Verification and Applicability "
        "Authorization, ICLR 2022"
    )

    iterations: int = 300
    learning_rate: float = 1e-4
    optimizer: str = "adam"
    weight_decay: float = 0.0
    batch_size: int = 64
    alpha: float = 0.1
    beta: float = 0.1
    clamp: float = 1.0
    kernels: int = 5
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        self.refuse_below_one("batch_size", "kernels")
        self.refuse_not_above_zero("learning_rate", "alpha", "beta", "clamp", "multiplier")
        if not 0 <= self.weight_decay < math.inf:
            raise HoldfastError(f"ntl: weight_decay is {self.weight_decay}; expected a number of at least 0.")

    def immunize(self, model: SplitModel, benign: Task, restricted: Task, *, run: Run) -> tuple[SplitModel, Record]:
        """Trains a copy of the model with L; see `Defense.immunize`.

        With a folder in `run`, the state is saved every `guard_every` steps and a second call continues from there, to
        the same result.

        Raises:
            HoldfastError: if model and tasks do not fit, the restricted task has more classes than the head has
                outputs, or the folder holds the state of another immunization.
        """
        if not (benign.labels_are_classes and restricted.labels_are_classes):
            raise HoldfastError(f"ntl: it is for classification; got {benign.described} and {restricted.described}.")
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
        if restricted.num_outputs > model.num_outputs:
            raise HoldfastError(
                f"ntl: the restricted task {restricted.name!r} has {restricted.num_outputs} classes and the head, of "
                f"the benign task {benign.name!r}, {model.num_outputs} outputs: restricted labels are classes of "
                f"this head. Keep at most {model.num_outputs} restricted classes with NAME[...], or another defense."
            )
        if restricted.input_shape != benign.input_shape:
            raise HoldfastError(
                f"ntl: inputs of {benign.name!r} have shape {benign.input_shape} and of {restricted.name!r} "
                f"{restricted.input_shape}; both pass through the network together. Set image_size and channels."
            )
        return _Immunization(self, model, benign, restricted, run, rate=self.learning_rate).finish()


class _Immunization(Immunization[NTL]):
    """One run of NTL; a round is a step."""

    title = "NTL"
    series = ("restricted_loss", "benign_loss", "mmd")
    shown = ("restricted_loss",)

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See `Immunization.make_optimizers`."""
        moved = [p for p in self.model.parameters() if p.requires_grad]
        return {"optimizer": OPTIMIZERS[self.config.optimizer](moved, self.rate, self.config.weight_decay)}

    def one_round(self, generator: torch.Generator) -> dict[str, list[float]]:
        """A step on a fresh batch of each task."""
        config = self.config
        benign, restricted = (
            next(task.batches("train", config.batch_size, generator=generator, device=self.run.device))
            for task in (self.benign, self.restricted)
        )
        self.training_mode()
        logits, features = self.model.with_features(torch.cat([benign.x, restricted.x]))
        n = len(benign.x)
        benign_loss = F.cross_entropy(logits[:n], benign.y)
        restricted_loss = F.cross_entropy(logits[n:], restricted.y)
        distance = mmd(features[:n], features[n:], kernels=config.kernels, multiplier=config.multiplier)
        loss = ntl_loss(
            benign_loss, restricted_loss, distance, alpha=config.alpha, beta=config.beta, clamp=config.clamp
        )
        optimizer = self.optimizers["optimizer"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.pool_gradients()
        optimizer.step()
        values = {"restricted_loss": restricted_loss, "benign_loss": benign_loss, "mmd": distance}
        return {name: [float(value.detach())] for name, value in values.items()}

    def too_low(self, why: str) -> bool:
        """See `Immunization.too_low`: only what is released must be good."""
        if self.last:
            self.restore_good()
            self.say(f"{why}: the last good state is the result")
            self.record.completed = False
        return self.last
