"""Denoisers: U-Nets of diffusers, and how they are saved as a folder of diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError, unknown
from holdfast.models.split_model import SplitModel
from holdfast.runtime.storage import writable_folder
from holdfast.tasks import Schedule
from holdfast.tasks.schedule import FLOW

HEAD: Final = "conv_out"
"""The last layer of a U-Net of diffusers."""

PREDICTIONS: Final = ("epsilon", "v_prediction", "sample")
"""Quantities that a network may predict, by their names in diffusers; see `Denoiser.forward`."""

UNET_ORDER: Final = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", HEAD)
"""Stages of a U-Net as they run, after the embedding of time; diffusers registers the middle after the up blocks."""


class Denoiser(SplitModel):
    """A diffusion model: a U-Net, and the scheduler that it was trained with.

    Its inputs are those of a `DenoisingTask`: noised images with their time steps as the last channel. Its head is the
    last convolution, which makes the image.

    Args:
        network: a `UNet2DModel` of diffusers with as many output as input channels.
        scheduler: configuration of its scheduler, see `Schedule`; None: that of Ho et al. 2020.
        name: shown in reports.
        factory: see `SplitModel`.
        spec: see `SplitModel`.

    Attributes:
        schedule: of the noise that it was trained on.
        predicts: one of `PREDICTIONS`, or `flow`: what the network predicts.

    Raises:
        HoldfastError: if the network also predicts a variance or needs a class, or the scheduler is not supported.

    Example:
        >>> from holdfast.tasks import load_task
        >>> from holdfast.models import load_model
        >>> task = load_task("digits@kind=denoising")
        >>> model = load_model("unet", task)
        >>> batch = next(task.batches("test", 5, device=model.device))
        >>> model(batch.x).shape, model.head_name
        (torch.Size([5, 1, 8, 8]), 'conv_out')
    """

    answers_with = "noise"
    task_kind: ClassVar[str] = "denoising"
    """The kind of the tasks that it fits, for messages."""

    def __init__(
        self,
        network: nn.Module,
        *,
        scheduler: Mapping[str, Any] | None = None,
        name: str = "denoiser",
        factory: Callable[[], nn.Module] | None = None,
        spec: dict[str, Any] | None = None,
    ) -> None:
        head = self._head_of(network, name)
        super().__init__(network, head, name=name, factory=factory, spec=spec, channels_last=False)
        self.schedule = Schedule(scheduler)
        self.predicts = FLOW if self.schedule.flows else str(self.schedule.config.get("prediction_type", "epsilon"))
        if not self.schedule.flows and self.predicts not in PREDICTIONS:
            raise unknown("prediction_type of the scheduler:", self.predicts, PREDICTIONS)
        self._check_network()

    def _head_of(self, network: nn.Module, name: str) -> str:
        """The dotted name of the last layer."""
        if not isinstance(getattr(network, HEAD, None), nn.Conv2d):
            raise HoldfastError(f"{name}: the network has no last convolution {HEAD!r}; expected a UNet2DModel.")
        return HEAD

    def _check_head(self) -> None:
        """A denoiser's head need not be 1x1; `_head_of` has found it."""

    def _check_network(self) -> None:
        """Refuses a network that `forward` does not call rightly."""
        config: Any = self.network.config
        if config.in_channels != config.out_channels:
            raise HoldfastError(
                f"{self.name}: the network takes {config.in_channels} channels and returns {config.out_channels}; "
                "networks that also predict a variance are not supported."
            )
        if config.num_class_embeds is not None or config.class_embed_type is not None:
            raise HoldfastError(f"{self.name}: the network needs the class of each image; give an unconditional one.")

    def forward(self, x: Tensor) -> Tensor:
        """Returns the predicted noise, computed from the network's prediction.

        With a = alpha-bar_t, v = sqrt(a) epsilon - sqrt(1 - a) x_0 (Salimans and Ho 2022), so that
        epsilon = sqrt(a) v + sqrt(1 - a) x_t; and from x_0, epsilon = (x_t - sqrt(a) x_0) / sqrt(1 - a). In flow
        matching, u = epsilon - x_0, so that epsilon = x_t + (1 - sigma_t) u.

        Args:
            x: shape (N, C + 1, H, W); the last channel is the time step.

        Returns:
            Shape (N, C, H, W).
        """
        return self.noise_of(*self._predicted(x))

    def _predicted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the network returns for inputs, x_t in its precision, and the time steps."""
        t = x[:, -1, 0, 0].round().long()
        noised = x[:, :-1].to(self.precision or self.dtype)
        output: Tensor = self.network(noised, self.schedule.network_time(t)).sample
        return output, noised, t

    def noise_of(self, output: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """Returns the noise that the network's prediction means; see `forward`.

        Args:
            output: what the network returned, shape (N, C, H, W).
            noised: x_t, like the output.
            t: time steps, int64, shape (N,).
        """
        if self.predicts == "epsilon":
            return output
        # In float32 at least: in bfloat16, 0.9999 is 1, and 1 - alpha-bar would be 0.
        signal, spread = self.schedule.shares(t.clamp(0, self.schedule.steps - 1), t.device)
        if self.predicts == FLOW:
            return (noised + signal * output).to(output.dtype)
        if self.predicts == "v_prediction":
            return (signal * output + spread * noised).to(output.dtype)
        return ((noised - signal * output) / spread).to(output.dtype)

    def prediction_errors(self, x: Tensor, noise: Tensor) -> Tensor:
        """Returns the squared errors of what the network predicts, which training scripts descend.

        With the shares a and b of `Schedule.shares`, the noise epsilon in x_t means v = (epsilon - b x_t) / a, the flow
        u = (epsilon - x_t) / a, and x_0 = (x_t - b epsilon) / a; see `forward`. They are compared in float32 at least,
        as 1 / a would amplify the rounding of a noise in half precision.

        Args:
            x: inputs, as `forward` takes them.
            noise: epsilon, shape (N, C, H, W).

        Returns:
            Means over the pixels, shape (N,); 0 for an image of which nothing is left, as it has no target.

        Example:
            >>> import torch
            >>> from holdfast.tasks import load_task
            >>> from holdfast.models import ModelSpec, load_model
            >>> task = load_task("digits@kind=denoising,schedule=flow")
            >>> model = load_model(ModelSpec(name="unet", options={"schedule": "flow"}), task)
            >>> batch = next(task.sweep("test", 2, device=model.device))
            >>> errors = model.prediction_errors(batch.x, batch.y)
            >>> errors.shape, bool(torch.allclose(task.loss(model, batch), errors.mean()))
            (torch.Size([2]), True)
        """
        output, _, t = self._predicted(x)
        noised, target = x[:, : noise.shape[1]], noise
        signal, spread = self.schedule.shares(t, x.device)
        left = signal > 0
        share = torch.where(left, signal, 1.0)  # a target that is not finite would make gradients NaN
        if self.predicts == FLOW:
            target = (noise - noised) / share
        elif self.predicts == "v_prediction":
            target = (noise - spread * noised) / share
        elif self.predicts == "sample":
            target = (noised - spread * noise) / share
        errors = (output - target).square().flatten(1).mean(1)  # of float32, as the target is
        return torch.where(left.flatten(), errors, 0.0) if self.predicts != "epsilon" else errors

    def not_probed(self, depth: int) -> str | None:
        """See `SplitModel.not_probed`: for the last block of models that predict epsilon."""
        if self.predicts != "epsilon":
            return f"a probe reads the noise from features, and the network predicts {self.predicts}"
        if not isinstance(self.head, nn.Conv2d):
            return "a probe reads the noise at each pixel, and the network's head makes patches"
        return None if depth == 1 else f"the depth of a probe is {depth}; expected 1 for a denoiser"

    def features_by_depth(self, x: Tensor, depth: int) -> list[Tensor]:
        """Returns what the last convolution sees at each pixel; see `SplitModel.features_by_depth`.

        Args:
            x: inputs as a task yields them, shape (N, C + 1, H, W).
            depth: 1.

        Returns:
            One tensor of shape (N H W, D), where D counts the channels within the convolution's kernel: the head
            is a linear map of a row.

        Raises:
            HoldfastError: if `not_probed`.
        """
        reason = self.not_probed(depth)
        if reason is not None:
            raise HoldfastError(f"{self.name}: {reason}.")
        head: Any = self.head
        maps = self.features(x).view(len(x), head.in_channels, *x.shape[2:])
        patches = F.unfold(maps, head.kernel_size, padding=head.padding)
        return [patches.movedim(1, -1).flatten(0, 1)]

    def reset_head(self, num_outputs: int | None = None) -> None:
        """See `SplitModel.reset_head`; the number of outputs stays that of the images' channels."""
        if num_outputs not in (None, self.num_outputs):
            raise HoldfastError(
                f"{self.name} makes images of {self.num_outputs} channels, and {num_outputs} are needed; set the "
                "task's channels."
            )
        old: Any = self.head
        like = {"device": old.weight.device, "dtype": old.weight.dtype}
        if isinstance(old, nn.Linear):
            self.put_head(nn.Linear(old.in_features, old.out_features, old.bias is not None, **like))
        else:
            self.put_head(
                nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, padding=old.padding, **like)
            )  # fmt: skip

    def input_settings(self) -> list[Any]:
        """See `SplitModel.input_settings`: also the configuration of the schedule."""
        return [*super().input_settings(), self.schedule.config]

    def add_extractor(self) -> None:
        """Refused: a U-Net's last convolution takes a map over pixels, not a vector of features.

        Raises:
            HoldfastError: always.
        """
        raise HoldfastError(f"{self.name}: a linear extractor goes before a linear head, and a denoiser has none.")

    def check_schedule(self, schedule: Schedule, task: str) -> None:
        """Refuses a task whose noise schedule is not the model's own.

        Raises:
            HoldfastError: naming both, and how to set the task's.
        """
        if not schedule.same_noise(self.schedule):
            raise HoldfastError(
                f"{self.name} was trained on the noise schedule {self.schedule.describe()}, and its task {task!r} has "
                f"{schedule.describe()}. Set the task's: {task}@kind={self.task_kind},schedule=..., with a name "
                "or with the model's folder."
            )

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of the images that its pipelines draw; None: the configuration has no size."""
        config: Any = self.network.config
        size = config.get("sample_size")
        sides = (size, size) if isinstance(size, int) else size
        return None if sides is None else (self.num_outputs, *sides)

    def pipeline(self, *, ddim: bool = False) -> Any:
        """Returns a diffusers pipeline that shares this network: `DDPMPipeline`, or `DDIMPipeline`.

        Raises:
            HoldfastError: for flow matching, for which diffusers has no such pipeline.
        """
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

        if self.schedule.flows:
            raise HoldfastError(f"{self.name}: diffusers has no pipeline for flow matching without a text.")

        config = {k: v for k, v in self.schedule.config.items() if k != "_class_name"}
        if ddim or self.schedule.config["_class_name"] == "DDIMScheduler":
            return DDIMPipeline(self.network, DDIMScheduler.from_config(config))
        return DDPMPipeline(self.network, DDPMScheduler.from_config(config))

    def save_pretrained(self, folder: Path | str, *, merge_extractor: bool = False) -> Path:
        """Writes a folder that `DDPMPipeline.from_pretrained` opens (or DDIM's). A denoiser has no extractor.

        For flow matching, the network and the scheduler are written, which diffusers opens one by one.
        """
        folder = writable_folder(Path(folder))
        if self.schedule.flows:
            return self._save_components(folder)
        self.pipeline().save_pretrained(folder)
        return folder

    def _save_components(self, folder: Path) -> Path:
        network: Any = self.network
        network.save_pretrained(folder / "unet")
        self.schedule.scheduler().save_pretrained(folder / "scheduler")
        return folder


def unet(
    input_shape: tuple[int, ...],
    num_outputs: int,
    *,
    widths: Sequence[int] = (16, 32, 32),
    layers: int = 1,
    attention: int = 8,
    schedule: str | Mapping[str, Any] = "linear",
) -> nn.Module:
    """A U-Net whose stages halve the size, with attention at small sizes; by default small enough for two CPU cores.

    That of Ho et al. 2020 for 32 pixels has the widths 128, 256, 256, 256, two layers, and attention at 16.

    Args:
        input_shape: of a denoising task: (channels + 1, height, width).
        num_outputs: channels.
        widths: channels of each stage, at least 8.
        layers: residual blocks a stage on the way down; one more on the way up.
        attention: pixels a side of the largest maps with attention, which dominates the cost at large sizes.
        schedule: of the noise: a name or a folder (see `Schedule.named`), or a scheduler's configuration. It does not
            change the network.
    """
    from diffusers import UNet2DModel

    channels, *sides = input_shape
    smallest = 2 ** (len(widths) - 1)
    if len(sides) != 2 or channels != num_outputs + 1:
        raise ValueError("a U-Net is for denoising; set the task's kind to denoising")
    if min(widths, default=0) < 8:  # a head of attention has 8 channels
        raise ValueError(f"widths is {list(widths)}; expected at least one stage, of 8 or more channels each")
    if any(side % smallest for side in sides):
        raise ValueError(f"{len(widths)} stages need sides that are multiples of {smallest}; set image_size")
    attends = [max(sides) // 2**i <= attention for i in range(len(widths))]
    return in_order(
        UNet2DModel(
            sample_size=sides[0] if sides[0] == sides[1] else tuple(sides),
            in_channels=num_outputs,
            out_channels=num_outputs,
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            norm_num_groups=math.gcd(8, *widths),
        )
    )


def in_order(network: nn.Module, names: Sequence[str] = UNET_ORDER) -> nn.Module:
    """Orders a network's stages as they run, in place, so that its last block is found.

    Args:
        network: changed in place.
        names: of its modules in this order; others come before them.
    """
    for name in names:
        if name in network._modules:
            network._modules[name] = network._modules.pop(name)
    return network
