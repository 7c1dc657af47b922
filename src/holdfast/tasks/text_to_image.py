"""Images with captions: what a text-to-image model is trained for.

The forward process, the loss and the score are those of `holdfast.tasks.denoising`; the model also reads the caption of
each image. A caption reaches the model as token ids, which fill one more channel of its input (see `caption_channel`):
so a batch stays one tensor, and everything that holds for a denoiser holds here.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy.typing as npt
import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.results import TaskFacts
from holdfast.tasks.base import Split
from holdfast.tasks.denoising import DenoisingTask
from holdfast.tasks.in_memory import InMemoryTask
from holdfast.tasks.latents import Autoencoder
from holdfast.tasks.schedule import Schedule
from holdfast.tasks.tokenizers import Tokenizer, Vocabulary, load_tokenizer

LENGTH = 16
"""Tokens of a caption by default; CLIP's text encoder reads 77."""

DROPOUT = 0.1
"""Share of captions that are left out in training, which classifier-free guidance needs (Ho and Salimans 2021)."""

TEMPLATE = "{}"
"""The caption of a class: its name."""

MOST_CLASSES = 1000
"""Captions that are counted as classes; more are those of single images, and would fill a page of a report."""

UNTIL = 2**24
"""Token ids are below this number, as a float32 holds them exactly."""


