"""Folders of transformers: their configuration, and what is refused in them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.models.introspection import first_line

NOT_ARCHITECTURE = (
    "architectures", "attn_implementation", "auto_map", "dtype", "experts_implementation", "label2id",
    "quantization_config", "torch_dtype", "transformers_version",
)  # fmt: skip
"""Entries of a configuration that name code, kernels or files to fetch, or the precision of weights: those that rebuild
an architecture do without."""


def check_config(name: str, config: Mapping[str, Any]) -> None:
    """Refuses a configuration that says more than the architecture; it may come from an untrusted file.

    Raises:
        HoldfastError: naming the entry.
    """
    strange = [k for k in config if k in NOT_ARCHITECTURE or k.startswith("_")]
    if strange:
        raise HoldfastError(f"hf:{name}: the configuration has {strange[0]!r}, which is no setting of an architecture.")


def listed(names: Collection[str]) -> str:
    """Returns the first names of many, for messages."""
    shown = ", ".join(repr(n) for n in sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def configuration(name: str) -> Any:
    """Reads the configuration of a model; no weights, and no code of its own.

    Raises:
        HoldfastError: if there is none, or another library reads it.
    """
    from transformers import AutoConfig

    _refuse_others(name)
    _refuse_adapter(name)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=is_folder(name))
    except Exception as error:
        raise unusable(name, error) from error
    refuse_timm(name, {"model_type": config.model_type})
    return config


def _refuse_others(name: str) -> None:
    """Refuses a folder that another library wrote, and says what to name it."""
    folder = Path(name).expanduser()
    if (folder / "model_index.json").is_file():
        raise HoldfastError(f"hf:{name} holds a diffusers pipeline; name it diffusers:{name}.")
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(config, dict) and "model_type" not in config and isinstance(config.get("architecture"), str):
        raise HoldfastError(
            f"hf:{name} is a model of timm; take timm:{config['architecture']}, and the file of weights in it as its "
            "--weights."
        )


def _refuse_adapter(name: str) -> None:
    """Refuses a folder with an adapter alone, and an adapter that is a pickle."""
    folder = Path(name).expanduser()
    if not (folder / "adapter_config.json").is_file():
        return
    if not (folder / "config.json").is_file():
        try:
            base = json.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
        except (ValueError, AttributeError, RecursionError):
            base = None
        raise HoldfastError(
            f"hf:{name} holds a PEFT adapter without the model that it belongs to ({base or 'it does not say which'}). "
            "Merge the two once, peft.PeftModel.from_pretrained(MODEL, FOLDER).merge_and_unload().save_pretrained(X)"
            "; then name hf:X."
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise HoldfastError(
            f"hf:{name} has adapter_config.json and no adapter_model.safetensors; only safetensors are read. Save the "
            "adapter anew, or remove its configuration if the model is meant without it."
        )


def refuse_timm(name: str, config: dict[str, Any]) -> None:
    """Refuses what transformers would hand over to timm.

    Raises:
        HoldfastError: naming what to write instead.
    """
    if config.get("model_type") == "timm_wrapper":
        raise HoldfastError(f"hf:{name} is a model of timm, which may load weights by itself; name it timm:NAME.")


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration as JSON: what it takes to build the architecture, and nothing else."""
    plain = {**config.to_diff_dict(), "model_type": config.model_type}
    labels = {"id2label": {str(k): str(v) for k, v in config.id2label.items()}}
    return {k: v for k, v in {**plain, **labels}.items() if k not in NOT_ARCHITECTURE and not k.startswith("_")}


def unusable(name: str, error: Exception) -> HoldfastError:
    """Returns the error for a model that cannot be loaded, and what was expected."""
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
    """Without the progress bars of transformers, which would stand in the way of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
