"""Undoing answers that were turned around: a model that gives every class but the right one knows the right one."""

from __future__ import annotations

import torch

from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.tasks import Task


@undo_move("negate-head", weights_only=True)
@torch.no_grad()
def negate_head(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Multiplies the head by -1: the class that it found least likely becomes the answer.

    It matters where fine-tuning keeps the head ("direct"); a fresh head takes its place otherwise.
    """
    for parameter in model.head.parameters():
        parameter.neg_()