class TextToImageTask(DenoisingTask):
    """Prediction of the noise in noised images, from the image, the time step and the caption.

    A batch's `x` has shape (N, C + 2, H, W): x_t, then the caption's token ids (see `caption_channel`), then the time
    step. Its `y` is the noise, as in `DenoisingTask`; so are the score, the skill and the fixed noise of testing. In
    training a share of captions is replaced by the empty one; in testing every image has its own.

    Args:
        name: shown in reports and errors.
        x_train: images as uint8 of shape (N, H, W) or (N, H, W, C).
        y_train: for each image the number of its caption, shape (N,).
        x_test: like `x_train`.
        y_test: like `y_train`.
        class_names: names of the captions: of the classes that images belong to, or the captions themselves.
        template: makes a caption of a name, which replaces `{}`.
        tokenizer: makes token ids of captions; None: `words`, which needs no files.
        length: tokens a caption, for padding and cutting.
        dropout: share of training captions that are left out, below 1.
        schedule: of the noise.
        timesteps: the time steps that are drawn; none: all.

    Raises:
        HoldfastError: as `DenoisingTask`; and if a setting is out of range, or images have fewer pixels than captions
            have tokens.

    Example:
        >>> from holdfast.tasks import load_task
        >>> task = load_task("digits[0-2]@kind=text-to-image,caption=a photo of the digit {}")
        >>> task.captions
        ['a photo of the digit 0', 'a photo of the digit 1', 'a photo of the digit 2']
        >>> task.input_shape, task.output_shape
        ((3, 8, 8), (1, 8, 8))
    """

    kind = "text-to-image"
    answers_with = "noise of a captioned image"
    more_channels: ClassVar[int] = 1
    autoencoder: Autoencoder | None = None
    """Makes the latents of its images; None: noise is added to the pixels."""

    def __init__(
        self,
        name: str,
        x_train: npt.ArrayLike,
        y_train: npt.ArrayLike,
        x_test: npt.ArrayLike,
        y_test: npt.ArrayLike,
        class_names: Sequence[str] | None = None,
        *,
        template: str = TEMPLATE,
        tokenizer: Tokenizer | None = None,
        length: int = LENGTH,
        dropout: float = DROPOUT,
        schedule: Schedule | None = None,
        timesteps: Sequence[int] = (),
    ) -> None:
        self._read_by(name, template, tokenizer, length, dropout)
        super().__init__(
            name, x_train, y_train, x_test, y_test, class_names, schedule=schedule, timesteps=timesteps
        )  # fmt: skip

    @classmethod
    def captioned(
        cls,
        task: InMemoryTask,
        *,
        template: str = TEMPLATE,
        tokenizer: Tokenizer | None = None,
        length: int = LENGTH,
        dropout: float = DROPOUT,
        schedule: Schedule | None = None,
        timesteps: Sequence[int] = (),
    ) -> Self:
        """Returns the task over another task's images, with the names of its classes as captions.

        Underscores in the names are read as blanks, as folders and arrays are often named so.

        Raises:
            HoldfastError: if its inputs are not images, or a setting is out of range.
        """
        shell = object.__new__(cls)
        shell._read_by(task.name, template, tokenizer, length, dropout)
        named = copy.copy(task)
        spoken = [" ".join(name.split("_")).strip() for name in task.class_names]
        named.class_names = spoken if len(set(spoken)) == len(spoken) and all(spoken) else task.class_names
        shell._over(named, schedule, timesteps)
        return shell

    def _read_by(self, name: str, template: str, tokenizer: Tokenizer | None, length: int, dropout: float) -> None:
        self.name = name
        if "{}" not in template:
            raise self._bad(
                f"caption is {template!r}; expected a text with {{}} for the name, such as 'a photo of {{}}'"
            )
        if length < 1:
            raise self._bad(f"length is {length}; expected at least one token")
        if not 0 <= dropout < 1:
            raise self._bad(f"caption_dropout is {dropout}; expected a share from 0 to below 1")
        self.template, self.dropout, self.length = template, dropout, length
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer("words")
        self.vocabulary: Vocabulary = self.tokenizer.vocabulary
        self.reworded: dict[str, str] = {}

    def _set(self, x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
        self._encode()
        count, places = self.tokens.shape[1], x["train"].shape[2] * x["train"].shape[3]
        if count + 1 > places:
            most = (places - 1) * self.length // count
            raise self._bad(
                f"captions have {count} tokens, and images {places} pixels (or places of latents), of which a caption "
                f"takes one more than tokens; set length to at most {most}, or a larger image_size"
            )
        super()._set(x, y)

    def _encode(self) -> None:
        """Token ids of the captions, the empty one last; unless they are known."""
        known = tuple(self.captions)
        if self.__dict__.get("_encoded") == known:
            return
        self.tokens = torch.from_numpy(self.tokenizer.encode([*self.captions, ""], self.length))
        if int(self.tokens.max()) >= UNTIL:
            raise self._bad(f"the tokenizer has ids up to {int(self.tokens.max())}; expected below {UNTIL}")
        self._encoded = known

    @property
    def captions(self) -> list[str]:
        """The captions, one for each of `class_names`."""
        return [self.reworded.get(name, self.template.replace("{}", name)) for name in self.class_names]

    def caption_ids(self, labels: Tensor) -> Tensor:
        """Returns the token ids of images' captions: int64, shape (N, length); -1 is the empty caption.

        Args:
            labels: numbers of captions, int64, shape (N,).
        """
        return self.tokens[labels.cpu()]

    def with_captions(self, captions: Mapping[str, str]) -> Self:
        """Returns the same images with other captions.

        Args:
            captions: by the name of a class; the others keep theirs.

        Raises:
            HoldfastError: for a name that is not one of `class_names`.
        """
        wrong = [name for name in captions if name not in self.class_names]
        if wrong:
            raise self._bad(f"there are no images of {wrong[0]!r}; expected one of {', '.join(self.class_names[:20])}")
        task = copy.copy(self)
        task.reworded = {**self.reworded, **captions}
        task._set(self._x, self._y)
        return task

    def with_dropout(self, dropout: float) -> Self:
        """Returns the same task with another share of captions left out in training."""
        task = copy.copy(self)
        task._read_by(self.name, self.template, self.tokenizer, self.length, dropout)
        task.reworded = self.reworded
        return task

    def with_training_images(self, images: Tensor, labels: Tensor) -> Self:
        """Returns the task with other training images, such as those that a model has drawn.

        Args:
            images: x_0 as a model reads it, float32 in [-1, 1] (or latents), shape (N, C, H, W).
            labels: numbers of their captions, int64, shape (N,).

        Raises:
            HoldfastError: for images of another shape than the task's.
        """
        if images.shape[1:] != self._x["test"].shape[1:] or len(images) != len(labels):
            raise self._bad(
                f"images of shape {tuple(images.shape)} with {len(labels)} captions were given; expected (N, "
                f"{', '.join(map(str, self._x['test'].shape[1:]))}) and N captions"
            )
        x, y = {"train": images, "test": self._x["test"]}, {"train": labels, "test": self._y["test"]}
        return self._with(self.name, x, y)

    def in_latents(self, autoencoder: Autoencoder, cache: Path) -> Self:
        """Returns the same task over the latents of its images.

        Args:
            autoencoder: makes them.
            cache: folder in which they are kept, see `Autoencoder.latents`.

        Raises:
            HoldfastError: if the autoencoder cannot read the images, or they are latents already.
        """
        if self.autoencoder is not None:
            raise self._bad(f"its images are latents of {self.autoencoder.name} already")
        task = copy.copy(self)
        task.autoencoder = autoencoder
        task._set({split: autoencoder.latents(x, cache) for split, x in self._x.items()}, self._y)
        return task

    def pixels(self, images: Tensor) -> Tensor:
        """See `DenoisingTask.pixels`; latents are decoded, on the CPU."""
        return super().pixels(images) if self.autoencoder is None else self.autoencoder.decode(images)

    def as_images(self, size: int | None = None, channels: int | None = None) -> Self:
        """See `InMemoryTask.as_images`; latents have the size that their images had."""
        if self.autoencoder is not None:
            raise self._bad("latents cannot be resized; resize the images before they are encoded")
        return super().as_images(size, channels)

    def inputs(self, noised: Tensor, labels: Tensor) -> Tensor:
        """See `DenoisingTask.inputs`: the caption comes before the time step; label -1 is the empty caption."""
        # Of the batch alone: channels of thousands of captions would take more memory than their images.
        channel = caption_channel(self.caption_ids(labels).to(noised.device), tuple(noised.shape[2:]))
        return with_caption(noised, channel)

    def _shown_labels(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.dropout:
            return y
        dropped = torch.rand(len(y), generator=generator) < self.dropout
        return torch.where(dropped.to(y.device), -1, y)

    def token_beyond(self, count: int) -> str | None:
        """See `Task.token_beyond`."""
        beyond = (self.tokens >= count) & (self.tokens != self.vocabulary.pad)
        if not bool(beyond.any()):
            return None
        row = int(beyond.any(1).nonzero()[0])
        shown = [*self.captions, ""][row]
        return f"the caption {shown!r} has the token {int(self.tokens[row].max())}"

    def counts(self, split: Split) -> list[int]:
        """See `InMemoryTask.counts`; empty if there are more captions than `MOST_CLASSES`."""
        return super().counts(split) if len(self.class_names) <= MOST_CLASSES else []

    def same_answers(self, other: Self, pairs: Sequence[tuple[Hashable, Hashable]]) -> bool:
        """See `InMemoryTask.same_answers`: the same images with other captions are other data."""
        ours, theirs = dict(enumerate(self.captions)), dict(enumerate(other.captions))
        return all(ours[own] == theirs[given] for own, given in pairs)  # type: ignore[index]

    def facts(self) -> TaskFacts:
        """See `Task.facts`; the hash also covers the token ids of the captions."""
        plain = super().facts()
        digest = hashlib.sha256(plain.sha256.encode() + self.tokens.numpy().tobytes()).hexdigest()
        return plain.model_copy(update={"sha256": digest})


def caption_channel(tokens: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Returns captions as channels of an image: their number of tokens, then the ids, row by row, then zeros.

    Args:
        tokens: ids, int64, shape (K, L).
        sides: height and width, with more than L pixels.

    Returns:
        float32, shape (K, 1, height, width).

    Raises:
        HoldfastError: if there are too few pixels.

    Example:
        >>> channel = caption_channel(torch.tensor([[5, 7]]), (2, 3))
        >>> channel[0, 0].tolist(), caption_tokens(channel[:, 0]).tolist()
        ([[2.0, 5.0, 7.0], [0.0, 0.0, 0.0]], [[5, 7]])
    """
    count, length = tokens.shape
    height, width = sides
    if length >= height * width:
        raise HoldfastError(f"A caption of {length} tokens does not fit into an image of {height} x {width} pixels.")
    channel = torch.zeros(count, height * width, device=tokens.device)
    channel[:, 0] = length
    channel[:, 1 : length + 1] = tokens.float()
    return channel.view(count, 1, height, width)


def with_caption(noised: Tensor, channel: Tensor) -> Tensor:
    """Returns a text-to-image model's inputs.

    Args:
        noised: x_t with the time step as the last channel, shape (N, C + 1, H, W).
        channel: what `caption_channel` made of each image's caption, shape (N, 1, H, W).

    Returns:
        Shape (N, C + 2, H, W).
    """
    return torch.cat([noised[:, :-1], channel.to(noised), noised[:, -1:]], 1)


def caption_tokens(channel: Tensor) -> Tensor:
    """Returns the token ids in a channel that `caption_channel` made.

    Args:
        channel: shape (N, height, width).

    Returns:
        int64, shape (N, L).
    """
    flat = channel.flatten(1)
    length = int(flat[0, 0]) if len(flat) else 0
    return flat[:, 1 : length + 1].round().long()
