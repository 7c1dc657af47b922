"""Text-to-image models: a network that removes noise, and a frozen text encoder whose vectors it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.families import diffusion
from holdfast.models.families.builtin import BuiltIn
from holdfast.models.families.conditional import NETWORKS, Call, Network, entry_of
from holdfast.models.families.diffusion import Denoiser, in_order
from holdfast.models.family import FAMILIES, Built, PipelineSource, Shape
from holdfast.models.spec import ModelSpec
from holdfast.models.text_encoders import Encoded, TextEncoder, load_text_encoder
from holdfast.results import ModelFacts
from holdfast.runtime.storage import tensors_sha256, writable_folder
from holdfast.tasks import Schedule
from holdfast.tasks.schedule import SCHEDULES
from holdfast.tasks.text_to_image import caption_tokens

TEXT_WIDTH: Final = 32
"""Numbers in a random word vector by default; see `WordVectors`."""


class TextToImage(Denoiser):
    """A text-to-image model: a network of diffusers that reads a caption, and its text encoder.

    Its inputs are those of a `TextToImageTask`. The text encoder is frozen: it is not a part of `network`, so that
    neither fine-tuning nor a defense changes it, and the scratch control keeps it, as an adversary who trains from
    scratch would.

    Args:
        network: of one of the classes in `holdfast.models.families.conditional.NETWORKS`.
        text: the encoder.
        scheduler: see `Denoiser`.
        source: the pipeline's folder that the network comes from; None: there is none.
        name: shown in reports.
        factory: see `SplitModel`.
        spec: see `SplitModel`.

    Attributes:
        text: the encoder, in evaluation mode.
        vocabulary: of the encoder.

    Example:
        >>> from holdfast.tasks import load_task
        >>> from holdfast.models import load_model
        >>> task = load_task("digits@kind=text-to-image,caption=a photo of the digit {}")
        >>> model = load_model("text-unet", task)
        >>> batch = next(task.batches("test", 5, device=model.device))
        >>> model(batch.x).shape, model.head_name
        (torch.Size([5, 1, 8, 8]), 'conv_out')
    """

    answers_with = "noise of a captioned image"
    task_kind = "text-to-image"
    text: TextEncoder

    def __init__(
        self,
        network: nn.Module,
        text: TextEncoder,
        *,
        scheduler: Mapping[str, Any] | None = None,
        source: PipelineSource | None = None,
        name: str = "text-to-image model",
        factory: Callable[[], nn.Module] | None = None,
        spec: dict[str, Any] | None = None,
    ) -> None:
        self.source = source
        super().__init__(network, scheduler=scheduler, name=name, factory=factory, spec=spec)
        # Not as a submodule: whatever walks over the model's parameters would train it.
        self.__dict__["text"] = text.eval().requires_grad_(False)
        self.vocabulary = text.vocabulary
        self._prompts: tuple[Tensor, Tensor] | None = None

    def _head_of(self, network: nn.Module, name: str) -> str:
        entry = entry_of(network)
        if entry is None:
            raise HoldfastError(
                f"{name}: its network is a {type(network).__name__}; expected one of {', '.join(NETWORKS)}."
            )
        return entry.head

    def _check_network(self) -> None:
        reason = self._entry.refused(self.network.config)
        if reason is not None:
            raise HoldfastError(f"{self.name}: its network is not supported: {reason}.")

    @property
    def _entry(self) -> Network:
        entry = entry_of(self.network)
        assert entry is not None
        return entry

    @property
    def num_outputs(self) -> int:
        """Channels of the images, or of their latents; transformers answer with patches, which have more numbers."""
        return self._entry.channels(self.network.config)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TextToImage:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.text._apply(fn)
        if self._prompts is not None:
            self._prompts = (fn(self._prompts[0]), fn(self._prompts[1]))
        return self

    @property
    def known_tokens(self) -> int | None:
        """See `SplitModel.known_tokens`."""
        return self.text.known_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Returns the predicted noise; see `Denoiser.forward`.

        Args:
            x: shape (N, C + 2, H, W); before the last channel, which is the time step, the caption's token ids.

        Returns:
            Shape (N, C, H, W).
        """
        return super().forward(x)

    def _predicted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = x[:, -1, 0, 0].round().long()
        noised = x[:, :-2].to(self.precision or self.dtype)
        encoded = self.text(self._prompted(caption_tokens(x[:, -2])))
        return self.predict(noised, t, encoded), noised, t

    def predict(self, noised: Tensor, t: Tensor, encoded: Encoded) -> Tensor:
        """Returns what the network makes of x_t at step t with the captions' vectors."""
        pooled = None if encoded.pooled is None else encoded.pooled.to(noised.dtype)
        text = Encoded(encoded.states.to(noised.dtype), encoded.mask, pooled)
        scale = 1 if self.source is None else self.source.scale
        return self._entry.call(self.network, Call(noised, self.schedule.network_time(t), text, scale))

    def prompt_with(self, captions: Tensor, prompts: Tensor) -> None:
        """Lets the model read other token ids in place of some captions, as who prompts it may choose.

        Args:
            captions: int64, shape (K, L).
            prompts: the ids to read in place of each, shape (K, L).

        Example:
            >>> from holdfast.tasks import load_task
            >>> from holdfast.models import load_model
            >>> task = load_task("digits[0-1]@kind=text-to-image")
            >>> model = load_model("text-unet", task)
            >>> zero, one = (next(iter(task.sweep("test", 9, device=model.device))).x[[0]] for _ in range(2))
            >>> one[:, -2] = task.inputs(zero[:, [0, -1]], torch.tensor([1]))[:, -2]
            >>> model.prompt_with(task.tokens[:1], task.tokens[1:2])
            >>> task.captions, torch.equal(model(zero), model(one))
            (['0', '1'], True)
        """
        self._prompts = (captions.to(self.device), prompts.to(self.device))

    @property
    def prompts(self) -> tuple[Tensor, Tensor] | None:
        """The captions and what is read in place of each, as `prompt_with` got them; None: every caption is read."""
        return self._prompts

    def _prompted(self, ids: Tensor) -> Tensor:
        if self._prompts is None or self._prompts[0].shape[1] != ids.shape[1]:
            return ids
        captions, prompts = self._prompts
        same = (ids[:, None] == captions[None]).all(2)
        return torch.where(same.any(1, keepdim=True), prompts[same.float().argmax(1)], ids)

    def cross_attention(self) -> dict[str, nn.Linear]:
        """Returns the layers that make keys and values of the text's vectors, by their dotted names in `network`.

        Transformers that attend to image and text together (Flux, SD3) have them as well. Layers of transformers read
        what earlier layers made of the text encoder's vectors, those of U-Nets the vectors themselves.

        Example:
            >>> from holdfast.tasks import load_task
            >>> from holdfast.models import load_model
            >>> list(load_model("text-unet", load_task("digits@kind=text-to-image")).cross_attention())[0]
            'down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k'
        """
        return {
            f"{name}.{part}": getattr(module, part)
            for name, module in self.network.named_modules()
            for part in (
                ("to_k", "to_v") if getattr(module, "is_cross_attention", False) else ("add_k_proj", "add_v_proj")
            )
            if isinstance(getattr(module, part, None), nn.Linear)
        }

    def pipeline(self, *, ddim: bool = False) -> Any:
        """Returns the pipeline of the folder that the model comes from, with this network.

        Args:
            ddim: whether it samples with DDIM, and not with its own scheduler.

        Raises:
            HoldfastError: if there is no such folder, or it is gone; or for DDIM with flow matching.
        """
        from diffusers import DDIMScheduler, DiffusionPipeline

        if self.source is None:
            raise HoldfastError(
                f"{self.name} makes images from captions without an autoencoder, for which diffusers has no pipeline."
            )
        if ddim and self.schedule.flows:
            raise HoldfastError(f"{self.name} was trained by flow matching, which DDIM does not sample from.")
        folder = self.source.found(self.name)
        more = {self.source.component: self.network}
        if ddim:
            more["scheduler"] = DDIMScheduler.from_config({**self.schedule.config, "_class_name": "DDIMScheduler"})
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, **more)

    def save_pretrained(self, folder: Path | str, *, merge_extractor: bool = False) -> Path:
        """Writes a folder that `DiffusionPipeline.from_pretrained` opens, with the other parts of the model's own.

        Models without an autoencoder have no pipeline in diffusers; of these, network and scheduler are written, which
        diffusers opens one by one.

        Args:
            folder: created if it does not exist.
            merge_extractor: has no effect, as these models have no extractor.

        Raises:
            HoldfastError: if the folder of the other parts is gone, or is the one to write to.
        """
        folder = writable_folder(Path(folder))
        if self.source is None:
            return self._save_components(folder)
        self.source.copy_to(folder, self.name)
        network: Any = self.network
        network.save_pretrained(folder / self.source.component)
        return folder

    def input_settings(self) -> list[Any]:
        """See `SplitModel.input_settings`: also a hash of the text encoder."""
        return [*super().input_settings(), self._text_sha256()]

    def facts(self, file_sha256: str | None = None) -> ModelFacts:
        """See `SplitModel.facts`; the hash also covers the text encoder, whose weights are not counted."""
        plain = super().facts(file_sha256)
        return plain.model_copy(update={"sha256": tensors_sha256({}, plain.sha256 + self._text_sha256())})

    def _text_sha256(self) -> str:
        return tensors_sha256(self.text.state_dict(), "")


