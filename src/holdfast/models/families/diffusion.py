"""Denoisers: U-Nets of diffusers, built in or from a folder, and saved as a folder of diffusers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError, unknown
from holdfast.models.family import Built, Family, Shape, check_known, register
from holdfast.models.introspection import first_line
from holdfast.models.spec import ModelSpec
from holdfast.models.split_model import SplitModel
from holdfast.runtime.storage import writable_folder
from holdfast.tasks import Schedule, located

HEAD: Final = "conv_out"
"""The last layer of a U-Net of diffusers."""

PREDICTIONS: Final = ("epsilon", "v_prediction", "sample")
"""Quantities that a network may predict, by their names in diffusers; see `Denoiser.forward`."""


class Denoiser(SplitModel):
    """A diffusion model: a U-Net, and the scheduler that it was trained with.

    Its inputs are those of a `DenoisingTask`: noised images with their time steps as the last channel. Its head is the
    last convolution, which makes the image.

    Args:
        network: a `UNet2DModel` of diffusers with as many output as input channels.
        scheduler: configuration of its DDPM or DDIM scheduler; None: that of Ho et al. 2020.
        name: shown in reports.
        factory: see `SplitModel`.
        spec: see `SplitModel`.

    Attributes:
        schedule: of the noise that it was trained on.

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
        super().__init__(network, HEAD, name=name, factory=factory, spec=spec, channels_last=False)
        self.schedule = Schedule(scheduler)
        self.predicts = str(self.schedule.config.get("prediction_type", "epsilon"))
        if self.predicts not in PREDICTIONS:
            raise unknown("prediction_type of the scheduler:", self.predicts, PREDICTIONS)
        config: Any = network.config
        if config.in_channels != config.out_channels:
            raise HoldfastError(
                f"{name}: the network takes {config.in_channels} channels and returns {config.out_channels}; networks "
                "that also predict a variance are not supported."
            )
        if config.num_class_embeds is not None or config.class_embed_type is not None:
            raise HoldfastError(f"{name}: the network needs the class of each image; give an unconditional one.")

    def _check_head(self) -> None:
        if not isinstance(getattr(self.network, HEAD, None), nn.Conv2d):
            raise HoldfastError(f"{self.name}: the network has no last convolution {HEAD!r}; expected a UNet2DModel.")

    def forward(self, x: Tensor) -> Tensor:
        """Returns the predicted noise, computed from the network's prediction.

        With a = alpha-bar_t, v = sqrt(a) epsilon - sqrt(1 - a) x_0 (Salimans and Ho 2022), so that
        epsilon = sqrt(a) v + sqrt(1 - a) x_t; and from x_0, epsilon = (x_t - sqrt(a) x_0) / sqrt(1 - a).

        Args:
            x: shape (N, C + 1, H, W); the last channel is the time step.

        Returns:
            Shape (N, C, H, W).
        """
        t = x[:, -1, 0, 0].round().long()
        noised = x[:, :-1].to(self.precision or self.dtype)
        output: Tensor = self.network(noised, t).sample
        return self.noise_of(output, noised, t)

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
        if self.predicts == "v_prediction":
            return (signal * output + spread * noised).to(output.dtype)
        return ((noised - signal * output) / spread).to(output.dtype)

    def not_probed(self, depth: int) -> str | None:
        """See `SplitModel.not_probed`: for the last block of models that predict epsilon."""
        if self.predicts != "epsilon":
            return f"a probe reads the noise from features, and the network predicts {self.predicts}"
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
        old: Any = self.head
        if num_outputs not in (None, old.out_channels):
            raise HoldfastError(
                f"{self.name} makes images of {old.out_channels} channels, and {num_outputs} are needed; set the "
                "task's channels."
            )
        like = {"padding": old.padding, "device": old.weight.device, "dtype": old.weight.dtype}
        self.put_head(nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, **like))

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
        size = config.sample_size
        sides = (size, size) if isinstance(size, int) else size
        return None if sides is None else (config.in_channels, *sides)

    def pipeline(self, *, ddim: bool = False) -> Any:
        """Returns a diffusers pipeline that shares this network: `DDPMPipeline`, or `DDIMPipeline`."""
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

        config = {k: v for k, v in self.schedule.config.items() if k != "_class_name"}
        if ddim or self.schedule.config["_class_name"] == "DDIMScheduler":
            return DDIMPipeline(self.network, DDIMScheduler.from_config(config))
        return DDPMPipeline(self.network, DDPMScheduler.from_config(config))

    def save_pretrained(self, folder: Path | str, *, merge_extractor: bool = False) -> Path:
        """Writes a folder that `DDPMPipeline.from_pretrained` opens (or DDIM's). A denoiser has no extractor."""
        folder = writable_folder(Path(folder))
        self.pipeline().save_pretrained(folder)
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


