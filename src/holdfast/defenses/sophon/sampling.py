"""The states that a denoiser passes while it draws images.

A denoiser that has a small error on noised images may draw nothing but noise: sampling passes through images that are
no training images with noise, and a defense changes the answers on those as well (docs/results/sophon-generation.md).
So reinforcement keeps the outputs near the original's on the states that the immunized model itself passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from holdfast.tasks import TextToImageTask
from holdfast.tasks.schedule import Schedule

DDIM_STEPS = 50
"""Steps in which an image is drawn, as in `holdfast.metrics.generation.sample`."""


class SamplingStates:
    """Images that are being drawn by DDIM, each at a time step of its own; a finished one gives way to new noise.

    Args:
        schedule: of the noise.
        shape: (C, H, W).
        count: number of images.
        device: where they are.
        generator: draws noise on the CPU, and captions.
        captioned: the task whose captions the images are drawn for, each image for one of them; also for the empty
            caption, if its training leaves captions out. None: images are drawn without captions.

    Attributes:
        x: the images x_t, shape (count, C, H, W).
        t: their time steps, int64, shape (count,).
        labels: numbers of their captions, int64, shape (count,); None without captions.

    Example:
        >>> states = SamplingStates(
        ...     Schedule(), (1, 8, 8), 4, device=torch.device("cpu"), generator=torch.Generator().manual_seed(0)
        ... )
        >>> states.inputs().shape, bool((states.t >= 980).all())
        (torch.Size([4, 2, 8, 8]), True)
    """

    def __init__(
        self,
        schedule: Schedule,
        shape: tuple[int, ...],
        count: int,
        *,
        device: torch.device,
        generator: torch.Generator,
        captioned: TextToImageTask | None = None,
    ) -> None:
        self.schedule = schedule
        self.captioned = captioned
        self.steps = schedule.restorable
        self.stride = max(1, self.steps // DDIM_STEPS)
        self.x = torch.empty(count, *shape, device=device)
        self.t = torch.empty(count, dtype=torch.int64, device=device)
        self.labels = None if captioned is None else torch.empty_like(self.t)
        self._begin(torch.ones(count, dtype=torch.bool), generator)

    def inputs(self) -> Tensor:
        """Returns the denoiser's inputs, with the time step as the last channel: shape (count, C + 1, H, W).

        With captions there is one more channel; see `TextToImageTask`.
        """
        noised = self.schedule.with_steps(self.x, self.t)
        if self.captioned is None or self.labels is None:
            return noised
        return self.captioned.inputs(noised, self.labels)

    @torch.no_grad()
    def advance(self, noise: Tensor, generator: torch.Generator, where: Tensor | None = None) -> None:
        """Takes one step of DDIM.

        Args:
            noise: what a denoiser predicted on `inputs`.
            generator: draws the noise of new images.
            where: bool, shape (count,), on the CPU: the images that take the step; None: all.
        """
        moving = torch.ones(len(self.t), dtype=torch.bool) if where is None else where
        then = self.t - self.stride
        earlier, _ = self.schedule.step_back(self.x, noise.to(self.x.dtype), self.t, then.clamp(min=0))
        chosen = moving.to(self.x.device)
        self.x = torch.where(chosen.view(-1, 1, 1, 1), earlier, self.x)
        self.t = torch.where(chosen, then, self.t)
        self._begin((self.t < 0).cpu() | ~self.x.isfinite().flatten(1).all(1).cpu(), generator)

    @torch.no_grad()
    def spread(self, denoiser: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
        """Advances the images to time steps that are spread over the schedule; at the start they all are noise."""
        lengths = torch.randint(self.steps // self.stride, (len(self.t),), generator=generator)
        for step in range(int(lengths.max())):
            self.advance(denoiser(self.inputs()), generator, lengths > step)

    def _begin(self, which: Tensor, generator: torch.Generator) -> None:
        """Replaces images by noise; the first time step is random within a stride, so that all time steps come."""
        count = int(which.sum())
        if count:
            noise = torch.randn((count, *self.x.shape[1:]), generator=generator)
            late = torch.randint(self.stride, (count,), generator=generator)
            chosen = which.to(self.x.device)
            self.x[chosen] = noise.to(self.x)
            self.t[chosen] = (self.steps - 1 - late).to(self.t)
            if self.captioned is not None and self.labels is not None:
                first = -1 if self.captioned.dropout else 0
                labels = torch.randint(first, len(self.captioned.captions), (count,), generator=generator)
                self.labels[chosen] = labels.to(self.labels)

    def saved(self) -> dict[str, Tensor]:
        """Returns the tensors from which `restore` continues."""
        return {"x": self.x, "t": self.t, **({} if self.labels is None else {"labels": self.labels})}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `saved` returned."""
        self.x.copy_(tensors["x"])
        self.t.copy_(tensors["t"])
        if self.labels is not None:
            self.labels.copy_(tensors["labels"])
