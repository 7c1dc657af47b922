"""SOPHON on the last blocks of a network alone: the others are frozen, and run once for all rounds."""

from __future__ import annotations

from typing import NamedTuple

import torch

from holdfast.defenses.base import Defense
from holdfast.errors import HoldfastError
from holdfast.models import FrozenActivations, SplitModel
from holdfast.models.activation_cache import Remainder
from holdfast.tasks import Task

_TRIED = 8
"""Number of samples of each task that test whether the frozen blocks can be skipped."""


class Remaining(NamedTuple):
    """What is left to immunize behind the frozen blocks.

    Attributes:
        model: the trained blocks and the head, whose inputs are activations; it holds the network itself.
        benign: the benign task on activations, in its training split.
        restricted: likewise.
    """

    model: SplitModel
    benign: Task
    restricted: Task

    @staticmethod
    def whole(model: SplitModel) -> SplitModel:
        """Returns the network that a model like `model` holds, with its frozen blocks."""
        assert isinstance(model.network, Remainder)
        return model.network.model


def check_trained_blocks(defense: Defense, blocks: int, model: SplitModel, benign: Task) -> None:
    """Refuses a number of trained blocks that a model does not have, or a task whose activations cannot be kept.

    Raises:
        HoldfastError: with the number of blocks that the model has.
    """
    if benign.answers_with != "vector":
        raise HoldfastError(
            f"{defense.name}: blocks is {blocks}, which is for classifiers and regression models; {benign.described} "
            "needs all of the network. Leave blocks out."
        )
    count = len(model.blocks())
    if not blocks < count:
        raise HoldfastError(
            f"{defense.name}: blocks is {blocks}, and the body of {model.name} has {count}; give a number below that, "
            "or leave blocks out to train all of them."
        )


def behind_frozen_blocks(
    defense: Defense, blocks: int, cache_gib: float, model: SplitModel, benign: Task, restricted: Task
) -> Remaining:
    """Returns the last blocks of a model, and the tasks on what the frozen blocks before them compute.

    Args:
        defense: for messages.
        blocks: how many blocks of the body are trained.
        cache_gib: refuse to keep more than this.
        model: on the device that computes the activations; a copy of it is trained.
        benign: its training samples run through the frozen blocks.
        restricted: likewise.

    Raises:
        HoldfastError: if the activations of this network cannot be kept, or need more memory.
    """
    model = model.clone().eval()
    frozen = model.blocks()[:-blocks]
    for _, layer in (each for block in frozen for each in block):
        layer.requires_grad_(False)
    batches = [next(task.sweep("train", _TRIED, device=model.device)) for task in (benign, restricted)]
    try:
        prefix = FrozenActivations(model, frozen, torch.cat([batch.x for batch in batches]))
    except ValueError as error:
        raise HoldfastError(
            f"{defense.name}: blocks is {blocks}, but the outputs of the frozen blocks of {model.name} cannot be kept: "
            f"{error}. Leave blocks out."
        ) from error
    needed = (prefix.size(benign, "train") + prefix.size(restricted, "train")) / 2**30
    if needed > cache_gib:
        raise HoldfastError(
            f"{defense.name}: the outputs of the frozen blocks need {needed:.1f} GiB, more than cache_gib, which is "
            f"{cache_gib:g}; raise it, limit the benign training samples (train_limit), or set other blocks."
        )
    return Remaining(prefix.remainder(model), prefix.task(benign, "train"), prefix.task(restricted, "train"))
