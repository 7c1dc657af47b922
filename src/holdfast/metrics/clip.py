"""How well pictures fit their captions, as a CLIP model of the user sees it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.tasks import located
from holdfast.tasks.paths import data_folder

BATCH = 64
"""Pictures computed at a time."""


def clip_similarity(place: str, pictures: Tensor, captions: Sequence[str]) -> Tensor:
    """Returns the cosine between CLIP's vectors of each picture and of its caption (Radford et al. 2021).

    Args:
        place: a folder with a `CLIPModel` of transformers, its tokenizer and its image processor; relative ones are
            also searched for in `$HOLDFAST_DATA`.
        pictures: shape (N, 1 or 3, H, W), in [0, 1]; grey ones are shown to CLIP in three equal channels.
        captions: N texts.

    Returns:
        float64, shape (N,), on the CPU; NaN for a picture that is not finite.

    Raises:
        HoldfastError: if the model cannot be loaded, or there is not one caption a picture.
    """
    if len(pictures) != len(captions):
        raise HoldfastError(f"There are {len(pictures)} pictures and {len(captions)} captions; expected one each.")
    model, tokenizer, processor = load_clip(place)
    text = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
    shown = pictures.detach().cpu().float()
    bytes_ = (shown.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    found = []
    with torch.no_grad():
        for start in range(0, len(shown), BATCH):
            part = slice(start, start + BATCH)
            inputs = processor(images=list(bytes_[part]), input_data_format="channels_first", return_tensors="pt")
            outputs = model(
                input_ids=text["input_ids"][part], attention_mask=text["attention_mask"][part],
                pixel_values=inputs["pixel_values"],
            )  # fmt: skip
            found.append(torch.cosine_similarity(outputs.image_embeds.double(), outputs.text_embeds.double()))
    finite = shown.isfinite().flatten(1).all(1)
    return torch.where(finite, torch.cat(found), torch.nan)


@lru_cache(maxsize=1)
def load_clip(place: str) -> tuple[Any, Any, Any]:
    """Returns a CLIP model in evaluation mode, its tokenizer and its image processor; see `clip_similarity`.

    Raises:
        HoldfastError: if a part is missing or cannot be read.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    folder = located(place.removeprefix("hf:"), data_folder(None))
    options: dict[str, Any] = {"local_files_only": Path(folder).is_dir()}
    try:
        model = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **options).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # a network, a cache and unknown files may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise HoldfastError(
            f"The CLIP model {place!r} cannot be loaded: {reason}. Expected a folder with a CLIPModel of transformers, "
            "its tokenizer and its preprocessor_config.json, as openai/clip-vit-base-patch32 is."
        ) from error
    return model, tokenizer, processor
