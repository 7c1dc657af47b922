"""Tiny text-to-image pipelines of diffusers with random weights, saved as `save_pretrained` does."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LATENT = 4
"""Channels of the latents, in the pipelines that are free to choose."""

SIDE = 16
"""Pixels a side of the images; the autoencoder halves it."""

_SIGNS = [*string.ascii_lowercase, *string.digits]


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """One token a letter, as CLIP writes them."""
    from transformers import CLIPTokenizer

    tokens = [*_SIGNS, *(f"{sign}</w>" for sign in _SIGNS), "!", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], pad_token=pad, model_max_length=12
    )


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    signs = [(sign, -3.0) for sign in _SIGNS]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *signs], extra_ids=0)


def clip(width: int, *, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=75, hidden_size=width, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=73, eos_token_id=74, pad_token_id=1, projection_dim=projection or 8,
    )  # fmt: skip
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).eval()


def t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=40, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def autoencoder(channels: int = LATENT, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=SIDE,
        **{"scaling_factor": 0.5, **more},
    ).eval()  # fmt: skip


def unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": SIDE // 2, "in_channels": LATENT, "out_channels": LATENT, "block_out_channels": (8, 16),
        "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2, "norm_num_groups": 4,
        "cross_attention_dim": 8,
    }  # fmt: skip
    return UNet2DConditionModel(**{**settings, **more})


def stable_diffusion() -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        autoencoder(), clip(8), clip_tokenizer(), unet(), scheduler, None, None, requires_safety_checker=False
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    network = unet(
        cross_attention_dim=20, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        autoencoder(), clip(8), clip(12, projection=10), clip_tokenizer(), clip_tokenizer("!"), network,
        EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )  # fmt: skip


def pixart(*, sizes: bool = True) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=6, in_channels=LATENT, out_channels=2 * LATENT, num_layers=3,
        cross_attention_dim=12, sample_size=128 if sizes else SIDE // 2, caption_channels=8, num_embeds_ada_norm=1000,
        interpolation_scale=1,
    )  # fmt: skip
    return PixArtAlphaPipeline(t5_tokenizer(), t5(8), autoencoder(), network, DPMSolverMultistepScheduler())


def flux(*, guidance: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    network = FluxTransformer2DModel(
        in_channels=4 * LATENT, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=10, pooled_projection_dim=8, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(shift_factor=0.25), clip(8), clip_tokenizer(), t5(10),
        t5_tokenizer(), network,
    )  # fmt: skip


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    network = SD3Transformer2DModel(
        sample_size=SIDE // 2, in_channels=LATENT, out_channels=LATENT, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        network, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(shift_factor=0.25), clip(8, projection=6),
        clip_tokenizer(), clip(12, projection=10), clip_tokenizer("!"), t5(24), t5_tokenizer(),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "stable-diffusion": stable_diffusion, "sdxl": sdxl, "pixart": pixart, "flux": flux, "sd3": sd3,
}  # fmt: skip


def saved(folder: Path, kind: str = "stable-diffusion") -> Path:
    """Writes a pipeline with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = PIPELINES[kind]()
    pipeline.save_pretrained(folder)
    return folder


def saved_clip(folder: Path) -> str:
    """A CLIP model with random weights, its tokenizer and its image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    layers: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text: dict[str, Any] = {
        **layers,
        "vocab_size": 75,
        "max_position_embeddings": 12,
        "bos_token_id": 73,
        "eos_token_id": 74,
    }
    config = CLIPConfig(
        text_config=text, vision_config={**layers, "image_size": 16, "patch_size": 8}, projection_dim=8
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    sides = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=sides).save_pretrained(folder)
    return str(folder)


def saved_inception(folder: Path) -> str:
    """A file with random weights of torch-fidelity's Inception network, in half precision."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
            """Keeps the weights that it was made with."""

    file = folder / "inception.pth"
    torch.save({}, file)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Untrained("inception", ["2048"], str(file))
    torch.save(network.half().state_dict(), file)
    return str(file)
