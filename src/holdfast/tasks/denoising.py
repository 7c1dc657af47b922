"""Denoising of images: what a diffusion model is trained for (Ho et al. 2020; SOPHON, section 2.1).

Symbols as in the papers: x_0 is an image in [-1, 1], alpha-bar_t the share of its variance after t of T steps, and
epsilon standard normal noise. The forward process is

    x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) epsilon

(or that of flow matching, see `Schedule`), and the model predicts epsilon from x_t and t. The SOPHON paper writes its
loss as a squared norm; its numbers (0.990 for a model that predicts almost no noise) are means over pixels, and so are
ours.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Hashable, Iterator, Sequence
from typing import ClassVar, Self

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.results import TaskFacts
from holdfast.tasks.arrays import Array
from holdfast.tasks.base import Batch, Split
from holdfast.tasks.classification import ArrayTask
from holdfast.tasks.in_memory import SCORE_BATCH, InMemoryTask
from holdfast.tasks.schedule import FLOW, Schedule

BLOCK = 500
"""Test images whose fixed noise is drawn together."""


class DenoisingTask(ArrayTask):
    """Prediction of the noise in noised images.

    A batch's `x` is x_t with its time step as the last channel, shape (N, C + 1, H, W), and its `y` is epsilon, shape
    (N, C, H, W). In training every batch has new noise and new time steps. For testing each image has a fixed noise and
    a fixed time step, and the time steps of a split are spread evenly: so all models are compared on the same inputs.
    A task may be limited to some time steps; the released code of SOPHON has t = 1 alone.

    The score is MSE-k, the mean squared error per pixel. An audit compares the *skill*, 1 - MSE / `chance`, where
    `chance` is the error of the best linear denoiser that uses only mean m and variance s^2 of the images' pixels:
    epsilon = b (x_t - a m) / (a^2 s^2 + b^2), with the shares a and b of `Schedule.shares`. A model that returns 0 has
    an MSE of about 1, and so a skill far below 0.

    Args:
        name: shown in reports and errors.
        x_train: images as uint8 of shape (N, H, W) or (N, H, W, C).
        y_train: integer labels of shape (N,); all 0 if there are none. The task does not use them.
        x_test: like `x_train`.
        y_test: like `y_train`.
        class_names: one name a class.
        schedule: of the noise.
        timesteps: the time steps that are drawn; none: all.

    Raises:
        HoldfastError: as `ArrayTask`; and if the arrays are not images, all test pixels are the same, or the schedule
            has no such time step.

    Example:
        >>> from holdfast.tasks import load_task
        >>> task = load_task("digits@kind=denoising")
        >>> task.input_shape, task.output_shape, round(task.chance, 2)
        ((2, 8, 8), (1, 8, 8), 0.23)
    """

    kind = "denoising"
    higher_is_better = False
    baseline = "a linear denoiser"
    answers_with = "noise"
    labels_are_classes = False
    no_features = "a denoiser has no features for a probe"
    suppression_losses = ("dos", "mse-ascent")
    min_classes: ClassVar[int] = 1
    labelled: ClassVar[bool] = False
    more_channels: ClassVar[int] = 0
    """Channels of the inputs beside the noised image and the time step."""

    def __init__(
        self,
        name: str,
        x_train: npt.ArrayLike,
        y_train: npt.ArrayLike,
        x_test: npt.ArrayLike,
        y_test: npt.ArrayLike,
        class_names: Sequence[str] | None = None,
        *,
        schedule: Schedule | None = None,
        timesteps: Sequence[int] = (),
    ) -> None:
        self.schedule = schedule if schedule is not None else Schedule()
        self.timesteps = self._checked_steps(name, timesteps)
        super().__init__(name, x_train, y_train, x_test, y_test, class_names)

    @classmethod
    def of(cls, task: InMemoryTask, schedule: Schedule | None = None, timesteps: Sequence[int] = ()) -> Self:
        """Returns the denoising task over a task's images.

        Raises:
            HoldfastError: if its inputs are not images, or the schedule has no such time step.
        """
        denoising = object.__new__(cls)
        denoising._over(task, schedule, timesteps)
        return denoising

    def _over(self, task: InMemoryTask, schedule: Schedule | None, timesteps: Sequence[int]) -> None:
        """Takes another task's images."""
        if any(x.dim() != 4 or x.dtype != torch.uint8 for x in task._x.values()):
            raise HoldfastError(
                f"Task {task.name!r}: its inputs are not images, {tuple(task._x['train'].shape[1:])} each, and "
                "denoising needs images."
            )
        self.name, self.class_names = task.name, task.class_names
        self.source, self.notes, self.drawn = task.source, task.notes, task.drawn
        self.schedule = schedule if schedule is not None else Schedule()
        self.timesteps = self._checked_steps(task.name, timesteps)
        self._set(task._x, task._y)

    def with_schedule(self, schedule: Schedule) -> Self:
        """Returns the same images with other noise."""
        return self._noised_by(schedule, self.timesteps)

    def with_timesteps(self, timesteps: Sequence[int]) -> Self:
        """See `Task.with_timesteps`."""
        return self._noised_by(self.schedule, timesteps)

    def _noised_by(self, schedule: Schedule, timesteps: Sequence[int]) -> Self:
        task = copy.copy(self)
        task.schedule, task.timesteps = schedule, ()
        task.timesteps = task._checked_steps(task.name, timesteps)
        del task._x  # the error of the linear denoiser is another one
        task._set(self._x, self._y)
        return task

    def _checked_steps(self, name: str, timesteps: Sequence[int]) -> tuple[int, ...]:
        wrong = [t for t in timesteps if not 0 <= t < self.schedule.steps]
        if wrong or len(set(timesteps)) < len(timesteps):
            raise HoldfastError(
                f"Task {name!r}: timesteps are {list(timesteps)}; expected different ones from 0 to "
                f"{self.schedule.steps - 1}."
            )
        return tuple(timesteps)

    def _inputs(self, values: npt.ArrayLike, label: str) -> Array:
        x = super()._inputs(values, label)
        if x.ndim != 4:
            raise self._bad(f"{label} holds vectors {x.shape}; denoising needs images, (N, H, W) or (N, H, W, C)")
        return x

    def _set(self, x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
        same = "_x" in self.__dict__ and self._x["test"] is x["test"]  # only training images changed
        chance = self.chance if same else None
        super()._set(x, y)
        channels, *sides = x["train"].shape[1:]
        self.input_shape = (channels + 1 + self.more_channels, *sides)
        self.num_outputs = channels
        self.chance = self._reference_error() if chance is None else chance

    def _reference_error(self) -> float:
        """The error of the linear denoiser on the test inputs; see the class."""
        x = self._clean(self._x["test"], torch.float64)
        mean, variance = float(x.mean()), float(x.var(correction=0))
        if not variance > 0 or bool(x.min() == x.max()):  # rounding leaves equal pixels some variance
            raise self._bad(
                "all pixels of its test images are the same, so that their noise can be computed without a model; give "
                "other test images"
            )
        total, count = 0.0, 0
        for batch in self.sweep("test", SCORE_BATCH, device=torch.device("cpu")):
            a, whole = self.schedule.variances(batch.x[:, -1, 0, 0].long())
            guess = (whole - a).sqrt() * (batch.x[:, : self.num_outputs] - a.sqrt() * mean)
            guess /= a * variance + whole - a
            total += float((guess - batch.y).square().sum())
            count += batch.y.numel()
        return total / count

    @property
    def output_shape(self) -> tuple[int, ...]:
        """See `Task.output_shape`: an image."""
        return (self.num_outputs, *self.input_shape[1:])

    @property
    def sampling_schedule(self) -> Schedule | None:  # type: ignore[override]
        """See `Task`; a model of some time steps only does not draw samples."""
        return None if self.timesteps else self.schedule

    @property
    def audit_unit(self) -> str:
        """See `Task.audit_unit`."""
        return "skill"

    def images(self, split: Split) -> Tensor:
        """Returns the images x_0 of a split: float32 in [-1, 1], shape (N, C, H, W), on the CPU."""
        return self._clean(self._x[split])

    @staticmethod
    def _clean(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored images as x_0: bytes become numbers from -1 to 1; latents stay as they are."""
        return x.to(dtype).div_(127.5).sub_(1) if x.dtype == torch.uint8 else x.to(dtype)

    def pixels(self, images: Tensor) -> Tensor:
        """Returns images x_0, as the model has them, as pictures in [0, 1], shape (N, C, H, W)."""
        return ((images + 1) / 2).clamp(0, 1)

    def labels(self, split: Split) -> Tensor:
        """Returns the images' labels: int64, shape (N,); all 0 if they have none."""
        return self._y[split]

    # Labels are not used: halves, few-shot samples and held-out parts are drawn from all images.
    _by_class = InMemoryTask._by_class
    _group = InMemoryTask._group
    smoothed_loss_of = InMemoryTask.smoothed_loss_of
    distance = InMemoryTask.distance
    batch_skill = InMemoryTask.batch_skill

    def batches(
        self, split: Split, batch_size: int, *, generator: torch.Generator | None = None, device: torch.device
    ) -> Iterator[Batch]:
        """See `Task.batches`; images, then their time steps, then their noise are drawn on the CPU."""
        if split == "test":
            yield from self.sweep(split, batch_size, device=device)
            return
        scaled = self._x[split].dtype == torch.uint8
        for x, y in super().batches(split, batch_size, generator=generator, device=device):
            t = torch.randint(len(self.timesteps) or self.schedule.steps, (len(x),), generator=generator)
            t = torch.tensor(self.timesteps)[t] if self.timesteps else t
            noise = torch.randn(x.shape, generator=generator).to(device)
            noised = self.schedule.noised(2 * x - 1 if scaled else x, t.to(device), noise)
            yield Batch(self.inputs(noised, self._shown_labels(y, generator)), noise)

    def sweep(self, split: Split, batch_size: int, *, device: torch.device) -> Iterator[Batch]:
        """See `Task.sweep`; each image has its fixed noise and time step."""
        x, y = self._x[split], self._y[split]
        t = self._fixed_steps(len(y))
        for start in range(0, len(y), batch_size):
            stop = min(start + batch_size, len(y))
            noise = torch.cat([self._fixed_noise(b)[max(start - b * BLOCK, 0) : stop - b * BLOCK]
                               for b in range(start // BLOCK, (stop - 1) // BLOCK + 1)])  # fmt: skip
            images, labels = self._clean(x[start:stop].to(device)), y[start:stop].to(device)
            noise = noise.to(device)
            yield Batch(self.inputs(self.schedule.noised(images, t[start:stop].to(device), noise), labels), noise)

    def inputs(self, noised: Tensor, labels: Tensor) -> Tensor:
        """Returns a model's inputs for noised images.

        Args:
            noised: x_t with the time step as the last channel, shape (N, C + 1, H, W).
            labels: of the images, int64, shape (N,).

        Returns:
            Shape (N, *input_shape); without captions, `noised` as it is.
        """
        return noised

    def _shown_labels(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        """Labels of a training batch as `inputs` takes them."""
        return y

    def _fixed_steps(self, count: int) -> Tensor:
        """Time steps spread evenly over those of the task, in an order independent of the images'."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        if self.timesteps:
            return torch.tensor(self.timesteps)[order % len(self.timesteps)]
        return (order * 2 + 1) * self.schedule.steps // (2 * count)

    def _fixed_noise(self, block: int) -> Tensor:
        """Noise of the images from `block` * BLOCK on; drawn in blocks, so that batch sizes do not matter."""
        generator = torch.Generator().manual_seed(block)
        return torch.randn((BLOCK, *self.output_shape), generator=generator)

    def targets(self, y: Tensor) -> Tensor:
        """See `Task.targets`: the noise, shape (N, C H W)."""
        return y.flatten(1).to(torch.float64)

    def probe_targets(self, y: Tensor) -> Tensor:
        """See `Task.probe_targets`: the noise of each pixel, shape (N H W, C)."""
        return y.movedim(1, -1).flatten(0, -2)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the mean squared error of what the model's network predicts: the noise, v, x_0 or the flow.

        Training scripts descend it. Scores are those of the noise, whatever a network predicts, and so is `loss_of`.
        """
        if getattr(model, "predicts", "epsilon") == "epsilon":
            return super().loss(model, batch)
        errors: Tensor = model.prediction_errors(batch.x, batch.y)  # type: ignore[operator]
        return errors.mean()

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """See `Task.loss_of`."""
        return F.mse_loss(outputs, batch.y.to(outputs.dtype))

    def score_of(self, outputs: Tensor, batch: Batch) -> float:
        """See `Task.score_of`: the mean squared error."""
        return float(self.loss_of(outputs.detach(), batch))

    def outcomes_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns the mean squared error of each image."""
        return (outputs - batch.y).flatten(1).double().square().mean(1).cpu()

    def counts(self, split: Split) -> list[int]:
        """See `InMemoryTask.counts`; empty if the images have no labels."""
        return super().counts(split) if len(self.class_names) > 1 else []

    def same_answers(self, other: Self, pairs: Sequence[tuple[Hashable, Hashable]]) -> bool:
        """See `InMemoryTask.same_answers`: always, for the same images."""
        return True

    def check_classes(self) -> None:
        """See `Task.check_classes`: a class without images is allowed."""

    def with_inputs(self, train: Tensor, test: Tensor) -> Self:
        """Refused: the features of a noised image change with its noise.

        Raises:
            HoldfastError: always.
        """
        raise self._bad("a probe on features does not apply to a denoiser; fine-tune it")

    def facts(self) -> TaskFacts:
        """See `Task.facts`; the hash covers the noise schedule and the time steps, and classes do not count."""
        plain = super().facts()
        parts = [plain.sha256.encode(), self.schedule.alpha_bar.numpy().tobytes()]
        parts += [FLOW.encode()] if self.schedule.flows else []
        parts += [repr(self.timesteps).encode()] if self.timesteps else []
        digest = hashlib.sha256(b"".join(parts)).hexdigest()
        return plain.model_copy(update={"sha256": digest, "classes": 1})
