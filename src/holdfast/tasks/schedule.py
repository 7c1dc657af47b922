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

FLOW: Final = "flow"
"""Name of flow matching with its default schedule: as much noise as time."""

SCHEDULES: Final = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", FLOW)
"""Noise schedules by their names in diffusers, each with its default range; and flow matching."""

FLOW_SCHEDULER: Final = "FlowMatchEulerDiscreteScheduler"

CLIPPING: Final = ("DDPMScheduler", "DDIMScheduler")
"""Schedulers that clip estimates of x_0 unless their configuration says otherwise."""

SCHEDULERS: Final = (
    *CLIPPING,
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
    FLOW_SCHEDULER,
)
"""Schedulers of diffusers that are for one of the two forward processes of `Schedule`; others add noise differently.

They differ in how they sample, which training does not depend on.
"""


@dataclass(frozen=True)
class Schedule:
    """The noise of the forward process, as the configuration of a scheduler of diffusers.

    With the shares a and b (see `shares`), x_t = a x_0 + b epsilon. In diffusion (DDPM) a^2 = alpha-bar_t and
    b^2 = 1 - alpha-bar_t. In flow matching (Lipman et al. 2023; Esser et al. 2024) b = sigma_t and a = 1 - sigma_t.

    Attributes:
        config: for `from_config` of `DDPMScheduler`, or of `FlowMatchEulerDiscreteScheduler`; by default 1,000 steps of
            DDPM, with beta from 1e-4 to 0.02 in equal steps (Ho et al. 2020, section 4).

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
        if name == FLOW_SCHEDULER:
            _check_flow(scheduler, config or {})
        elif name not in CLIPPING and "clip_sample" not in (config or {}):
            scheduler.register_to_config(clip_sample=False)
        alpha_bar = _alpha_bar(scheduler)
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
        if source == FLOW:
            return cls({"_class_name": FLOW_SCHEDULER})
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
        """What is left of x_0's variance at t = 0, ..., T - 1: float32, shape (T,), on the CPU.

        That is alpha-bar_t, and (1 - sigma_t)^2 in flow matching.
        """
        return _alpha_bar(_scheduler(self.config)).float()

    @cached_property
    def sigma(self) -> Tensor:
        """sigma_t of flow matching for t = 0, ..., T - 1, rising to 1: float32, shape (T,), on the CPU."""
        return _sigma(_scheduler(self.config))

    @property
    def flows(self) -> bool:
        """Whether it is for flow matching, in which a network predicts epsilon - x_0."""
        return bool(self.config["_class_name"] == FLOW_SCHEDULER)

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
        """Returns the factors of x_0 and of the noise in x_t.

        They are sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t), and 1 - sigma_t and sigma_t in flow matching.

        Args:
            t: time steps, int64, shape (N,).
            device: of the result.

        Returns:
            Twice float32 of shape (N, 1, 1, 1).

        Example:
            >>> signal, spread = Schedule.named("flow").shares(torch.tensor([249]), torch.device("cpu"))
            >>> round(signal.item(), 2), round(spread.item(), 2)
            (0.75, 0.25)
        """
        if self.flows:
            sigma = self.sigma.to(device)[t.to(device)].view(-1, 1, 1, 1)
            return 1 - sigma, sigma
        alpha_bar = self.alpha_bar.to(device)[t.to(device)].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def variances(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a^2 and a^2 + b^2 of `shares`: the variance of x_t if that of x_0 is 1, and what x_0 has in it.

        Args:
            t: time steps, int64, shape (N,).

        Returns:
            Twice float64 of shape (N, 1, 1, 1), on the CPU; the second is exactly 1 in diffusion.
        """
        if not self.flows:
            alpha_bar = self.alpha_bar.double()[t.cpu()].view(-1, 1, 1, 1)
            return alpha_bar, torch.ones_like(alpha_bar)
        sigma = self.sigma.double()[t.cpu()].view(-1, 1, 1, 1)
        return (1 - sigma).square(), (1 - sigma).square() + sigma.square()

    def network_time(self, t: Tensor) -> Tensor:
        """Returns what networks of diffusers read as the time: t itself, and T sigma_t in flow matching.

        Args:
            t: time steps, int64, shape (N,).
        """
        return self.sigma.to(t.device)[t] * self.steps if self.flows else t

    @staticmethod
    def with_steps(x: Tensor, t: Tensor) -> Tensor:
        """Returns a denoiser's inputs: images x_t, with their time steps as one more channel."""
        return torch.cat([x, t.to(x).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], 1)

    def step_back(self, x: Tensor, noise: Tensor, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        """Removes noise by DDIM without new noise (Song et al. 2021, Eq. 12).

        With the shares a and b, x_0 is estimated as (x_t - b_t epsilon) / a_t, and x_s at an earlier step s is
        a_s x_0 + b_s epsilon. If the scheduler clips estimates of x_0, they are clipped. In flow matching this is a
        step of Euler's method, as x_s = x_t + (sigma_s - sigma_t) (epsilon - x_0); no estimate is possible where
        sigma_t is 1.

        Args:
            x: images x_t, shape (N, C, H, W).
            noise: the predicted epsilon, like the images.
            now: t of each image, int64, shape (N,).
            then: s of each image, from 0 to t, int64, shape (N,).

        Returns:
            The images x_s, and the estimates of x_0.
        """
        (signal, spread), (later_signal, later_spread) = (self.shares(steps, x.device) for steps in (now, then))
        clean = (x - spread * noise) / signal
        if self.config.get("clip_sample", not self.flows):
            reach = float(self.config.get("clip_sample_range", 1.0))
            clean = clean.clamp(-reach, reach)
        return later_signal * clean + later_spread * noise, clean

    def describe(self) -> str:
        """Returns the schedule in a few words."""
        c = self.config
        if self.flows:
            return f"flow matching, {self.steps} steps, shift {c['shift']:g}"
        return f"{c['beta_schedule']}, {self.steps} steps, beta {c['beta_start']:g} to {c['beta_end']:g}"

    def same_noise(self, other: Schedule) -> bool:
        """Whether both give the same x_t."""
        if self.flows != other.flows or self.steps != other.steps:
            return False
        return bool(torch.allclose(self.alpha_bar, other.alpha_bar, rtol=1e-4, atol=1e-6))

    def scheduler(self) -> Any:
        """Returns a scheduler of diffusers with this noise, of the class that the configuration names.

        Example:
            >>> type(Schedule.named("flow").scheduler()).__name__
            'FlowMatchEulerDiscreteScheduler'
        """
        import diffusers

        kind = getattr(diffusers, self.config["_class_name"])
        return kind.from_config({k: v for k, v in self.config.items() if k != "_class_name"})


def _alpha_bar(scheduler: Any) -> Tensor:
    if hasattr(scheduler, "alphas_cumprod"):
        alpha_bar: Tensor = scheduler.alphas_cumprod
        return alpha_bar
    return (1 - _sigma(scheduler)).square()


def _sigma(scheduler: Any) -> Tensor:
    sigma: Tensor = scheduler.sigmas.float().flip(0)
    return sigma


def _check_flow(scheduler: Any, config: Mapping[str, Any]) -> None:
    """Refuses flow matching whose sigmas do not rise from above 0 to at most 1; NaN is refused."""
    sigma = _sigma(scheduler)
    rises = len(sigma) > 0 and bool(((sigma > 0) & (sigma <= 1)).all()) and bool((sigma.diff() > 0).all())
    if not rises or scheduler.config.invert_sigmas:
        raise HoldfastError(
            f"The schedule of flow matching {dict(config)} is not valid: its sigmas must rise from above 0 to at most "
            "1. Correct num_train_timesteps and shift, and leave invert_sigmas out."
        )


def _scheduler(config: Mapping[str, Any]) -> Any:
    try:
        from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
    except ImportError as error:
        raise HoldfastError(
            "Denoising needs the package diffusers, which is not installed: pip install 'holdfast[generation]'."
        ) from error
    kind = FlowMatchEulerDiscreteScheduler if config.get("_class_name") == FLOW_SCHEDULER else DDPMScheduler
    try:
        return kind.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    except Exception as error:  # a configuration from elsewhere may raise anything
        raise HoldfastError(f"The noise schedule {dict(config)} is refused by diffusers: {error}.") from error
