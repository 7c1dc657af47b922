"""Pictures of a denoiser: samples, restored pictures, and the distance between two sets of features.

Pictures are float tensors of shape (N, C, H, W) in [0, 1], with NaN where the network's output is NaN. Samples come
from diffusers' pipelines, so that loading a released folder with diffusers gives the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models import Denoiser, TextToImage
from holdfast.tasks import Schedule
from holdfast.tasks.text_to_image import caption_channel, with_caption

BATCH = 64
"""Number of pictures computed at a time."""


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def sample(
    model: Denoiser, count: int, *, seed: int, steps: int | None = 50, eta: float = 0.0, batch: int = BATCH
) -> Tensor:
    """Samples pictures from a denoiser with `diffusers.DDIMPipeline` or `DDPMPipeline`.

    All noise is drawn from one generator, batch after batch. With DDIM at `eta` 0 the batch size changes only rounding;
    otherwise every step draws noise for its whole batch, and the size matters.

    Args:
        model: the denoiser; its mode is not changed.
        count: number of pictures.
        seed: of the noise; the first `batch` pictures are those of a pipeline whose generator has this seed.
        steps: of DDIM (Song et al. 2021); None: every step that the model was trained for, with its own scheduler,
            usually DDPM (Ho et al. 2020).
        eta: of DDIM: share of the noise that is drawn again at each step, from 0 (none) to 1 (all, as in DDPM).
        batch: number of pictures computed at a time.

    Returns:
        Pictures of shape (count, C, H, W), on the CPU.

    Raises:
        HoldfastError: for numbers out of range, or a network without a `sample_size`.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> model = load_model("unet", load_task("digits@kind=denoising"))
        >>> sample(model, 3, seed=0, steps=5).shape
        torch.Size([3, 1, 8, 8])
    """
    length = model.schedule.steps
    if steps is not None and not 1 <= steps <= length:
        raise HoldfastError(f"steps is {steps}; expected 1 to {length}, the steps that the model was trained for.")
    if count < 1 or batch < 1:
        raise HoldfastError(f"count is {count} and batch {batch}; expected at least 1 of both.")
    if not 0 <= eta <= 1:
        raise HoldfastError(f"eta is {eta}; expected 0 to 1.")
    if model.sample_shape is None:
        raise HoldfastError(f"{model.name} does not specify the size of its pictures; set sample_size in its config.")
    pipeline = model.pipeline(ddim=steps is not None)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": length} if steps is None else {"num_inference_steps": steps, "eta": eta}
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    with _evaluating(model):
        for start in range(0, count, batch):
            size = min(batch, count - start)
            sampled = pipeline(batch_size=size, generator=generator, output_type="pt", **settings)
            pictures.append(sampled.images.float().cpu())
    return torch.cat(pictures)


def noised(pictures: Tensor, t: int, schedule: Schedule, *, seed: int) -> Tensor:
    """Returns pictures after step t of the forward process, clamped to [0, 1].

    Args:
        pictures: shape (N, C, H, W), in [0, 1].
        t: from 0 (little noise) to T - 1.
        schedule: of the noise.
        seed: of the noise.

    Raises:
        HoldfastError: if there is no such step, or it leaves only noise.

    Example:
        >>> noised(torch.ones(1, 1, 2, 2), 0, Schedule(), seed=0).mean() > 0.95
        tensor(True)
    """
    return _pictures(_forward(2 * pictures - 1, t, schedule, seed)[:, :-1])


def _forward(images: Tensor, t: int, schedule: Schedule, seed: int) -> Tensor:
    """Returns a denoiser's inputs; the noise depends only on the seed and the shape."""
    if not 0 <= t < schedule.restorable:
        raise HoldfastError(f"The step to add noise to is {t}; expected 0 to {schedule.restorable - 1}.")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return schedule.noised(images, torch.full((len(images),), t), noise)


def _pictures(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0, 1).float().cpu()


def restore(model: Denoiser, pictures: Tensor, t: int, *, seed: int, steps: int = 50, batch: int = BATCH) -> Tensor:
    """Adds noise to pictures and removes it with a denoiser, as in Figures 5 and 6 of the SOPHON paper.

    Args:
        model: the denoiser; its mode is not changed.
        pictures: shape (N, C, H, W), in [0, 1].
        t: step of the forward process up to which noise is added.
        seed: of the noise, which is the same for every model.
        steps: number of denoising steps, at most t + 1.
        batch: number of pictures computed at a time.

    Returns:
        The restored pictures, on the CPU.

    Raises:
        HoldfastError: for numbers out of range.
    """
    return _pictures(denoise(model, 2 * pictures - 1, t, seed=seed, steps=steps, batch=batch))


@torch.no_grad()
def denoise(
    model: Denoiser,
    images: Tensor,
    t: int,
    *,
    seed: int,
    steps: int = 50,
    batch: int = BATCH,
    captions: Tensor | None = None,
) -> Tensor:
    """Adds noise to images and removes it: `restore` for images as a task has them.

    Noise is removed by DDIM without new noise (see `Schedule.step_back`), at steps spread evenly from t to 0. The last
    estimate of x_0 is the result.

    Args:
        model: the denoiser.
        images: x_0, shape (N, C, H, W): pixels from -1 to 1, or latents.
        t: see `restore`.
        seed: see `restore`.
        steps: see `restore`.
        batch: see `restore`.
        captions: token ids of each image's caption, which a text-to-image model needs: int64, shape (N, L).

    Returns:
        Estimates of x_0, on the CPU.

    Raises:
        HoldfastError: for numbers out of range.
    """
    if steps < 1 or batch < 1:
        raise HoldfastError(f"steps is {steps} and batch {batch}; expected at least 1 of both.")
    start = _forward(images, t, model.schedule, seed)[:, :-1].to(model.device)
    return torch.cat([clean.float().cpu() for clean in _denoised(model, start, t, steps, batch, captions)])


