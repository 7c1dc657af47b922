"""Folders of transformers: their configuration, their weights, and the contents that are refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models.family import config_in
from holdfast.models.introspection import first_line
from holdfast.tasks.tokenizers import transformers_place

NOT_ARCHITECTURE = (
    "architectures", "attn_implementation", "auto_map", "dtype", "experts_implementation", "label2id",
    "quantization_config", "torch_dtype", "transformers_version",
)  # fmt: skip
"""Entries of a configuration that name code, kernels or files to fetch, or the precision of weights; an architecture
is rebuilt without them."""


def check_config(name: str, config: Mapping[str, Any]) -> None:
    """Refuses a configuration with more than the architecture's settings; it may come from an untrusted file.

    Raises:
        HoldfastError: naming the entry.
    """
    extra = [k for k in config if k in NOT_ARCHITECTURE or k.startswith("_")]
    if extra:
        raise HoldfastError(
            f"hf:{name}: the configuration has {extra[0]!r}, which is not a setting of an architecture."
        )


def listed(names: Collection[str]) -> str:
    """Returns the first names of many, for messages."""
    shown = ", ".join(repr(n) for n in sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def configuration(name: str) -> Any:
    """Reads the configuration of a model, but no weights and no remote code.

    Raises:
        HoldfastError: if it is missing, or another library reads the model.
    """
    from transformers import AutoConfig

    _refuse_others(name)
    _refuse_adapter(name)
    try:
        with quiet():
            place, more = transformers_place(name)
            config = AutoConfig.from_pretrained(
                place, trust_remote_code=False, local_files_only=is_folder(place), **more
            )
    except Exception as error:
        raise unusable(name, error) from error
    refuse_timm(name, {"model_type": config.model_type})
    return config


def from_pretrained(kind: Any, name: str, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a network of a class of transformers in float32: safetensors or GGUF only, and no remote code.

    Returns:
        The network, and a dictionary with its `missing_keys` and `unexpected_keys`.
    """
    place, in_file = transformers_place(name)
    with quiet():
        network, info = kind.from_pretrained(
            place, use_safetensors=not in_file, trust_remote_code=False, dtype=torch.float32, output_loading_info=True,
            local_files_only=is_folder(place), **in_file, **more,
        )  # fmt: skip
    return network, info


def _refuse_others(name: str) -> None:
    """Refuses a folder that another library wrote; the message gives its name there."""
    folder = Path(name).expanduser()
    if (folder / "model_index.json").is_file():
        raise HoldfastError(f"hf:{name} holds a diffusers pipeline; name it diffusers:{name}.")
    config = config_in(folder)
    if "model_type" not in config and isinstance(config.get("architecture"), str):
        raise HoldfastError(
            f"hf:{name} is a model of timm; name it timm:{config['architecture']}, and give the file of weights in it "
            "as its --weights."
        )


def _refuse_adapter(name: str) -> None:
    """Refuses a folder with only an adapter, and an adapter that is a pickle."""
    folder = Path(name).expanduser()
    if not (folder / "adapter_config.json").is_file():
        return
    if not (folder / "config.json").is_file():
        try:
            base = json.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
        except (ValueError, AttributeError, RecursionError):
            base = None
        raise HoldfastError(
            f"hf:{name} holds a PEFT adapter without its model ({base or 'which it does not name'}). Merge the two "
            "once, peft.PeftModel.from_pretrained(MODEL, FOLDER).merge_and_unload().save_pretrained(X); then name hf:X."
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise HoldfastError(
            f"hf:{name} has adapter_config.json and no adapter_model.safetensors; only safetensors are read. Save the "
            "adapter as safetensors, or remove its configuration to use the model without it."
        )


def refuse_timm(name: str, config: dict[str, Any]) -> None:
    """Refuses a model that transformers would load with timm.

    Raises:
        HoldfastError: with the name to use instead.
    """
    if config.get("model_type") == "timm_wrapper":
        raise HoldfastError(f"hf:{name} is a model of timm, which may load weights by itself; name it timm:NAME.")


def plain_config(config: Any) -> dict[str, Any]:
    """Returns a configuration as JSON, with only the settings that build the architecture."""
    plain = {**config.to_diff_dict(), "model_type": config.model_type}
    labels = {"id2label": {str(k): str(v) for k, v in config.id2label.items()}}
    return {k: v for k, v in {**plain, **labels}.items() if k not in NOT_ARCHITECTURE and not k.startswith("_")}


def unusable(name: str, error: Exception) -> HoldfastError:
    """Returns the error for a model that cannot be loaded."""
    hint = (
        "Expected a folder that save_pretrained wrote, with config.json and model.safetensors."
        if is_folder(name)
        else f"There is no folder {name!r} here, and fetching it from the Hub needs a network (or its cache)."
    )
    return HoldfastError(f"hf:{name} cannot be loaded: {first_line(error)}. {hint}")


def is_folder(name: str) -> bool:
    """Whether a name is that of a folder here."""
    return Path(name).expanduser().is_dir()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bars of transformers, which would disturb Holdfast's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
