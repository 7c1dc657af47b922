"""Latents of images: what text-to-image models remove noise from, and the autoencoder that makes them."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.runtime.storage import load_tensors, save_tensors, tensors_sha256
from holdfast.tasks.paths import place
from holdfast.tasks.pipeline_folder import is_pipeline

LATENTS: Final = "latents"
"""The folder of cached latents, in the folder for downloads."""


class Autoencoder:
    """An `AutoencoderKL` of diffusers, by its folder; its weights are read when they are needed.

    Latents are the means of the posterior, shifted and scaled as pipelines of diffusers do: (z - shift) scale.

    Args:
        folder: of the autoencoder, or of a pipeline that has one.

    Attributes:
        name: the last parts of the folder, for people.

    Raises:
        HoldfastError: if there is no autoencoder.
    """

    def __init__(self, folder: Path | str) -> None:
        given = Path(folder).expanduser()
        self.folder = (given / "vae" if is_pipeline(given) else given).resolve()
        self.name = f"{given.name}/vae" if is_pipeline(given) else given.name
        if not (self.folder / "config.json").is_file():
            raise HoldfastError(
                f"{str(folder)!r} holds no autoencoder; expected a folder of an AutoencoderKL of diffusers, or of a "
                "pipeline that has one (vae)."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "module"}  # read again where it is unpickled

    @cached_property
    def module(self) -> Any:
        """The network, in evaluation mode and float32, on the CPU.

        Raises:
            HoldfastError: if it cannot be loaded from safetensors.
        """
        from diffusers import AutoencoderKL

        try:
            module, info = AutoencoderKL.from_pretrained(
                self.folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False,
                torch_dtype=torch.float32, output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # unknown files may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise HoldfastError(
                f"{str(self.folder)!r} cannot be loaded as an AutoencoderKL in safetensors: {reason}."
            ) from error
        if info["missing_keys"]:
            raise HoldfastError(f"{str(self.folder)!r} has no weights for {sorted(info['missing_keys'])[0]}.")
        return module.eval().requires_grad_(False)

    @cached_property
    def sha256(self) -> str:
        """Identifies its weights and what becomes of its latents."""
        return tensors_sha256(self.module.state_dict(), repr([v.flatten().tolist() for v in self._affine()]))

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Shift and scale, of one value a channel or one for all."""
        config = self.module.config
        means, deviations = config.get("latents_mean"), config.get("latents_std")
        shift = torch.tensor(means if means is not None else [config.get("shift_factor") or 0.0])
        scale = config.scaling_factor / torch.tensor(deviations if deviations is not None else [1.0])
        return shift.view(-1, 1, 1), scale.view(-1, 1, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Returns the latents of images, which are encoded one by one: so latents do not depend on other images.

        Args:
            images: uint8, shape (N, C, H, W).

        Returns:
            float32, shape (N, D, h, w), on the CPU.

        Raises:
            HoldfastError: for another number of channels, or sides that it does not take.
        """
        config = self.module.config
        step = 2 ** (len(config.block_out_channels) - 1)
        if images.shape[1] != config.in_channels or images.shape[2] % step or images.shape[3] % step:
            raise HoldfastError(
                f"The autoencoder {self.name} takes images of {config.in_channels} channels with sides that are "
                f"multiples of {step}, and these have {images.shape[1]} and {images.shape[2]} x {images.shape[3]}; set "
                "the task's channels and image_size."
            )
        shift, scale = self._affine()
        means = [self.module.encode(image[None].float().div(127.5).sub(1)).latent_dist.mean for image in images]
        return (torch.cat(means) - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns the images of latents: float32 in [0, 1], shape (N, C, H, W), on the CPU.

        Args:
            latents: shape (N, D, h, w).
        """
        shift, scale = self._affine()
        images = [self.module.decode(z[None]).sample for z in latents.float().cpu() / scale + shift]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def latents(self, images: Tensor, cache: Path) -> Tensor:
        """Returns the latents of images as `encode` does, from the cache if they are in it.

        Equal images are encoded once.

        Args:
            images: uint8, shape (N, C, H, W).
            cache: a folder, which is created; a file in it has the latents of one set of images.
        """
        rows = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.contiguous()]
        described = f"{self.sha256} {tuple(images.shape[1:])}".encode()
        path = cache / LATENTS / f"{hashlib.sha256(described + b''.join(rows)).hexdigest()}.safetensors"
        if path.is_file():
            return load_tensors(path)[0]["latents"]
        first = {row: i for i, row in reversed(list(enumerate(rows)))}
        kept = sorted(first.values())
        encoded = self.encode(images[kept])
        latents = encoded[[kept.index(first[row]) for row in rows]] if len(kept) < len(rows) else encoded
        save_tensors(path, {"latents": latents}, {"autoencoder": self.sha256})
        return latents


def load_autoencoder(name: str, data_dir: Path | None) -> Autoencoder:
    """Returns the autoencoder in a folder, here or in the data folder.

    Raises:
        HoldfastError: if there is no such folder, or it holds no autoencoder.
    """
    folder = place(name.removeprefix("diffusers:"), data_dir, is_there=Path.is_dir)
    if folder is None:
        raise HoldfastError(
            f"There is no autoencoder at {name!r}; expected a folder of an AutoencoderKL of diffusers, or of a "
            "pipeline that has one."
        )
    return Autoencoder(folder)
