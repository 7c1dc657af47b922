"""What defenses of text-to-image models share: which models and tasks they take, and the weights that read captions."""

from __future__ import annotations

from torch import nn

from holdfast.defenses.base import Defense
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, TextToImage, check_fits
from holdfast.tasks import Task, TextToImageTask


def check_captioned(
    defense: Defense, model: SplitModel, benign: Task, restricted: Task
) -> tuple[TextToImage, TextToImageTask, TextToImageTask]:
    """Returns a model and its tasks if they are what a defense of cross-attention takes.

    Args:
        defense: for messages.
        model: must be a text-to-image model.
        benign: must be images with captions.
        restricted: likewise.

    Raises:
        HoldfastError: for models and tasks of another kind, or that do not fit each other; and if no layer that makes
            keys or values of a caption may be changed.
    """
    for task in (benign, restricted):
        if not isinstance(task, TextToImageTask):
            raise HoldfastError(
                f"{defense.name} is for text-to-image models, whose tasks are images with captions "
                f"(NAME@kind=text-to-image); got {task.described}."
            )
    check_fits(model, benign, own_task=True)
    check_fits(model, restricted, own_task=False)
    if not isinstance(model, TextToImage) or not keys_and_values(model):
        raise HoldfastError(
            f"{defense.name}: {model.name} has no layer with trainable weights that makes keys or values of a "
            "caption's vectors; give a text-to-image model with cross-attention, and do not freeze it."
        )
    assert isinstance(benign, TextToImageTask)
    assert isinstance(restricted, TextToImageTask)
    return model, benign, restricted


def keys_and_values(model: TextToImage) -> list[nn.Linear]:
    """Returns the layers that make keys and values of captions, without those that the model's owner froze."""
    return [layer for layer in model.cross_attention().values() if layer.weight.requires_grad]
