"""Folders of diffusers pipelines: their index, and the tokenizers of their text encoders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from holdfast.errors import HoldfastError
from holdfast.tasks.tokenizers import Tokenizer, Vocabulary, load_tokenizer

INDEX: Final = "model_index.json"
"""The file that makes a folder a pipeline."""

CLIP_TOKENS: Final = 77
"""Tokens that CLIP's text encoder reads, unless its configuration says otherwise."""

PROMPT_LENGTHS: Final = {
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
    "FluxPipeline": 512,
    "StableDiffusion3Pipeline": 256,
}
"""Tokens to which pipelines of diffusers pad a prompt, where that is not what CLIP reads."""

LOWERCASE: Final = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
"""Pipelines that write prompts in small letters."""


def is_pipeline(name: str | Path) -> bool:
    """Returns whether a name is that of a folder with a pipeline of diffusers.

    Example:
        >>> is_pipeline("no-such-folder")
        False
    """
    return (Path(name).expanduser() / INDEX).is_file()


def pipeline_index(folder: Path) -> dict[str, Any]:
    """Returns the class of a pipeline (`_class_name`), and the library and class of each of its parts, by name.

    Raises:
        HoldfastError: if the folder has no index, or it is damaged.
    """
    try:
        parts = json.loads((folder / INDEX).read_bytes())
        if not isinstance(parts, dict):
            raise ValueError(f"{INDEX} is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise HoldfastError(f"{str(folder)!r} is not a folder of a diffusers pipeline: {error}.") from error
    return parts


def parts_called(name: str, index: dict[str, Any]) -> list[str]:
    """Returns the parts with a name and a number, such as `tokenizer` and `tokenizer_2`, that a pipeline has.

    Example:
        >>> parts_called("tokenizer", {"tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": [None, None]})
        ['tokenizer']
    """
    named = (part for part in index if part == name or part.startswith(f"{name}_"))
    return sorted(part for part in named if isinstance(index[part], list) and index[part] and index[part][0])


@dataclass(frozen=True)
class PipelineTokenizer(Tokenizer):
    """The tokenizers of a pipeline. A row has a part of equal length for each, in the order of its text encoders.

    Attributes:
        parts: the tokenizers.
        limits: tokens that the text encoder of each reads; None: any number.
        lowercase: whether captions are written in small letters.
    """

    parts: tuple[Tokenizer, ...] = ()
    limits: tuple[int | None, ...] = ()
    lowercase: bool = False

    def encode(self, texts: Sequence[str], length: int) -> npt.NDArray[np.int64]:
        """Returns token ids of shape (N, parts x length); see `Tokenizer.encode`.

        What is beyond the limit of an encoder is padding, which it does not read.

        Raises:
            HoldfastError: as `Tokenizer.encode`; and if no encoder reads so many tokens.
        """
        if None not in self.limits and length > max(limit for limit in self.limits if limit is not None):
            raise HoldfastError(
                f"length is {length}, and the text encoders of {self.vocabulary.name!r} read at most "
                f"{max(limit for limit in self.limits if limit is not None)} tokens; set length to at most that."
            )
        if self.lowercase:
            texts = [text.lower().strip() for text in texts]
        rows = []
        for part, limit in zip(self.parts, self.limits, strict=True):
            ids = np.full((len(texts), length), part.vocabulary.pad, dtype=np.int64)
            read = length if limit is None else min(length, limit)
            ids[:, :read] = part.encode(texts, read)
            rows.append(ids)
        return np.concatenate(rows, 1)


def pipeline_tokenizer(folder: Path) -> PipelineTokenizer:
    """Loads the tokenizers of a text-to-image pipeline.

    Raises:
        HoldfastError: if the folder is not one of a pipeline with tokenizers, or a tokenizer is unusable.
    """
    index = pipeline_index(folder)
    names = parts_called("tokenizer", index)
    if not names:
        raise HoldfastError(f"{str(folder)!r} holds a pipeline without a tokenizer; expected a text-to-image pipeline.")
    parts = tuple(load_tokenizer(str(folder / name)) for name in names)
    limits = tuple(_limit(folder / name.replace("tokenizer", "text_encoder")) for name in names)
    kind = str(index.get("_class_name"))
    known = hashlib.sha256("".join(f"{p.vocabulary.sha256}{p.vocabulary.pad} " for p in parts).encode()).hexdigest()
    vocabulary = Vocabulary(folder.name, max(p.vocabulary.size for p in parts), parts[0].vocabulary.pad, known)
    length = PROMPT_LENGTHS.get(kind, max((limit for limit in limits if limit is not None), default=CLIP_TOKENS))
    return PipelineTokenizer(
        vocabulary, parts[0].fast, length, parts=parts, limits=limits, lowercase=kind in LOWERCASE
    )  # fmt: skip


def _limit(encoder: Path) -> int | None:
    """Tokens that an encoder reads: CLIP has a vector for each position, T5 has none."""
    try:
        config = json.loads((encoder / "config.json").read_bytes())
        kind, limit = str(config["model_type"]), config.get("max_position_embeddings", CLIP_TOKENS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HoldfastError(f"{str(encoder)!r} has no usable configuration of a text encoder: {error!r}.") from error
    return int(limit) if kind.startswith("clip") else None


def autoencoder_scale(folder: Path) -> int:
    """Returns how many pixels a side one place of a pipeline's latents stands for; 1 for one without autoencoder.

    Raises:
        HoldfastError: if its configuration is damaged.
    """
    if not parts_called("vae", pipeline_index(folder)):
        return 1
    try:
        config = json.loads((folder / "vae" / "config.json").read_bytes())
        return int(2 ** (len(config["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise HoldfastError(
            f"{str(folder / 'vae')!r} has no usable configuration of an autoencoder: {error!r}."
        ) from error
