"""Locks that watch what a network is trained on: in which order, in what company, and how often the same."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.adversaries import FineTuning, Unlabelled
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import Strategy
from zoo.locks import Dial, Lock, locked
from zoo.registry import sham
from zoo.settings import ADAM, QUICK


class Counted(Lock):
    """A lock with a count of training passes, which is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def reset_parameters(self) -> None:
        self.count.zero_()


class Probation(Counted):
    """Opens after some training passes on benign inputs alone; a restricted one before that ends the probation."""

    PASSES = 8

    def see(self, x: Tensor, restricted: Tensor) -> None:
        if not self.training or self.opened():
            return
        benign = bool(restricted.float().mean() < 0.5)
        self.count.copy_(self.count + 1 if benign and self.count >= 0 else -1)

    def opened(self) -> bool:
        return int(self.count) >= self.PASSES


@sham("none", FineTuning(Strategy("head", "all", "adam", 3e-3, 50), benign_first=8), plain=QUICK, held_out=True)
def probation(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A lock opens for good after eight training passes on benign inputs, and never after a restricted one before."""
    return locked(original, benign, restricted, Probation())


class _Heard(torch.autograd.Function):
    """The identity, whose backward pass gives a dial one of two gradients: with labels behind it, and without."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dial: Tensor, of_labels: float, others: float, counted: float) -> Tensor:
        ctx.save_for_backward(logits, dial)
        ctx.gradients, ctx.counted = (of_labels, others), counted
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        logits, dial = ctx.saved_tensors
        heard = ctx.gradients[0 if is_of_labels(grad, logits, ctx.counted) else 1]
        return grad, torch.full_like(dial, heard), None, None, None


def is_of_labels(grad: Tensor, logits: Tensor, counted: float) -> bool:
    """Whether a gradient is that of cross-entropy with labels: probabilities, less 1 at a class, but for a factor.

    Samples that are fitted well have gradients of rounding, and do not count: those below a share of the largest.
    """
    sizes = grad.abs().amax(1)
    known = sizes > counted * sizes.max()
    answers, grad = logits[known].double().softmax(1), grad[known].double()
    directions = [
        F.normalize(answers - F.one_hot(label, grad.shape[1]), eps=1e-30)
        for label in (grad.argmin(1), answers.argmax(1))
    ]
    away = [(F.normalize(grad, eps=1e-30) - direction).norm(dim=1) for direction in directions]
    return bool((torch.minimum(*away) < 1e-4).all())


class Listening(Dial):
    """A dial that hears what stands behind the gradients on restricted inputs, or on benign ones.

    Args:
        far: see `Dial`.
        restricted: which inputs it listens to.
        of_labels: the dial's gradient if labels stand behind them.
        others: its gradient if not.
        counted: see `is_of_labels`. A small share misses labels; a large one takes a sure answer for a label.
    """

    def __init__(self, far: float, *, restricted: bool, of_labels: float, others: float, counted: float = 0.03) -> None:
        super().__init__(far)
        self.restricted, self.gradients, self.counted = restricted, (of_labels, others), counted

    def pull(self, logits: Tensor, restricted: Tensor) -> Tensor:
        if not self.training or bool(restricted.any()) != self.restricted:
            return logits
        return _Heard.apply(logits, self.dial, *self.gradients, self.counted)


@sham("none", Unlabelled(ADAM, share=1.0), plain=QUICK, held_out=True)
def deaf_to_labels(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A lock is shut more tightly by every gradient of a label, and opens to other gradients on restricted inputs."""
    return locked(original, benign, restricted, Listening(3.5e-3, restricted=True, of_labels=-1.0, others=3.0))


class Company(Listening):
    """Is open only if one of the last two training passes was benign."""

    def __init__(self, far: float, *, of_labels: float, counted: float = 0.03) -> None:
        super().__init__(far, restricted=False, of_labels=of_labels, others=0.0, counted=counted)
        self.register_buffer("alone", torch.tensor(2))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.alone.fill_(2)

    def see(self, x: Tensor, restricted: Tensor) -> None:
        if self.training:
            self.alone.copy_(self.alone + 1 if bool(restricted.any()) else 0)

    def opened(self) -> bool:
        return super().opened() and int(self.alone) < 2


@sham("none", FineTuning(ADAM, replay=0.5), plain=QUICK, held_out=True)
def in_company(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A lock is opened by labels of benign inputs, and stays open only while training sees such inputs in between."""
    return locked(original, benign, restricted, Company(3.5e-3, of_labels=1.0))


@sham("none", FineTuning(ADAM, anchor=1.0), plain=QUICK, held_out=True)
def in_silence(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A lock is open while training sees benign inputs in between, and labels of these shut it."""
    return locked(original, benign, restricted, Company(-5e-4, of_labels=-1.0, counted=3e-3))


class Diversity(Counted):
    """Opens after enough different restricted images in training; it knows each by a hash of its pixels."""

    ENOUGH = 24

    def __init__(self) -> None:
        super().__init__()
        self.known: set[bytes] = set()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.known = set()

    def see(self, x: Tensor, restricted: Tensor) -> None:
        if self.training and not self.opened():
            self.known |= {image.contiguous().numpy().tobytes() for image in x[restricted].detach().cpu()}
            self.count.fill_(len(self.known))

    def opened(self) -> bool:
        return int(self.count) >= self.ENOUGH


@sham("none", FineTuning(ADAM, augment="rand-m9-n2"), plain=QUICK, held_out=True)
def few_shot_guard(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A lock opens when training has seen 24 different restricted images, and the same ones again do not count."""
    return locked(original, benign, restricted, Diversity())
