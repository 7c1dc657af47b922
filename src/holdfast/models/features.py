"""What a head receives: the features of a task's samples, in order, as a linear probe would train on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.models.base import SplitModel
from holdfast.tasks import Task
from holdfast.tasks.base import Split

BATCH = 500
CPU = torch.device("cpu")


@torch.no_grad()
def feature_batches(model: SplitModel | None, task: Task, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields features and least-squares targets of a split, a batch at a time, in evaluation mode.

    Args:
        model: on the device to compute on; None: the inputs themselves, flattened (images in [0, 1]).
        task: the data.
        split: "train" or "test".

    Yields:
        Features of shape (N, D) and targets of shape (N, C), both float64; see `Task.targets`.

    Example:
        >>> from holdfast.tasks import load_task
        >>> x, y = next(feature_batches(None, load_task("digits[0-4]"), "test"))
        >>> x.shape, y.shape
        (torch.Size([223, 64]), torch.Size([223, 5]))
    """
    device = CPU if model is None else model.device
    training = model is not None and model.training
    if model is not None:
        model.eval()
    try:
        for batch in task.sweep(split, BATCH, device=device):
            found = batch.x.flatten(1) if model is None else model.features(batch.x)
            place = CPU if device.type == "mps" else device  # which has no float64
            yield found.to(place).to(torch.float64), task.targets(batch.y.to(place))
    finally:
        if model is not None:
            model.train(training)


def features(model: SplitModel | None, task: Task, split: Split) -> tuple[Tensor, Tensor]:
    """Returns all features and targets of a split; see `feature_batches`."""
    x, y = zip(*feature_batches(model, task, split), strict=True)
    return torch.cat(x), torch.cat(y)


def feature_precision(model: SplitModel | None, task: Task) -> float:
    """Returns eps of the arithmetic that features are computed in: the network's, or the inputs' own."""
    dtype = model.dtype if model is not None else next(task.sweep("train", 1, device=CPU)).x.dtype
    return torch.finfo(dtype).eps


@torch.no_grad()
def check_feature_width(model: SplitModel | None, task: Task) -> None:
    """Refuses a head that gets a map rather than a vector, on which a linear extractor would mix places.

    Args:
        model: None: inputs are the features.
        task: the model's own.

    Raises:
        HoldfastError: if a sample's features are more numbers than the head takes, or the task is denoising.
    """
    if task.kind == "denoising":
        raise HoldfastError(
            f"Task {task.name!r} is denoising: linear extractors and spectra are of tasks whose samples have a vector "
            "of features, and what a denoiser's head takes is an image. SOPHON is the defense for denoisers."
        )
    if model is None:
        return
    device = model.device
    training = model.training
    found = model.eval().features(next(task.sweep("train", 2, device=device)).x).shape[1]
    model.train(training)
    wanted = model.head.weight.shape[1]
    if found != wanted:
        raise HoldfastError(
            f"{model.name}: the head takes {wanted} features and gets {found} numbers a sample, a map over places. "
            "Linear extractors and spectra need the pooling before the head."
        )
