"""How the networks of text-to-image models are called: one entry of `NETWORKS` for each class of diffusers.

The calls are those of diffusers' own pipelines, with what these pass beside image, time and text: sizes in pixels for
SDXL and PixArt, the strength of guidance for Flux.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.families.diffusion import HEAD, UNET_ORDER
from holdfast.models.text_encoders import Encoded

PATCHES_HEAD: Final = "proj_out"
"""The last layer of a transformer of diffusers, which makes patches of the image."""

GUIDANCE: Final = 3.5
"""Strength of guidance that Flux reads if it was distilled with guidance; the default of its pipeline and training."""


class Call(NamedTuple):
    """What a network is called with.

    Attributes:
        noised: x_t, shape (N, C, H, W).
        time: see `Schedule.network_time`, shape (N,).
        text: vectors of the captions, in the network's precision.
        scale: pixels a side that one place of x_t stands for; 1 if images are not encoded.
    """

    noised: Tensor
    time: Tensor
    text: Encoded
    scale: int

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.noised.shape[2] * self.scale, self.noised.shape[3] * self.scale


@dataclass(frozen=True)
class Network:
    """A class of networks.

    Attributes:
        head: name of the last layer.
        order: names of the stages as they run.
        call: returns what the network predicts, shape (N, C, H, W).
        channels: C, by the configuration.
        refused: returns why such a configuration cannot be called, or None.
    """

    head: str
    order: tuple[str, ...]
    call: Callable[[Any, Call], Tensor]
    channels: Callable[[Any], int]
    refused: Callable[[Any], str | None]


def _unet(network: Any, call: Call) -> Tensor:
    more = {}
    if network.config.addition_embed_type == "text_time":  # SDXL: the size of the original, the cut, the wanted size
        size = [*call.pixels, 0, 0, *call.pixels]
        sizes = torch.tensor([size] * len(call.noised), dtype=call.noised.dtype, device=call.noised.device)
        more["added_cond_kwargs"] = {"text_embeds": call.text.pooled, "time_ids": sizes}
    output: Tensor = network(call.noised, call.time, encoder_hidden_states=call.text.states, **more).sample
    return output


def _pixart(network: Any, call: Call) -> Tensor:
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if network.use_additional_conditions:
        height, width = call.pixels
        like: Any = {"dtype": call.noised.dtype, "device": call.noised.device}
        count = len(call.noised)
        sizes["resolution"] = torch.tensor([[height, width]] * count, **like)
        sizes["aspect_ratio"] = torch.tensor([[height / width]] * count, **like)
    output: Tensor = network(
        call.noised,
        encoder_hidden_states=call.text.states,
        encoder_attention_mask=call.text.mask.to(call.noised.dtype),
        timestep=call.time,
        added_cond_kwargs=sizes,
    ).sample
    return output[:, : call.noised.shape[1]]  # the others are the learned variance


def _flux(network: Any, call: Call) -> Tensor:
    n, channels, height, width = call.noised.shape
    like: Any = {"dtype": call.noised.dtype, "device": call.noised.device}
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
    output: Tensor = network(
        hidden_states=packed(call.noised),
        timestep=call.time.to(call.noised.dtype) / 1000,
        guidance=torch.full((n,), GUIDANCE, device=call.noised.device) if network.config.guidance_embeds else None,
        pooled_projections=call.text.pooled,
        encoder_hidden_states=call.text.states,
        txt_ids=torch.zeros(call.text.states.shape[1], 3, **like),
        img_ids=places.to(**like),
    ).sample
    blocks = output.view(n, height // 2, width // 2, channels, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, height, width)


def packed(images: Tensor) -> Tensor:
    """Returns images as Flux reads them: each 2 x 2 pixels are one token.

    Args:
        images: shape (N, C, H, W), with even H and W.

    Returns:
        Shape (N, H W / 4, 4 C).

    Raises:
        HoldfastError: for odd sides.

    Example:
        >>> packed(torch.arange(8.0).view(1, 1, 2, 4)).tolist()
        [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    n, channels, height, width = images.shape
    if height % 2 or width % 2:
        raise HoldfastError(f"Flux reads 2 x 2 numbers at a time, and there are {height} x {width}; set image_size.")
    blocks = images.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(n, height * width // 4, 4 * channels)


def _sd3(network: Any, call: Call) -> Tensor:
    output: Tensor = network(
        hidden_states=call.noised,
        timestep=call.time,
        encoder_hidden_states=call.text.states,
        pooled_projections=call.text.pooled,
    ).sample
    return output


def _refused_unet(config: Any) -> str | None:
    if config.in_channels != config.out_channels:
        return f"it takes {config.in_channels} channels and returns {config.out_channels}, as one for inpainting does"
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        return "it needs the class of each image"
    if config.addition_embed_type not in (None, "text_time"):
        return f"its addition_embed_type is {config.addition_embed_type}; expected none, or text_time as in SDXL"
    return None


def _refused_transformer(config: Any) -> str | None:
    given, made = config.in_channels, config.out_channels
    if made not in (None, given, 2 * given):
        return f"it takes {given} channels and returns {made}; expected as many, or twice as many"
    return None


def _channels(config: Any) -> int:
    return int(config.in_channels)


_BLOCKS = ("transformer_blocks", "single_transformer_blocks", "norm_out", PATCHES_HEAD)

NETWORKS: Final[dict[str, Network]] = {
    "UNet2DConditionModel": Network(HEAD, UNET_ORDER, _unet, _channels, _refused_unet),
    "PixArtTransformer2DModel": Network(
        PATCHES_HEAD, ("pos_embed", "adaln_single", "caption_projection", *_BLOCKS), _pixart, _channels,
        _refused_transformer,
    ),
    "FluxTransformer2DModel": Network(
        PATCHES_HEAD, ("x_embedder", "time_text_embed", "context_embedder", "pos_embed", *_BLOCKS), _flux,
        lambda config: int(config.in_channels) // 4, _refused_transformer,
    ),
    "SD3Transformer2DModel": Network(
        PATCHES_HEAD, ("pos_embed", "time_text_embed", "context_embedder", *_BLOCKS), _sd3, _channels,
        _refused_transformer,
    ),
}  # fmt: skip
"""By the name of the class in diffusers."""


def entry_of(network: nn.Module) -> Network | None:
    """Returns the entry of a network's class; None: Holdfast does not know how to call it."""
    return next((NETWORKS[kind.__name__] for kind in type(network).__mro__ if kind.__name__ in NETWORKS), None)
