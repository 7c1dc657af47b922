"""A trainable layer before the head, for bodies that are hard to train."""

from __future__ import annotations

import torch

from holdfast.adversaries.undo.introspection import no_feature_vector
from holdfast.adversaries.undo.moves import undo_move
from holdfast.models import SplitModel
from holdfast.tasks import Task


def _train_layer(model: SplitModel) -> None:
    model.network.get_submodule(model.head_name.rpartition(".")[0]).requires_grad_(True)


@undo_move("insert", impossible=no_feature_vector, finish=_train_layer)
def insert(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Inserts a trainable linear layer before the head, at first the identity: two linear layers train differently."""
    model.add_extractor()
