"""SOPHON's first rounds on smaller images, which cost less; the others are on images of the full size."""

from __future__ import annotations

import torch

from holdfast.defenses.base import Defense
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.tasks import InMemoryTask, Task


def on_small_images(defense: Defense, size: int, model: SplitModel, task: Task) -> Task:
    """Returns a task with smaller images, and the same samples and labels.

    Args:
        defense: for messages.
        size: pixels a side.
        model: must take images of this size.
        task: classification or regression of images.

    Raises:
        HoldfastError: if the task has no larger images, or the network is for one size of images alone.
    """
    shape = task.input_shape
    if not isinstance(task, InMemoryTask) or task.answers_with != "vector" or len(shape) != 3:
        raise HoldfastError(
            f"{defense.name}: small_size is {size}, which is for classification and regression of images; "
            f"{task.name} is not. Leave small_size and small_rounds out."
        )
    if size >= min(shape[1:]):
        raise HoldfastError(
            f"{defense.name}: small_size is {size}, and {task.name} has images of {shape[1]}x{shape[2]} pixels; "
            "expected a smaller size."
        )
    small = task.as_images(size)
    try:
        with torch.no_grad():
            model.clone().eval()(next(small.sweep("train", 2, device=model.device)).x)
    except (RuntimeError, ValueError, AssertionError) as error:  # what networks raise for a shape that does not fit
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise HoldfastError(
            f"{defense.name}: small_size is {size}, and {model.name} does not take such images ({first}). Leave "
            "small_size and small_rounds out, or give another size."
        ) from error
    return small
