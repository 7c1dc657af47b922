"""Pipelines of diffusers: unconditional ones become a `Denoiser`, those for text a `TextToImage`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models.families.conditional import NETWORKS
from holdfast.models.families.diffusion import UNET_ORDER, in_order
from holdfast.models.family import Built, Family, PipelineSource, Shape, check_known, register
from holdfast.models.introspection import first_line
from holdfast.models.spec import ModelSpec
from holdfast.models.text_encoders import Part, load_pipeline_text
from holdfast.tasks import Schedule, located
from holdfast.tasks.pipeline_folder import autoencoder_scale, is_pipeline, pipeline_index

UNCONDITIONAL: Final = "UNet2DModel"
"""The class of networks that read no text."""


@dataclass(frozen=True)
class TextPipeline:
    """A class of text-to-image pipelines.

    Attributes:
        component: the part that is the network.
        network: its class, see `NETWORKS`.
        text: what it reads of each of its text encoders.
    """

    component: str
    network: str
    text: tuple[Part, ...]


_PIXART: Final = TextPipeline("transformer", "PixArtTransformer2DModel", (Part(masked=True),))

TEXT_PIPELINES: Final[dict[str, TextPipeline]] = {
    "StableDiffusionPipeline": TextPipeline("unet", "UNet2DConditionModel", (Part(),)),
    "StableDiffusionXLPipeline": TextPipeline("unet", "UNet2DConditionModel", (Part("before"), Part("before", True))),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "FluxPipeline": TextPipeline("transformer", "FluxTransformer2DModel", (Part(None, True), Part())),
    "StableDiffusion3Pipeline": TextPipeline(
        "transformer", "SD3Transformer2DModel", (Part("before", True), Part("before", True), Part())
    ),
}
"""By the name of the class in diffusers."""


def architecture(config: Mapping[str, Any], kind: str = UNCONDITIONAL) -> nn.Module:
    """Builds a network with fresh weights from its configuration, without reading or fetching any.

    Args:
        config: may come from an untrusted file.
        kind: `UNet2DModel`, or a class of `NETWORKS`.

    Raises:
        HoldfastError: if diffusers cannot build it.
    """
    import diffusers

    try:
        return _ordered(getattr(diffusers, kind).from_config(dict(config)), kind)
    except Exception as error:  # the configuration may hold anything
        raise HoldfastError(f"No {kind} can be built from its configuration: {first_line(error)}.") from error


@dataclass(frozen=True)
class _Fresh:
    """Builds the same architecture anew, without its text encoders."""

    config: Mapping[str, Any]
    kind: str

    def __call__(self) -> nn.Module:
        return architecture(self.config, self.kind)


def _ordered(network: nn.Module, kind: str) -> nn.Module:
    return in_order(network, NETWORKS[kind].order if kind in NETWORKS else UNET_ORDER)


def pretrained(place: str, component: str = "unet", kind: str = UNCONDITIONAL) -> tuple[Any, dict[str, Any]]:
    """Loads a network with its weights: safetensors only, and no code beside that of diffusers.

    Args:
        place: a folder with a pipeline, or a name on the Hub (which needs a network, or its cache).
        component: the part of the pipeline.
        kind: its class.

    Returns:
        The network in float32, and the configuration of its scheduler.

    Raises:
        HoldfastError: if the model does not exist, or is of another class.
    """
    import diffusers

    local = Path(place).is_dir()
    try:
        inside = local or _is_nested(place)
        network, info = getattr(diffusers, kind).from_pretrained(
            place,
            subfolder=component if inside else None,
            use_safetensors=True,
            local_files_only=local,
            low_cpu_mem_usage=False,  # otherwise missing tensors have no values
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
        scheduler = diffusers.DDPMScheduler.load_config(
            place, subfolder="scheduler" if inside else None, local_files_only=local
        )
    except Exception as error:  # a network, a cache and unknown files may raise anything
        hint = "" if local else " Text-to-image pipelines are read from a folder; download it first."
        raise HoldfastError(
            f"diffusers:{place} cannot be loaded as a {kind} in safetensors with a scheduler: {first_line(error)}."
            f"{hint}"
        ) from error
    if not isinstance(scheduler, dict):
        raise HoldfastError(f"diffusers:{place}: {scheduler!r} is not a scheduler's configuration.")
    if info["missing_keys"]:
        raise HoldfastError(f"diffusers:{place} has no weights for {', '.join(sorted(info['missing_keys'])[:3])}.")
    return _ordered(network.eval(), kind), scheduler


def _is_nested(name: str) -> bool:
    """Whether a model on the Hub keeps its parts in folders; some old ones do not."""
    from diffusers import UNet2DModel

    try:
        UNet2DModel.load_config(name, subfolder="unet")
    except OSError:
        return False
    return True


def _kind_of(root: Path) -> TextPipeline | None:
    """The class of a folder's pipeline; None: an unconditional one.

    Raises:
        HoldfastError: for another class.
    """
    if not is_pipeline(root) and (root / "config.json").is_file():
        raise HoldfastError(f"diffusers:{root} is a folder of transformers; name it hf:{root}.")
    index = pipeline_index(root)
    named = str(index.get("_class_name"))
    kind = TEXT_PIPELINES.get(named)
    component = "unet" if kind is None else kind.component
    expected = ["diffusers", UNCONDITIONAL if kind is None else kind.network]
    if index.get(component) == expected:
        return kind
    wanted = f"an unconditional one, {expected}, or a text-to-image pipeline of {', '.join(TEXT_PIPELINES)}"
    raise HoldfastError(
        f"{str(root)!r} holds a pipeline ({named}) whose {component} is {index.get(component)}; expected "
        f"{wanted if kind is None else expected}."
    )


def _notes(root: Path) -> tuple[str, ...]:
    if not (root / "unet_ema").is_dir():
        return ()
    return (
        f"{root} has averaged weights (EMA) in unet_ema beside those in unet, which were used. For the averaged ones, "
        "give the file in unet_ema as --weights (`weights:` in a recipe).",
    )


@register("diffusers:NAME")
class DiffusersFamily(Family):
    """Pipelines of diffusers, by a folder; unconditional ones also by a name on the Hub."""

    def build(self, spec: ModelSpec, input_shape: Shape, num_outputs: int, data_dir: Path | str | None) -> Built:
        """See `Family.build`."""
        check_known(spec, ["config", "scheduler", "pipeline"])
        if spec.options.get("pipeline") is not None:
            return self._rebuilt(spec, num_outputs, data_dir)
        if "config" in spec.options:
            network = architecture(spec.options["config"])
            return Built(network, spec, scheduler=spec.options.get("scheduler") or {})
        place = located(spec.name.removeprefix("diffusers:"), data_dir)
        folder = Path(place).expanduser()
        local = folder.is_dir()
        kind = _kind_of(folder) if local else None
        if kind is None:
            network, scheduler = pretrained(str(folder) if local else place)
        else:
            network, scheduler = pretrained(str(folder), kind.component, kind.network)
        plain = {k: v for k, v in dict(network.config).items() if not k.startswith("_")}
        options = {"config": json.loads(json.dumps(plain)), "scheduler": Schedule(scheduler).config}
        if kind is not None:
            options["pipeline"] = str(folder.resolve())
        name = f"diffusers:{folder.name}" if local else spec.name
        rebuild = spec.model_copy(update={"name": name, "options": options})
        notes = _notes(folder) if local else ()
        built = Built(network, rebuild, scheduler=scheduler, loaded=spec.weights is None, notes=notes)
        return built if kind is None else _with_text(built, kind, folder, num_outputs)

    def _rebuilt(self, spec: ModelSpec, num_outputs: int, data_dir: Path | str | None) -> Built:
        """A text-to-image model whose weights were saved by Holdfast; its other parts are in its pipeline's folder."""
        given = spec.options["pipeline"]
        folder = Path(located(str(given), data_dir)).expanduser()
        if not is_pipeline(folder):
            raise HoldfastError(
                f"{spec.name} needs the text encoders of its pipeline, and {str(given)!r} is gone. If the folder was "
                "moved, name it as the model, diffusers:FOLDER, and the file as its weights."
            )
        kind = _kind_of(folder)
        if kind is None or not isinstance(spec.options.get("config"), Mapping):
            raise HoldfastError(
                f"{spec.name}: {str(folder)!r} is not the text-to-image pipeline that it was made from."
            )
        network = architecture(spec.options["config"], kind.network)
        built = Built(network, spec, scheduler=spec.options.get("scheduler") or {})
        return _with_text(built, kind, folder, num_outputs)

    def name_of_folder(self, folder: Path) -> ModelSpec | None:
        """See `Family.name_of_folder`."""
        return ModelSpec(name=f"diffusers:{folder}") if is_pipeline(folder) else None


def _with_text(built: Built, kind: TextPipeline, folder: Path, num_outputs: int) -> Built:
    """Adds the text encoders, and refuses a task whose images are not what the network reads."""
    config: Any = built.network.config
    channels = NETWORKS[kind.network].channels(config)
    scale = autoencoder_scale(folder)
    if channels != num_outputs:
        raise HoldfastError(
            f"{built.rebuild.name} reads latents of {channels} channels, and the task's images have {num_outputs}; set "
            f"the task's autoencoder to the model's folder: autoencoder={folder}."
        )
    return replace(
        built,
        text=load_pipeline_text(folder, kind.text),
        source=PipelineSource(str(folder.resolve()), kind.component, scale),
        factory=_Fresh(built.rebuild.options["config"], kind.network),
    )
