"""What a denoiser makes: samples, pictures with their noise taken away, and how far a set of them is from another.

Pictures are float tensors of shape (N, C, H, W) in [0, 1], and NaN where a network gave no number. Samples come from
diffusers' own pipelines, so that whoever loads a released folder with that library sees the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.execution import device_of

BATCH = 64
"""Pictures that are computed at a time."""


class Generative(Protocol):
    """What can be sampled from.

    Attributes:
        network: a diffusers `UNet2DModel` that predicts the noise.
        scheduler: the configuration of the `DDPMScheduler` that it was trained with.
    """

    @property
    def network(self) -> Any:
        """See above."""

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """See above."""


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def sample(
    model: Generative, count: int, *, seed: int, steps: int | None = 50, eta: float = 0.0, batch: int = BATCH
) -> Tensor:
    """Draws pictures from a denoiser, as `diffusers.DDIMPipeline` and `DDPMPipeline` do.

    All noise is drawn from one generator, one batch after the other. With DDIM at `eta` 0, the size of the batches
    changes nothing but rounding; otherwise every step draws noise for its whole batch, and the size matters.

    Args:
        model: left in the mode that it is in.
        count: how many.
        seed: of the noise; up to `batch` pictures are those of a plain pipeline whose generator has this seed.
        steps: of DDIM (Song et al. 2021); None: every step that the model was trained for, by DDPM (Ho et al. 2020).
        eta: of DDIM: how much of the noise is drawn anew at each step, from 0 (none) to 1 (all, as in DDPM).
        batch: pictures at a time.

    Returns:
        Pictures of shape (count, C, H, W), on the CPU.

    Raises:
        HoldfastError: for numbers out of range.

    Example:
        >>> from types import SimpleNamespace
        >>> from diffusers import UNet2DModel
        >>> network = UNet2DModel(
        ...     8, 1, 1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        ...     down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ... )
        >>> model = SimpleNamespace(network=network, scheduler={"num_train_timesteps": 20})
        >>> sample(model, 3, seed=0, steps=5).shape
        torch.Size([3, 1, 8, 8])
    """
    import diffusers

    config = dict(model.scheduler)
    length = diffusers.DDPMScheduler.from_config(config).config.num_train_timesteps
    if steps is not None and not 1 <= steps <= length:
        raise HoldfastError(f"steps is {steps}; expected 1 to {length}, the steps that the model was trained for.")
    if count < 1 or batch < 1:
        raise HoldfastError(f"{count} pictures in batches of {batch} were asked for; expected at least 1 of both.")
    if not 0 <= eta <= 1:
        raise HoldfastError(f"eta is {eta}; expected 0 to 1.")
    if steps is None:
        pipeline = diffusers.DDPMPipeline(model.network, diffusers.DDPMScheduler.from_config(config))
        settings: dict[str, Any] = {"num_inference_steps": length}
    else:
        pipeline = diffusers.DDIMPipeline(model.network, diffusers.DDIMScheduler.from_config(config))
        settings = {"num_inference_steps": steps, "eta": eta}
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    found = []
    with _evaluating(model.network):
        for start in range(0, count, batch):
            size = min(batch, count - start)
            made = pipeline(batch_size=size, generator=generator, output_type="pt", **settings)
            found.append(made.images.float().cpu())
    return torch.cat(found)


def alpha_bar(scheduler: Mapping[str, Any]) -> Tensor:
    """Returns how much of a picture's variance is left after each step of the forward process: shape (T,).

    Example:
        >>> alpha_bar({"num_train_timesteps": 4, "beta_start": 0.5, "beta_end": 0.5})
        tensor([0.5000, 0.2500, 0.1250, 0.0625])
    """
    import diffusers

    found: Tensor = diffusers.DDPMScheduler.from_config(dict(scheduler)).alphas_cumprod
    return found


def noised(pictures: Tensor, t: int, scheduler: Mapping[str, Any], *, seed: int) -> Tensor:
    """Returns pictures after step t of the forward process; where the noise leads out of [0, 1], they are clamped.

    Args:
        pictures: shape (N, C, H, W), in [0, 1].
        t: from 0, where little noise is added, to T - 1.
        scheduler: configuration of a `DDPMScheduler`.
        seed: of the noise.
    """
    return _pictures(_forward(pictures, t, alpha_bar(scheduler), seed))


def _forward(pictures: Tensor, t: int, signal: Tensor, seed: int) -> Tensor:
    """x_t of SOPHON's section 2.1, in the range [-1, 1] that denoisers know; the noise depends on the seed alone."""
    if not 0 <= t < len(signal):
        raise HoldfastError(f"The step to add noise to is {t}; expected 0 to {len(signal) - 1}.")
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    return signal[t].sqrt() * (2 * pictures - 1) + (1 - signal[t]).sqrt() * noise


def _pictures(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0, 1).float().cpu()


@torch.no_grad()
def restore(model: Generative, pictures: Tensor, t: int, *, seed: int, steps: int = 50, batch: int = BATCH) -> Tensor:
    """Adds noise to pictures and lets a denoiser take it away, as in Figures 5 and 6 of the SOPHON paper.

    The way back is DDIM's (Song et al. 2021, Eq. 12) without new noise, at steps that are evenly spread from t to 0.

    Args:
        model: left in the mode that it is in.
        pictures: shape (N, C, H, W), in [0, 1].
        t: the step of the forward process to go to.
        seed: of the noise, which is the same for every model.
        steps: of the way back; where t + 1 is less, each step is taken.
        batch: pictures at a time.

    Returns:
        What the model makes of the noised pictures, on the CPU.

    Raises:
        HoldfastError: for numbers out of range, or a model that does not predict the noise.
    """
    import diffusers

    if steps < 1:
        raise HoldfastError(f"steps is {steps}; expected at least 1.")
    scheduler = diffusers.DDIMScheduler.from_config(dict(model.scheduler))
    config = scheduler.config
    if config.prediction_type != "epsilon" or config.thresholding:
        raise HoldfastError(
            f"The scheduler has prediction_type {config.prediction_type!r} and thresholding {config.thresholding}; "
            "pictures are restored only by models that predict the noise ('epsilon'), without thresholding."
        )
    signal = scheduler.alphas_cumprod
    start = _forward(pictures, t, signal, seed)
    times = torch.linspace(t, 0, min(steps, t + 1)).round().long().tolist()
    found = []
    with _evaluating(model.network):
        for part in torch.split(start.to(device_of(model.network)), batch):
            x = part
            for now, then in zip(times, [*times[1:], None], strict=True):
                noise = model.network(x, now).sample
                clean = (x - (1 - signal[now]).sqrt() * noise) / signal[now].sqrt()
                if config.clip_sample:
                    clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range)
                left = scheduler.final_alpha_cumprod if then is None else signal[then]
                x = left.sqrt() * clean + (1 - left).sqrt() * noise
            found.append(_pictures(x))
    return torch.cat(found)


class Distance(NamedTuple):
    """A kernel distance and its standard error; both are NaN where a feature is not finite."""

    value: float
    error: float


def kernel_distance(a: Tensor, b: Tensor) -> Distance:
    """Returns the unbiased squared maximum mean discrepancy with KID's kernel (Binkowski et al. 2018).

    The kernel is k(x, y) = (x'y / D + 1)^3. Being unbiased, the distance between two samples of one distribution is 0
    on average, and often a little below. The standard error is the jackknife's: each sample is left out once.

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
