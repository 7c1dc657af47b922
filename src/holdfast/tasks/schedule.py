"""Noise schedules of diffusion models: how much of an image remains after each step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from holdfast.errors import HoldfastError, unknown

SCHEDULES: Final = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
"""Noise schedules by their names in diffusers, each with its default range."""

SCHEDULERS: Final = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
"""Schedulers of diffusers with the forward process of `holdfast.tasks.denoising`; others add noise differently."""


@dataclass(frozen=True)
class Schedule:
    """The noise of the forward process, as the configuration of a scheduler of diffusers.

    Attributes:
        config: for `DDPMScheduler.from_config`; by default 1,000 steps, with beta from 1e-4 to 0.02 in equal steps (Ho
            et al. 2020, section 4).

    Raises:
        HoldfastError: if it is not the configuration of a supported scheduler.

    Example:
        >>> schedule = Schedule()
        >>> len(schedule.alpha_bar), round(schedule.alpha_bar[0].item(), 4), schedule.alpha_bar[-1].item() < 1e-4
        (1000, 0.9999, True)
    """

    config: Mapping[str, Any]

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        if not isinstance(config, Mapping | None):
            raise HoldfastError(f"{config!r} is not a scheduler's configuration.")
        name = (config or {}).get("_class_name", SCHEDULERS[0])
        if name not in SCHEDULERS:
            raise unknown("scheduler", str(name), SCHEDULERS)
        scheduler = _scheduler(config or {})
        alpha_bar = scheduler.alphas_cumprod
        if not len(alpha_bar) or not bool(((alpha_bar >= 0) & (alpha_bar < 1)).all()):  # NaN is refused
            raise HoldfastError(
                f"The noise schedule {dict(config or {})} is not valid: it needs at least one step, and alpha-bar from "
                "0 to below 1 at each. Correct num_train_timesteps, beta_start and beta_end."
            )
        kept = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        object.__setattr__(self, "config", json.loads(json.dumps({"_class_name": name, **kept})))

    @classmethod
    def named(cls, source: str) -> Schedule:
        """Returns a schedule of `SCHEDULES`, or the one in a diffusers folder or a `scheduler_config.json`.

        Raises:
            HoldfastError: for an unknown name, or a file that is not a scheduler's configuration.
        """
        if not isinstance(source, str):
            raise unknown("noise schedule", str(source), SCHEDULES)
        if source in SCHEDULES:
            return cls({"beta_schedule": source})
        path = Path(source).expanduser()
        files = (path, path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json")
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise HoldfastError(f"{unknown('noise schedule', source, SCHEDULES)} Or give a diffusers folder.")
        try:
            config = json.loads(file.read_bytes())
            if not isinstance(config, dict) or not str(config.get("_class_name", "")).endswith("Scheduler"):
                raise ValueError("it names no scheduler")
        except (ValueError, OSError, RecursionError) as error:
            raise HoldfastError(f"{str(file)!r} is not a scheduler's configuration: {error}.") from error
        return cls(config)

    @cached_property
    def alpha_bar(self) -> Tensor:
        """alpha-bar_t for t = 0, ..., T - 1: float32, shape (T,), on the CPU."""
        alpha_bar: Tensor = _scheduler(self.config).alphas_cumprod
        return alpha_bar.float()

    @property
    def steps(self) -> int:
        """The number of steps T."""
        return len(self.alpha_bar)

    @property
    def restorable(self) -> int:
        """Number of steps with alpha-bar above 0; all T, unless the schedule ends in pure noise."""
        return int((self.alpha_bar > 0).sum())

    def noised(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns x_t, with the time step as one more channel.

        Args:
            images: x_0 in [-1, 1], shape (N, C, H, W).
            t: time steps from 0 to T - 1, shape (N,), int64.
            noise: epsilon, like the images.

        Returns:
            Shape (N, C + 1, H, W); the last channel is t everywhere, so that a batch stays one tensor.
        """
        signal, spread = self.shares(t, images.device)
        return self.with_steps(signal * images + spread * noise, t)

    def shares(self, t: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the factors of x_0 and of the noise in x_t: sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t).

        Args:
            t: time steps, int64, shape (N,).
            device: of the result.

        Returns:
            Twice float32 of shape (N, 1, 1, 1).
        """
        alpha_bar = self.alpha_bar.to(device)[t.to(device)].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    @staticmethod
    def with_steps(x: Tensor, t: Tensor) -> Tensor:
        """Returns a denoiser's inputs: images x_t, with their time steps as one more channel."""
        return torch.cat([x, t.to(x).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], 1)

    def step_back(self, x: Tensor, noise: Tensor, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        """Removes noise by DDIM without new noise (Song et al. 2021, Eq. 12).

        With a = alpha-bar, x_0 is estimated as (x_t - sqrt(1 - a_t) epsilon) / sqrt(a_t), and x_s at an earlier step s
        is sqrt(a_s) x_0 + sqrt(1 - a_s) epsilon. If the scheduler clips estimates of x_0, they are clipped.

        Args:
            x: images x_t, shape (N, C, H, W).
            noise: the predicted epsilon, like the images.
            now: t of each image, int64, shape (N,).
            then: s of each image, from 0 to t, int64, shape (N,).

        Returns:
            The images x_s, and the estimates of x_0.
        """
        alpha_bar = self.alpha_bar.to(x.device)
        before, after = (alpha_bar[steps].view(-1, 1, 1, 1) for steps in (now, then))
        clean = (x - (1 - before).sqrt() * noise) / before.sqrt()
        if self.config.get("clip_sample", True):
            reach = float(self.config.get("clip_sample_range", 1.0))
            clean = clean.clamp(-reach, reach)
        return after.sqrt() * clean + (1 - after).sqrt() * noise, clean

    def describe(self) -> str:
        """Returns the schedule in a few words."""
        c = self.config
        return f"{c['beta_schedule']}, {self.steps} steps, beta {c['beta_start']:g} to {c['beta_end']:g}"

    def same_noise(self, other: Schedule) -> bool:
        """Whether both give the same x_t."""
        return self.steps == other.steps and bool(torch.allclose(self.alpha_bar, other.alpha_bar, rtol=1e-4, atol=1e-6))


def _scheduler(config: Mapping[str, Any]) -> Any:
    try:
        from diffusers import DDPMScheduler
    except ImportError as error:
        raise HoldfastError(
            "Denoising needs the package diffusers, which is not installed: pip install 'holdfast[generation]'."
        ) from error
    try:
        return DDPMScheduler.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    except Exception as error:  # a configuration from elsewhere may raise anything
        raise HoldfastError(f"The noise schedule {dict(config)} is refused by diffusers: {error}.") from error
