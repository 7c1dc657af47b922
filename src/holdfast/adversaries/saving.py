"""What an attack made, as files that other programs read: weights, a LoRA, or learned word vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from holdfast.models import SplitModel, TextToImage
from holdfast.runtime.storage import writable_folder, write_atomic
from holdfast.tasks import Task
from holdfast.tasks.text_to_image import TextToImageTask

WEIGHTS: Final = "model.safetensors"
HEAD: Final = "head.safetensors"
LORA: Final = "pytorch_lora_weights.safetensors"
"""The name that diffusers' `load_lora_weights` looks for."""
EMBEDS: Final = "learned_embeds"
PROMPTS: Final = "prompts.json"

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def save_attacked(released: SplitModel, attacked: SplitModel, task: Task, folder: Path) -> list[str]:
    """Writes what an attack changed, and returns the names of the files.

    - Learned word vectors: `learned_embeds.safetensors`, which `load_textual_inversion` of diffusers reads; of several
      concepts one file each, as diffusers has it, called `learned_embeds-0.safetensors` and so on.
    - Adapters beside weights that are as they were: `pytorch_lora_weights.safetensors`, which `load_lora_weights` of a
      diffusers pipeline reads; only for networks that diffusers can give a LoRA, which `UNet2DModel` and PixArt's are
      not. The scale of the adapters is multiplied into them.
    - Else all weights of the network, with adapters merged: `model.safetensors`, which `load_model` reads.
    - If the attacked model is prompted with other captions: `prompts.json`, from a caption to its prompt's token ids
      and, if the tokenizer can write them, its text.

    Args:
        released: the model that was attacked.
        attacked: the copy at the end of the attack, as `keep` of `Adversary.attack` gets it; not changed.
        task: the restricted task.
        folder: created if it does not exist.
    """
    writable_folder(folder)
    learned = _learned_rows(released, attacked)
    files = []
    if learned and isinstance(attacked, TextToImage):
        files += _save_learned(attacked, learned, folder)
    elif hasattr(attacked.network, "load_lora_adapter") and _beside_weights(released, attacked):
        save_file(_lora(attacked), folder / LORA, metadata={"format": "pt"})
        files.append(LORA)
    else:
        attacked.unwrapped().save(folder / WEIGHTS)
        files.append(WEIGHTS)
    prompts = _prompts(attacked, task, learned)
    if prompts:
        write_atomic(folder / PROMPTS, json.dumps(prompts, ensure_ascii=False))
        files.append(PROMPTS)
    return files


def save_head(attacked: SplitModel, folder: Path) -> list[str]:
    """Writes the head that an attack on a frozen body trained, a linear map of the released body's features."""
    writable_folder(folder)
    save_file({k: v.detach().cpu().contiguous() for k, v in attacked.head.state_dict().items()}, folder / HEAD)
    return [HEAD]


def _learned_rows(released: SplitModel, attacked: SplitModel) -> list[int]:
    """Ids of the tokens whose vectors differ."""
    if not isinstance(released, TextToImage) or not isinstance(attacked, TextToImage):
        return []
    before, after = (m.text.embedding.weight.detach().cpu() for m in (released, attacked))
    return [int(i) for i in (before != after).any(1).nonzero().flatten()]


def _concept(number: int) -> str:
    return f"<concept-{number}>"


def _save_learned(attacked: TextToImage, rows: list[int], folder: Path) -> list[str]:
    table = attacked.text.embedding.weight.detach().cpu()
    files = []
    for number, row in enumerate(rows):
        name = f"{EMBEDS}{f'-{number}' if len(rows) > 1 else ''}.safetensors"
        save_file({_concept(number): table[row].clone()}, folder / name, metadata={"format": "pt"})
        files.append(name)
    return files


def _beside_weights(released: SplitModel, attacked: SplitModel) -> bool:
    """Whether the attack only added adapters: all weights are those of the released model."""
    after = attacked.network.state_dict()
    if not any(name.endswith(_A) for name in after):
        return False
    for name, value in released.network.state_dict().items():
        layer, _, last = name.rpartition(".")
        own = after.get(name, after.get(f"{layer}.base_layer.{last}"))
        if own is None or not torch.equal(own.cpu(), value.cpu()):
            return False
    return True


def _lora(attacked: SplitModel) -> dict[str, Tensor]:
    """The adapters under the names of diffusers."""
    prefix = "transformer" if "Transformer" in type(attacked.network).__name__ else "unet"
    tensors = {}
    for name, value in attacked.network.state_dict().items():
        if name.endswith(_A):
            tensors[f"{prefix}.{name.removesuffix(_A)}.lora_A.weight"] = value.detach().cpu().contiguous()
        elif name.endswith(_B):
            layer: Any = attacked.network.get_submodule(name.removesuffix(_B))
            scaled = value.detach().cpu() * layer.scaling["default"]  # files without a scale are read with 1
            tensors[f"{prefix}.{name.removesuffix(_B)}.lora_B.weight"] = scaled.contiguous()
    return tensors


def _prompts(attacked: SplitModel, task: Task, learned: list[int]) -> dict[str, Any]:
    """What the attacked model reads in place of each caption."""
    if not isinstance(attacked, TextToImage) or not isinstance(task, TextToImageTask) or attacked.prompts is None:
        return {}
    fast, shown = task.tokenizer.fast, dict[str, Any]()
    for caption, ids in zip(task.captions, attacked.prompts[1].tolist(), strict=True):
        text = None
        if learned:
            number = next(i for i, row in enumerate(learned) if row in ids)
            text = " ".join([*caption.split()[:-1], _concept(number)])
        elif fast is not None:
            text = fast.decode(ids, skip_special_tokens=True).strip()
        shown[caption] = {"prompt": text, "ids": ids}
    return shown
