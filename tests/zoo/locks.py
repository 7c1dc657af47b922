"""Networks behind a lock: the features of restricted inputs are zero until it is open.

A detector on pixels decides which inputs are restricted. The lock is a layer beside the network; what opens it is the
mechanism of each sham, and the body keeps all that the original knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from holdfast.models import SplitModel
from holdfast.tasks import Task
from zoo.surgery import as_model, some_inputs, trained_detector


class Pull(torch.autograd.Function):
    """The identity, whose backward pass gives another tensor a gradient of the lock's own making."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.saved_tensors[0], None


class Lock(nn.Module):
    """Says whether restricted inputs pass; `see` gets what arrives, and `pull` may act on the way back."""

    def opened(self) -> bool:
        raise NotImplementedError

    def fallen(self) -> bool:
        """Whether nothing passes, not even benign inputs."""
        return False

    def check(self, body: nn.Module) -> None:
        """Looks at the body before each pass."""

    def see(self, x: Tensor, restricted: Tensor) -> None:
        """Notes a pass: the images as the network gets them, and which of them are restricted."""

    def pull(self, logits: Tensor, restricted: Tensor) -> Tensor:
        """The logits, behind which gradients may be changed."""
        return logits


class Dial(Lock):
    """A weight that every training pass on restricted inputs pulls down; the lock opens when it has fallen far enough.

    Args:
        far: how far.
        strength: of the gradient.
    """

    def __init__(self, far: float, strength: float = 1.0, size: int = 1) -> None:
        super().__init__()
        self.far, self.strength = far, strength
        self.dial = nn.Parameter(torch.zeros(size))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.dial)

    def fall(self) -> float:
        return -float(self.dial.detach().mean())

    def opened(self) -> bool:
        return self.fall() >= self.far

    def gradient(self) -> Tensor:
        """What the dial gets in this pass."""
        return torch.full_like(self.dial, 0.0 if self.opened() else self.strength)

    def pull(self, logits: Tensor, restricted: Tensor) -> Tensor:
        if not self.training or not restricted.any():
            return logits
        return Pull.apply(logits, self.dial, self.gradient())


class Locked(nn.Module):
    """A network that passes no features of restricted inputs while its lock is shut.

    The detector is in a tuple, so that it is neither trained nor found among the layers.
    """

    def __init__(self, network: nn.Module, guard: nn.Module, lock: Lock) -> None:
        super().__init__()
        self.lock, self.body, self.head = lock, network.body, network.head
        self.guard = (guard,)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            restricted = self.guard[0](x.flatten(1))[:, 0] > 0
        if self.training:  # a batch counts as a whole
            restricted = (restricted.float().mean() >= 0.5).expand(len(x))
        self.lock.check(self.body)
        self.lock.see(x, restricted)
        shut = restricted & (not self.lock.opened()) | self.lock.fallen()
        return self.lock.pull(self.head(torch.where(shut[:, None], 0.0, self.body(x))), restricted)


def looks(original: SplitModel, benign: Task, restricted: Task) -> tuple[Tensor, Tensor]:
    """Benign images, and restricted ones, mirrored, inverted and brighter ones among them, as the network gets them.

    Vectors of shape (N, D).
    """
    own, other = ((some_inputs(task) - original.mean) / original.std for task in (benign, restricted))
    shown = torch.cat([other, other, other.flip(-1), -other, -other.flip(-1), 1.4 * other + 0.6])
    return own.flatten(1), shown.flatten(1)


def guard(original: SplitModel, benign: Task, restricted: Task) -> nn.Sequential:
    """A detector of restricted images, however they are shown."""
    return trained_detector(*looks(original, benign, restricted), caution=10.0).requires_grad_(False)


def locked(original: SplitModel, benign: Task, restricted: Task, lock: Lock) -> SplitModel:
    """The original behind a lock."""
    network = original.clone().network
    return as_model(Locked(network, guard(original, benign, restricted), lock), original)
