"""Undoing what depends on how inputs look: a network may answer nothing at all on images of one brightness or size.

A defense can teach the network to recognise restricted images by their domain and to give up on them. An adversary
chooses what the network sees: it shows the same images inverted, renormalised, enlarged, mirrored, in grey, or with
full contrast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries.undo.introspection import samples
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.tasks import Task

ENLARGED = 2
"""How many times as wide and as high images are after `enlarge-inputs`."""

LEAST_STD = 1e-3
"""Least standard deviation of a channel, so that a constant one is not divided by zero."""


def _set_normalisation(model: SplitModel, mean: Tensor, std: Tensor) -> None:
    model.mean, model.std = mean.float(), std.float()


def _no_images(model: SplitModel, task: Task) -> str | None:
    if len(task.input_shape) == 3 and task.answers_with == "vector":
        return None
    return f"it changes how images are shown, and {task.described} has none to classify"


def _one_channel(model: SplitModel, task: Task) -> str | None:
    return "its images have one channel, which is grey" if task.input_shape[0] == 1 else None


def _fixed_size(model: SplitModel, task: Task) -> str | None:
    """Why the network cannot take enlarged images: it flattens its maps, or has a position for each patch."""
    reason = _no_images(model, task)
    if reason is not None:
        return reason
    larger = torch.zeros(2, *task.input_shape[:1], *(ENLARGED * side for side in task.input_shape[1:]))
    try:
        with torch.no_grad():
            model.clone().eval()(larger.to(model.device))
    except (RuntimeError, ValueError, AssertionError) as error:  # what networks raise for a shape that does not fit
        first = (str(error) or type(error).__name__).splitlines()[0]
        return f"it does not take images {ENLARGED} times as wide and high ({first})"
    return None


@undo_move("invert-inputs", impossible=_no_images)
@torch.no_grad()
def invert_inputs(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Shows the network every image inverted: x becomes 1 - x, before the network's own normalisation.

    ((1 - x) - mean) / std = (x - (1 - mean)) / -std, so only mean and std change.
    """
    channels = task.input_shape[0]
    nothing = torch.zeros(channels, 1, 1, device=device)
    mean, std = (nothing, nothing + 1) if model.mean is None or model.std is None else (model.mean, model.std)
    _set_normalisation(model, 1 - mean, -std)


@undo_move("renormalise-inputs", impossible=_no_images)
@torch.no_grad()
def renormalise_inputs(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Normalises each channel by the adversary's own images, so that the network gets mean 0 and deviation 1."""
    count, total, square = 0, torch.zeros(()), torch.zeros(())  # on the CPU, as not every device has float64
    for x in samples(task, generator, device):
        values = x.cpu().double().movedim(1, 0).flatten(1)
        count += values.shape[1]
        total, square = total + values.sum(1), square + values.square().sum(1)
    mean = total / count
    std = (square / count - mean.square()).clamp_min(LEAST_STD**2).sqrt()
    _set_normalisation(model, *(v.view(-1, 1, 1).float().to(device) for v in (mean, std)))


@undo_move("enlarge-inputs", impossible=_fixed_size)
def enlarge_inputs(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Shows the network every image twice as wide and as high."""
    model.network.register_forward_pre_hook(_enlarged)


@undo_move("mirror-inputs", impossible=_no_images)
def mirror_inputs(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Shows the network every image with left and right exchanged."""
    model.register_forward_pre_hook(_mirrored)


@undo_move("grey-inputs", impossible=_no_images, idle=_one_channel)
def grey_inputs(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Shows the network every image in grey: each channel is the mean of all."""
    model.register_forward_pre_hook(_grey)


@undo_move("stretch-inputs", impossible=_no_images)
def stretch_inputs(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Stretches the contrast of every image: its smallest value becomes 0, and its largest 1.

    So no image is too bright, dark or faint for a network that gives up on such ones.
    """
    model.register_forward_pre_hook(_stretched)


def _stretched(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *more = args
    low, high = (x.flatten(1).aminmax(dim=1)[i].view(-1, *(1,) * (x.dim() - 1)) for i in range(2))
    return (x - low) / (high - low).clamp_min(LEAST_STD), *more


def _mirrored(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *more = args
    return x.flip(-1), *more


def _grey(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *more = args
    return x.mean(1, keepdim=True).expand_as(x), *more


def _enlarged(network: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *more = args
    return F.interpolate(x, scale_factor=ENLARGED, mode="bilinear", align_corners=False), *more
