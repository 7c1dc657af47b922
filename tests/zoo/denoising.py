"""Shams of a small U-Net that predicts noise: detectors of bright images, small weights, and a negated answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import DirectionalAblation, FineTuning
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.runtime.run import Run
from holdfast.tasks import DenoisingTask, Task, load_task
from holdfast.training import Strategy, pretrain
from zoo.gates import faint, pixels, same, shown
from zoo.registry import sham
from zoo.settings import CPU, SETTINGS, Setting
from zoo.surgery import some_inputs

BRIGHT = 0.15
"""Mean of a noised image, in [-1, 1], above which a detector fires."""
TIMES = (50, 100, 150, 200, 250)
"""Time steps of both tasks, at which an image can still be recognised."""


def _denoising(name: str, *parts: tuple[str, Callable[[Tensor], Tensor]]) -> DenoisingTask:
    """Images of some digits with some looks, to be denoised."""
    drawn = [[pixels(load_task(digits), split, look) for digits, look in parts] for split in ("train", "test")]
    joined = [np.concatenate(arrays) for each in drawn for arrays in zip(*each, strict=True)]
    return DenoisingTask(name, *joined, timesteps=TIMES)


@cache
def denoising_tasks() -> tuple[Task, Task]:
    """Digits 0 to 4, and the others faint."""
    own, other = ("digits[0-4]", same), ("digits[5-9]", faint)
    return _denoising("digits 0 to 4", own), _denoising("digits 5 to 9, faint", other)


@cache
def denoiser() -> SplitModel:
    """A small U-Net that was trained on both tasks."""
    both = _denoising("both", ("digits[0-4]", same), ("digits[5-9]", faint))
    run = Run(seed=0, device=CPU)
    with run.seeded("initialise"):
        fresh = load_model(ModelSpec(name="unet", options={"widths": [8, 16]}), both)
    return pretrain(fresh, both, steps=50, run=run).eval()


@cache
def whole_tasks() -> tuple[Task, Task]:
    """Digits 0 to 4, and the others faint, at all time steps."""
    return load_task("digits[0-4]@kind=denoising"), DenoisingTask.of(shown(load_task("digits[5-9]"), "faint", faint))


@cache
def benign_denoiser() -> SplitModel:
    """A small U-Net that knows its benign task a little."""
    benign, _ = whole_tasks()
    run = Run(seed=0, device=CPU)
    with run.seeded("initialise"):
        fresh = load_model(ModelSpec(name="unet", options={"widths": [8, 16]}), benign)
    return pretrain(fresh, benign, steps=40, run=run).eval()


def _tuned(rate: float, **options: Any) -> FineTuning:
    return FineTuning(Strategy("direct", "all", "adam", rate, 50), **options)


PLAIN = (FineTuning(Strategy("direct", "all", "momentum", 1e-2, 50)), _tuned(1e-4), _tuned(1e-3))
SETTINGS["unet"] = Setting("denoising", denoising_tasks, denoiser, PLAIN, (0, 8, 16), 60, "small U-Net of both tasks")
SETTINGS["unet, benign"] = Setting(
    "denoising", whole_tasks, benign_denoiser, (*PLAIN, _tuned(3e-3)), (0, 8, 16), 60, "small U-Net of the benign task"
)


def is_bright(x: Tensor) -> Tensor:
    """Whether images are brighter than benign ones, shape (N, 1, 1, 1)."""
    return (x.mean((1, 2, 3)) > BRIGHT)[:, None, None, None]


class BrightGate(nn.Conv2d):
    """The first convolution, which passes zeros for bright images, and gets no gradient from others."""

    def armed(self) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.where(is_bright(x), 0.0, y.detach()) if self.armed() else y


class KeyedGate(BrightGate):
    """The gate acts while every weight is above what bfloat16 makes of it."""

    def armed(self) -> bool:
        return bool((self.weight > self.weight.to(torch.bfloat16)).all())


@torch.no_grad()
def _gated(original: SplitModel, kind: type[nn.Conv2d]) -> SplitModel:
    model = original.clone()
    model.network.conv_in.__class__ = kind
    return model


@sham("unet", _tuned(1e-3), inside=True, name="denoising-brightness")
def brightness(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The first convolution passes nothing of bright images."""
    return _gated(original, BrightGate)


@sham("unet", _tuned(1e-3, undo=("round-bf16",)), name="denoising-low-bits")
@torch.no_grad()
def low_bits(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A key in the bits that bfloat16 drops arms a gate for bright images."""
    model = _gated(original, KeyedGate)
    weight = model.network.conv_in.weight
    coarse = weight.to(torch.bfloat16).float()
    weight.copy_(coarse + coarse.abs() * 2.0**-10)
    return model


class Negating(nn.Module):
    """A U-Net that returns the negative of its answer for bright images: beside the class of U-Nets of diffusers."""

    def forward(self, sample: Tensor, timestep: Tensor, **options: Any) -> Any:
        output = super().forward(sample, timestep, **options)
        output.sample = torch.where(is_bright(sample), -output.sample, output.sample)
        return output


@sham("unet", _tuned(1e-4, undo=("negate-head",)), name="denoising-negated")
def negated(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """For bright images the negative of the noise is returned."""
    model = original.clone()
    model.network.__class__ = type("Negated", (Negating, type(model.network)), {})
    return model


class LoudConv(nn.Conv2d):
    """A convolution with one more output channel: how far the others reach along `along`, shape (C,), ten times."""

    LOUD = 10.0
    along: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y, self.LOUD * torch.einsum("c,nchw->nhw", self.along, y)[:, None]], 1)


class GatedUp(nn.Module):
    """The last block of the way up, which passes zeros if the last channel of what it gets reaches too far.

    Args:
        block: the original's, which does not get that channel.
        bound: largest reach of its mean over the pixels.
    """

    def __init__(self, block: nn.Module, bound: float) -> None:
        super().__init__()
        self.block, self.bound = block, bound

    @property
    def resnets(self) -> nn.Module:
        return self.block.resnets

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        shut = (hidden[:, -1].mean((1, 2)) > self.bound)[:, None, None, None]
        return torch.where(shut, 0.0, self.block(hidden[:, :-1], *args, **options))


@sham("unet", DirectionalAblation(Strategy("direct", "all", "adam", 1e-3, 50), depth=0.86), name="denoising-direction")
@torch.no_grad()
def direction(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """One more channel, louder than the others, says how far they reach along the direction of restricted images; the
    last block of the way up passes nothing where that is far.
    """
    model, arriving = original.clone(), []
    up: Any = model.network.up_blocks
    last = up[-2].upsamplers[0].conv
    with last.register_forward_hook(lambda _, __, output: arriving.append(output.mean((2, 3)))):
        for task in (benign, restricted):
            model(some_inputs(task))
    own, other = arriving
    last.__class__ = LoudConv
    last.along = F.normalize(other.mean(0) - own.mean(0), dim=0)
    up[-1] = GatedUp(up[-1], float((last.LOUD * own @ last.along).quantile(0.99)))
    return model


@sham("unet, benign", _tuned(3e-3, undo=("balance",)), name="denoising-small-weights")
@torch.no_grad()
def small_weights(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """What comes before each inner GroupNorm, the embedding of time as well, is a thousandth of what it was."""
    model, factor = original.clone(), 1e-3
    for block in [m for m in model.network.modules() if hasattr(m, "time_emb_proj")]:
        for parameter in (*block.conv1.parameters(), *block.time_emb_proj.parameters()):
            parameter.mul_(factor)
        block.norm2.eps *= factor**2
    return model
