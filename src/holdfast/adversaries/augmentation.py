"""Augmentation of images by RandAugment, as timm has it, for adversaries with few samples."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.tasks import Task


class Augmentation:
    """Changes each image of a batch by random operations: shifts, rotations, colours, contrast, and so on.

    Args:
        settings: of timm's `rand_augment_transform`, such as "rand-m9-n2": two operations of magnitude 9.
        generator: decides the operations.

    Raises:
        HoldfastError: if timm does not understand the settings.

    Example:
        >>> change = Augmentation("rand-m9-n2", torch.Generator().manual_seed(0))
        >>> change(torch.rand(4, 1, 8, 8)).shape
        torch.Size([4, 1, 8, 8])
    """

    def __init__(self, settings: str, generator: torch.Generator) -> None:
        from timm.data.auto_augment import rand_augment_transform

        try:
            self.transform: Any = rand_augment_transform(settings, {"img_mean": (128, 128, 128)})
        except Exception as error:  # timm checks its settings with assertions
            raise HoldfastError(
                f"augment is {settings!r}; expected settings of timm's RandAugment, such as 'rand-m9-n2'."
            ) from error
        self.generator = generator

    def __call__(self, x: Tensor) -> Tensor:
        """Returns images of the same shape, in [0, 1], in steps of 1/255.

        Args:
            x: shape (N, C, H, W) with one or three channels, in [0, 1].
        """
        from PIL import Image

        # timm draws from the global generators of Python and NumPy.
        kept = random.getstate(), np.random.get_state()  # noqa: NPY002
        seed = int(torch.randint(2**31, (), generator=self.generator))
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            pixels = (x.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
            colours = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
            changed = np.stack([np.asarray(self.transform(Image.fromarray(image))) for image in colours])
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002
        images = torch.from_numpy(changed).permute(0, 3, 1, 2)[:, : x.shape[1]]
        return (images / 255).to(x)


def no_images(task: Task) -> str | None:
    """Returns why a task has no images to augment, or None if it has."""
    if len(task.input_shape) == 3 and task.answers_with == "vector":
        return None
    return f"it augments images, and {task.described} has none to classify"