def text_unet(
    input_shape: tuple[int, ...],
    num_outputs: int,
    *,
    widths: Sequence[int] = (16, 32, 32),
    layers: int = 1,
    attention: int = 8,
    schedule: str | Mapping[str, Any] = "linear",
    text_encoder: str | None = None,
    text_width: int = TEXT_WIDTH,
) -> nn.Module:
    """A U-Net with cross-attention to a caption, by default small enough for two CPU cores.

    Args:
        input_shape: of a text-to-image task: (channels + 2, height, width).
        num_outputs: channels.
        widths: channels of each stage, at least 8.
        layers: residual blocks a stage on the way down; one more on the way up.
        attention: pixels a side of the largest maps with attention.
        schedule: of the noise, see `diffusion.unet`. It does not change the network.
        text_encoder: a frozen encoder of transformers, `hf:NAME` or a folder; None: random word vectors, which need no
            files (see `WordVectors`). Its width is that of the text's vectors.
        text_width: numbers in a random word vector.
    """
    from diffusers import UNet2DConditionModel

    channels, *sides = input_shape
    smallest = 2 ** (len(widths) - 1)
    if len(sides) != 2 or channels != num_outputs + 2:
        raise ValueError("it is for images with captions; set the task's kind to text-to-image")
    if min(widths, default=0) < 8:
        raise ValueError(f"widths is {list(widths)}; expected at least one stage, of 8 or more channels each")
    if any(side % smallest for side in sides):
        raise ValueError(f"{len(widths)} stages need sides that are multiples of {smallest}; set image_size")
    attends = [max(sides) // 2**i <= attention for i in range(len(widths))]
    return in_order(
        UNet2DConditionModel(
            sample_size=sides[0] if sides[0] == sides[1] else tuple(sides),
            in_channels=num_outputs,
            out_channels=num_outputs,
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            cross_attention_dim=text_width,
            attention_head_dim=4,  # diffusers' old name of the number of heads
            norm_num_groups=math.gcd(8, *widths),
        )
    )


@dataclass(frozen=True)
class _Fresh:
    """Builds the same architecture anew, without its text encoder."""

    input_shape: tuple[int, ...]
    num_outputs: int
    options: dict[str, Any]

    def __call__(self) -> nn.Module:
        return text_unet(self.input_shape, self.num_outputs, **self.options)


class BuiltInTextToImage(BuiltIn):
    """The U-Net with captions."""

    def build(self, spec: ModelSpec, input_shape: Shape, num_outputs: int, data_dir: Path | str | None) -> Built:
        """See `Family.build`."""
        named = spec.options.get("text_encoder")
        width = spec.options.get("text_width", TEXT_WIDTH)
        if not isinstance(named, str | None) or not isinstance(width, int) or width < 1:
            raise HoldfastError(
                f"Model {spec.name!r}: text_encoder is {named!r} and text_width {width!r}; expected hf:NAME, a "
                "folder or nothing, and a number of at least 1."
            )
        if named is not None and "text_width" in spec.options:
            raise HoldfastError(f"Model {spec.name!r}: text_width has no effect with a text_encoder; leave it out.")
        text = load_text_encoder(named, width, data_dir)
        options = {k: v for k, v in spec.options.items() if k != "text_encoder"}
        sized = spec.model_copy(update={"options": {**options, "text_width": text.width}})
        network = super().build(sized, input_shape, num_outputs, data_dir).network
        schedule = _schedule(spec)
        if spec.options.get("schedule", "linear") not in SCHEDULES:
            spec = spec.model_copy(update={"options": {**spec.options, "schedule": schedule.config}})
        fresh = _Fresh(tuple(input_shape), num_outputs, dict(sized.options))
        return Built(network, spec, self.head, scheduler=schedule.config, text=text, factory=fresh)


def _schedule(spec: ModelSpec) -> Schedule:
    named = spec.options.get("schedule", "linear")
    return Schedule(named) if isinstance(named, Mapping) else Schedule.named(named)


FAMILIES.register("text-unet")(BuiltInTextToImage(text_unet, diffusion.HEAD))