@torch.no_grad()
def sample_captions(
    model: TextToImage,
    captions: Tensor,
    empty: Tensor | None = None,
    *,
    seed: int,
    steps: int = 50,
    guidance: float = 3.0,
    batch: int = BATCH,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Draws a picture for each caption, by DDIM without new noise and with classifier-free guidance.

    With the predictions e of the caption and e_0 of the empty caption, the noise is e_0 + g (e - e_0) (Ho and Salimans
    2021; diffusers' `guidance_scale` g). Steps are spread evenly over the schedule.

    Args:
        model: the model; its mode is not changed.
        captions: token ids, int64, shape (N, L).
        empty: ids of the empty caption, shape (1, L); None: without guidance.
        seed: of the noise, which is the same for every model.
        steps: number of denoising steps.
        guidance: g; 1: without guidance, in half of the time.
        batch: number of pictures computed at a time.
        shape: of x_0, (C, H, W); None: what the network's configuration says.

    Returns:
        Estimates of x_0 as the model's task has them, shape (N, C, H, W), on the CPU: pixels from -1 to 1, or latents.

    Raises:
        HoldfastError: for numbers out of range, or if no shape is known.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> task = load_task("digits@kind=text-to-image")
        >>> sample_captions(load_model("text-unet", task), task.tokens[:3], task.tokens[-1:], seed=0, steps=4).shape
        torch.Size([3, 1, 8, 8])
    """
    if steps < 1 or batch < 1 or not len(captions):
        raise HoldfastError(f"steps is {steps}, batch {batch}, captions {len(captions)}; expected at least 1 of each.")
    if not 0 <= guidance < math.inf:
        raise HoldfastError(f"guidance is {guidance}; expected a number of at least 0, 1 for none.")
    shape = shape if shape is not None else model.sample_shape
    if shape is None:
        raise HoldfastError(f"{model.name} does not specify the size of its pictures; give their shape.")
    last = model.schedule.restorable - 1
    noise = torch.randn((len(captions), *shape), generator=torch.Generator().manual_seed(seed))
    drawn = _denoised(model, noise.to(model.device), last, steps, batch, captions, empty, guidance)
    return torch.cat([clean.float().cpu() for clean in drawn])


def _denoised(
    model: Denoiser,
    start: Tensor,
    t: int,
    steps: int,
    batch: int,
    captions: Tensor | None,
    empty: Tensor | None = None,
    guidance: float = 1.0,
) -> Iterator[Tensor]:
    """Removes the noise of x_t in steps spread evenly from t to 0; yields the last estimates of x_0, part by part."""
    times = torch.linspace(t, 0, min(steps, t + 1)).round().long().tolist()
    channels, without = (
        None if ids is None else caption_channel(ids.cpu(), tuple(start.shape[2:])).to(start.device)
        for ids in (captions, empty)
    )
    with _evaluating(model):
        for i in range(0, len(start), batch):
            x = clean = start[i : i + batch]
            shown = None if channels is None else channels[i : i + batch]
            for now, following in zip(times, [*times[1:], 0], strict=True):
                step = torch.full((len(x),), now, device=x.device)
                inputs = model.schedule.with_steps(x, step)
                noise = model(inputs if shown is None else with_caption(inputs, shown))
                if guidance != 1 and without is not None:
                    free = model(with_caption(inputs, without.expand(len(x), -1, -1, -1)))
                    noise = free + guidance * (noise - free)
                x, clean = model.schedule.step_back(x, noise, step, torch.full_like(step, following))
            yield clean


class Distance(NamedTuple):
    """A kernel distance and its standard error; both are NaN where a feature is not finite."""

    value: float
    error: float


def kernel_distance(a: Tensor, b: Tensor) -> Distance:
    """Returns the unbiased squared maximum mean discrepancy with KID's kernel (Binkowski et al. 2018).

    The kernel is k(x, y) = (x'y / D + 1)^3. The distance between two samples of one distribution is 0 on average, and
    may be below 0. The standard error is by the jackknife, which leaves out each sample once.

    Args:
        a: features of shape (N, D), N at least 3.
        b: features of shape (M, D), M at least 3.

    Raises:
        HoldfastError: for other shapes.

    Example:
        >>> a, b = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)).double().split((2, 1))
        >>> near, far = kernel_distance(a[0], a[1]), kernel_distance(a[0], b[0] + 1)
        >>> abs(near.value) < 3 * near.error, far.value > 3 * far.error
        (True, True)
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 3:
        raise HoldfastError(
            f"Features of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; expected (N, D) and (M, D) "
            "with at least 3 rows each."
        )
    a, b = a.to("cpu", torch.float64), b.to("cpu", torch.float64)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = [k.fill_diagonal_(0).sum(1) for k in (kernel(a, a), kernel(b, b))]
    across = kernel(a, b)
    n, m = across.shape
    aa, bb, ab = within[0].sum() / (n * (n - 1)), within[1].sum() / (m * (m - 1)), across.sum()
    value = aa + bb - 2 * ab / (n * m)
    without_a = (within[0].sum() - 2 * within[0]) / ((n - 1) * (n - 2)) + bb - 2 * (ab - across.sum(1)) / ((n - 1) * m)
    without_b = (within[1].sum() - 2 * within[1]) / ((m - 1) * (m - 2)) + aa - 2 * (ab - across.sum(0)) / ((m - 1) * n)
    spread = sum((len(each) - 1) * float(each.var(correction=0)) for each in (without_a, without_b))
    return Distance(float(value), math.sqrt(spread))