def in_order(network: nn.Module) -> nn.Module:
    """Orders a U-Net's stages as they run, in place, so that its last block is found.

    diffusers registers the middle after the up blocks.
    """
    for name in ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", HEAD):
        if name in network._modules:
            network._modules[name] = network._modules.pop(name)
    return network


def is_pipeline(name: str) -> bool:
    """Whether a name is that of a folder with a pipeline of diffusers."""
    return (Path(name).expanduser() / "model_index.json").is_file()


def architecture(config: Mapping[str, Any]) -> nn.Module:
    """Builds a U-Net with fresh weights from its configuration, without reading or fetching any.

    Raises:
        HoldfastError: if diffusers cannot build it.
    """
    from diffusers import UNet2DModel

    try:
        return in_order(UNet2DModel.from_config(dict(config)))
    except Exception as error:  # the configuration may hold anything
        raise HoldfastError(f"No U-Net can be built from its configuration: {first_line(error)}.") from error


def pretrained(place: str) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
    """Loads a U-Net with its weights: safetensors only, and no code beside that of diffusers.

    Args:
        place: a folder with a pipeline, or a name on the Hub (which needs a network, or its cache).

    Returns:
        The network, the configuration of its scheduler, and notes for a reader.

    Raises:
        HoldfastError: if the model does not exist, or is not an unconditional U-Net.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    root = Path(place).expanduser()
    local = root.is_dir()
    notes: tuple[str, ...] = ()
    if local:
        _check_index(root)
        if (root / "unet_ema").is_dir():
            notes = (
                f"{place} has averaged weights (EMA) in unet_ema beside those in unet, which were used. For the "
                "averaged ones, give the file in unet_ema as --weights (`weights:` in a recipe).",
            )
    try:
        inside = local or _is_nested(place)
        network, info = UNet2DModel.from_pretrained(
            place,
            subfolder="unet" if inside else None,
            use_safetensors=True,
            local_files_only=local,
            low_cpu_mem_usage=False,  # otherwise missing tensors have no values
            output_loading_info=True,
        )
        scheduler = DDPMScheduler.load_config(place, subfolder="scheduler" if inside else None, local_files_only=local)
    except Exception as error:  # a network, a cache and unknown files may raise anything
        raise HoldfastError(
            f"diffusers:{place} cannot be loaded as a UNet2DModel in safetensors with a scheduler: {first_line(error)}."
        ) from error
    if not isinstance(scheduler, dict):
        raise HoldfastError(f"diffusers:{place}: {scheduler!r} is not a scheduler's configuration.")
    if info["missing_keys"]:
        raise HoldfastError(f"diffusers:{place} has no weights for {', '.join(sorted(info['missing_keys'])[:3])}.")
    return in_order(network.eval()), scheduler, notes


def _is_nested(name: str) -> bool:
    """Whether a model on the Hub keeps its parts in folders; some old ones do not."""
    from diffusers import UNet2DModel

    try:
        UNet2DModel.load_config(name, subfolder="unet")
    except OSError:
        return False
    return True


def _check_index(root: Path) -> None:
    index = root / "model_index.json"
    if not index.is_file() and (root / "config.json").is_file():
        raise HoldfastError(f"diffusers:{root} is a folder of transformers; name it hf:{root}.")
    try:
        parts = json.loads(index.read_bytes())
        kind = parts.get("unet")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise HoldfastError(f"{str(root)!r} is not a folder of a diffusers pipeline: {first_line(error)}.") from error
    if kind != ["diffusers", "UNet2DModel"]:
        raise HoldfastError(
            f"{str(root)!r} holds a pipeline ({parts.get('_class_name')}) whose unet is {kind}; expected an "
            "unconditional one, ['diffusers', 'UNet2DModel']."
        )


@register("diffusers:NAME")
class DiffusersFamily(Family):
    """Pipelines of diffusers, by a folder or a name on the Hub."""

    def build(self, spec: ModelSpec, input_shape: Shape, num_outputs: int, data_dir: Path | str | None) -> Built:
        """See `Family.build`."""
        check_known(spec, ["config", "scheduler"])
        if "config" in spec.options:
            network = architecture(spec.options["config"])
            return Built(network, spec, scheduler=spec.options.get("scheduler") or {})
        place = located(spec.name.removeprefix("diffusers:"), data_dir)
        network, scheduler, notes = pretrained(place)
        plain = {k: v for k, v in dict(network.config).items() if not k.startswith("_")}
        rebuild = spec.model_copy(
            update={
                "name": f"diffusers:{Path(place).name}" if Path(place).is_dir() else spec.name,
                "options": {"config": json.loads(json.dumps(plain)), "scheduler": Schedule(scheduler).config},
            }
        )
        return Built(network, rebuild, scheduler=scheduler, loaded=spec.weights is None, notes=notes)

    def name_of_folder(self, folder: Path) -> ModelSpec | None:
        """See `Family.name_of_folder`."""
        return ModelSpec(name=f"diffusers:{folder}") if is_pipeline(str(folder)) else None
