"""NTL: non-transferable learning (Wang et al., ICLR 2022), the SOPHON paper's baseline B3.

The model unlearns the restricted task; fine-tuning is not simulated. For batches (x_P, y_P) of the benign task and
(x_H, y_H) of the restricted one, with features z and the one head of the model,

    L = KL_P - min(c, a KL_H) * min(c, b MMD(z_P, z_H)),        a = b = 0.1, c = 1.

KL is the divergence of the predictions from the labels. One-hot labels have entropy 0, so KL is the cross-entropy.
Restricted label i stands for class i of the benign head.

**Where the gradient vanishes.** Let A = min(c, a KL_H) and B = min(c, b MMD). Then

    dL/dKL_H = -a B  up to KL_H = c/a,  0 above;        dL/dMMD = -b A  up to MMD = c/b,  0 above.

1. Above KL_H = c/a (10 with the defaults) the restricted loss has no gradient: confidently wrong is enough.
2. Above MMD = c/b (10) the features do not move further apart. Each kernel adds less than 2 to the MMD, so that five
   kernels never reach this bound.
3. Above both bounds, only the benign loss is left. L is at most c^2 below it: the restricted part is bounded.
4. Where one factor is 0, the other has no gradient: while the features of the two tasks coincide (MMD = 0), the
   restricted loss does not rise.

L does not simulate fine-tuning. It moves the features of the restricted task, but an adversary that lowers KL_H again
still starts from a trained network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.defenses.base import DefenseRecord
from holdfast.defenses.guard import GuardedDefense
from holdfast.defenses.registry import register_defense
from holdfast.defenses.trainer import Immunization
from holdfast.errors import HoldfastError
from holdfast.losses import mmd
from holdfast.models import SplitModel, check_fits
from holdfast.runtime.run import Run
from holdfast.tasks import Task
from holdfast.training import OPTIMIZERS


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


@register_defense
@dataclass
class NTL(GuardedDefense):
    """Hyper-parameters of NTL. Those of the loss are the paper's, those of the training are ours.

    A round is a step of the optimizer. Both batches pass through the network together: BatchNorm normalises them alike,
    as it will when the model is used.

    The guard does not go back when the benign score is low during training, because the benign loss in L repairs it.
    The result is always a state whose held-out benign score was good enough. See `GuardedDefense` for the other
    settings.

    Attributes:
        learning_rate: of the optimizer.
        optimizer: a name of `holdfast.training.OPTIMIZERS`.
        weight_decay: at least 0.
        batch_size: samples of each of the two tasks in a step.
        alpha: a, weight of the restricted loss (the paper: 0.1).
        beta: b, weight of the MMD (the paper: 0.1).
        clamp: c, upper bound of both factors (the paper: 1).
        kernels: Gaussian kernels of the MMD (the paper: 5).
        multiplier: ratio of one kernel's width to that of the one before (the paper: 2).

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
        self.refuse_unknown("optimizer", OPTIMIZERS)
        self.refuse_below_one("batch_size", "kernels")
        self.refuse_not_above_zero("learning_rate", "alpha", "beta", "clamp", "multiplier")
        self.refuse_negative("weight_decay")

    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, *, run: Run
    ) -> tuple[SplitModel, DefenseRecord]:
        """Trains a copy of the model with L; see `Defense.immunize`.

        With a folder in `run`, the state is saved every `guard_every` steps. A second call continues from there and
        gives the same result.

        Raises:
            HoldfastError: if model and tasks do not fit, the restricted task has more classes than the head has
                outputs, or the folder holds the state of another immunization.
        """
        if not (benign.labels_are_classes and restricted.labels_are_classes):
            raise HoldfastError(f"ntl is for classification; got {benign.described} and {restricted.described}.")
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
        if restricted.num_outputs > model.num_outputs:
            raise HoldfastError(
                f"ntl: the restricted task {restricted.name!r} has {restricted.num_outputs} classes, but the head of "
                f"the benign task {benign.name!r} has only {model.num_outputs} outputs, which serve both tasks. Keep "
                f"at most {model.num_outputs} restricted classes with NAME[...], or use another defense."
            )
        if restricted.input_shape != benign.input_shape:
            raise HoldfastError(
                f"ntl: inputs of {benign.name!r} have shape {benign.input_shape}, those of {restricted.name!r} "
                f"{restricted.input_shape}, and both pass through the network together; set image_size and channels."
            )
        return _Immunization(self, model, benign, restricted, run, rate=self.learning_rate).finish()


class _Immunization(Immunization[NTL]):
    """One run of NTL; a round is a step."""

    title = "NTL"
    series = ("restricted_loss", "benign_loss", "mmd")
    shown = ("restricted_loss",)

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return {"optimizer": OPTIMIZERS[self.config.optimizer](trained, self.rate, self.config.weight_decay)}

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
        self.average_gradients()
        optimizer.step()
        values = {"restricted_loss": restricted_loss, "benign_loss": benign_loss, "mmd": distance}
        return {name: [float(value.detach())] for name, value in values.items()}

    def too_low(self, why: str) -> bool:
        """See `Immunization.too_low`; only the final state must be good."""
        if self.go_back_at_the_end(why):
            self.record.completed = False
        return self.last
