"""What a denoiser makes: samples, pictures with their noise taken away, and how far a set of them is from another.

Pictures are float tensors of shape (N, C, H, W) in [0, 1], and NaN where a network gave no number. Samples come from
diffusers' own pipelines, so that a person who loads a released folder with that library sees the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models import Denoiser
from holdfast.tasks import Schedule

BATCH = 64
"""Pictures that are computed at a time."""


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
    """Draws pictures from a denoiser, as `diffusers.DDIMPipeline` and `DDPMPipeline` do.

    All noise is drawn from one generator, one batch after the other. With DDIM at `eta` 0, the size of the batches
    changes nothing but rounding; otherwise every step draws noise for its whole batch, and the size matters.

    Args:
        model: left in the mode that it is in.
        count: how many.
        seed: of the noise; up to `batch` pictures are those of a plain pipeline whose generator has this seed.
        steps: of DDIM (Song et al. 2021); None: every step that the model was trained for, by its own scheduler, which
            is DDPM (Ho et al. 2020) as a rule.
        eta: of DDIM: how much of the noise is drawn anew at each step, from 0 (none) to 1 (all, as in DDPM).
        batch: pictures at a time.

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
        raise HoldfastError(f"{count} pictures in batches of {batch} were asked for; expected at least 1 of both.")
    if not 0 <= eta <= 1:
        raise HoldfastError(f"eta is {eta}; expected 0 to 1.")
    if model.sample_shape is None:
        raise HoldfastError(f"{model.name} does not say of which size its pictures are; set sample_size in its config.")
    pipeline = model.pipeline(ddim=steps is not None)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": length} if steps is None else {"num_inference_steps": steps, "eta": eta}
    generator = torch.Generator().manual_seed(seed)
    found = []
    with _evaluating(model):
        for start in range(0, count, batch):
            size = min(batch, count - start)
            made = pipeline(batch_size=size, generator=generator, output_type="pt", **settings)
            found.append(made.images.float().cpu())
    return torch.cat(found)


def noised(pictures: Tensor, t: int, schedule: Schedule, *, seed: int) -> Tensor:
    """Returns pictures after step t of the forward process; where the noise leads out of [0, 1], they are clamped.

    Args:
        pictures: shape (N, C, H, W), in [0, 1].
        t: from 0, where little noise is added, to T - 1.
        schedule: of the noise.
        seed: of the noise.

    Raises:
        HoldfastError: if the step does not exist, or leaves only noise.

    Example:
        >>> noised(torch.ones(1, 1, 2, 2), 0, Schedule(), seed=0).mean() > 0.95
        tensor(True)
    """
    return _pictures(_forward(pictures, t, schedule, seed)[:, :-1])


def _forward(pictures: Tensor, t: int, schedule: Schedule, seed: int) -> Tensor:
    """What a denoiser takes; the noise depends on the seed and the shape alone."""
    if not 0 <= t < schedule.restorable:
        raise HoldfastError(f"The step to add noise to is {t}; expected 0 to {schedule.restorable - 1}.")
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    return schedule.noised(2 * pictures - 1, torch.full((len(pictures),), t), noise)


def _pictures(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0, 1).float().cpu()


@torch.no_grad()
def restore(model: Denoiser, pictures: Tensor, t: int, *, seed: int, steps: int = 50, batch: int = BATCH) -> Tensor:
    """Adds noise to pictures and lets a denoiser take it away, as in Figures 5 and 6 of the SOPHON paper.

    The way back is DDIM's (Song et al. 2021, Eq. 12) without new noise, at steps that are evenly spread from t to 0:
    with a = alpha-bar, x_0 is estimated as (x_t - sqrt(1 - a_t) epsilon) / sqrt(a_t), and the next, at a step s < t, is
    sqrt(a_s) x_0 + sqrt(1 - a_s) epsilon. The last estimate of x_0 is the result.

    Args:
        model: left in the mode that it is in. Where its scheduler clips estimates of x_0, so they are here.
        pictures: shape (N, C, H, W), in [0, 1].
        t: the step of the forward process to go to.
        seed: of the noise, which is the same for every model.
        steps: of the way back; where t + 1 is less, each step is taken.
        batch: pictures at a time.

    Returns:
        What the model makes of the noised pictures, on the CPU.

    Raises:
        HoldfastError: for numbers out of range.
    """
    if steps < 1 or batch < 1:
        raise HoldfastError(f"steps is {steps} and batch {batch}; expected at least 1 of both.")
    alpha_bar, config = model.schedule.alpha_bar, model.schedule.config
    reach = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", True) else None
    start = _forward(pictures, t, model.schedule, seed).to(model.device)
    times = torch.linspace(t, 0, min(steps, t + 1)).round().long().tolist()
    found = []
    with _evaluating(model):
        for part in torch.split(start, batch):
            x, clean = part[:, :-1], part[:, :-1]
            for i, now in enumerate(times):
                noise = model(torch.cat([x, torch.full_like(x[:, :1], now)], 1))
                clean = (x - (1 - alpha_bar[now]).sqrt() * noise) / alpha_bar[now].sqrt()
                clean = clean if reach is None else clean.clamp(-reach, reach)
                if i + 1 < len(times):
                    then = alpha_bar[times[i + 1]]
                    x = then.sqrt() * clean + (1 - then).sqrt() * noise
            found.append(_pictures(clean))
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
