"""Image classifiers of Hugging Face's transformers, by name or from a folder; safetensors only, and no remote code."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models.introspection import first_line
from holdfast.models.weights import read_weights, without_wrappers

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

_NOT_ARCHITECTURE = (
    "architectures", "attn_implementation", "auto_map", "dtype", "experts_implementation", "label2id",
    "quantization_config", "torch_dtype", "transformers_version",
)  # fmt: skip
"""Entries of a configuration that name code, kernels or files to fetch, or the precision of weights: those that rebuild
an architecture do without."""


def pretrained(name: str, num_labels: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a classifier with its weights.

    Args:
        name: a folder that `save_pretrained` wrote, or a name on the Hub (which needs a network, or its cache).
        num_labels: put a fresh head with so many outputs in the place of its own, if its own has another number.

    Returns:
        The network and its configuration, from which `architecture` rebuilds it.

    Raises:
        HoldfastError: if there is no such model, it has no safetensors, or it needs code of its own.
    """
    config = _configuration(name)
    fresh = num_labels is not None and config.num_labels != num_labels
    more = {"num_labels": num_labels, "ignore_mismatched_sizes": True} if fresh else {}
    try:
        network, found = _from_pretrained(name, **more)
    except Exception as error:  # what hundreds of models, a network and a cache raise
        raise _unusable(name, error) from error
    if found["missing_keys"] and not fresh:
        raise HoldfastError(
            f"hf:{name} has no weights for {_some(found['missing_keys'])}; it is no trained image classifier. Train "
            "its head first, and save the whole."
        )
    return network, _plain(network.config)


def with_weights(name: str, path: Path) -> tuple[nn.Module, dict[str, Any], tuple[str, ...]]:
    """Loads other weights into a classifier, strictly.

    Files on the Hub may call tensors otherwise than the classes of today do; transformers itself knows how.

    Args:
        name: where the configuration is read from.
        path: the weights; of what transformers saved, or of its state dict.

    Returns:
        The network, its configuration (see `pretrained`), and how the weights were understood.

    Raises:
        HoldfastError: if they are unusable, or do not fit.
    """
    config = _configuration(name)
    read = read_weights(path)
    tensors, renamed = without_wrappers(read.tensors)
    # Quantised weights are integers that mean something only with their scales, which are stored elsewhere.
    integers = {n for n, t in tensors.items() if t.dim() and not t.is_floating_point()}
    if integers:
        raise HoldfastError(f"{str(path)!r} holds integers in {_some(integers)}; floating-point numbers were expected.")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        try:
            network, found = _from_pretrained(folder)
        except Exception as error:
            raise HoldfastError(f"{str(path)!r} does not fit hf:{name}: {first_line(error)}.") from error
    for what in ("missing", "unexpected"):
        if found[f"{what}_keys"]:
            raise HoldfastError(f"{str(path)!r} does not fit hf:{name}: {what} {_some(found[f'{what}_keys'])}.")
    return network, _plain(config), (*read.notes, *renamed)


def _from_pretrained(name: str, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoModelForImageClassification

    with _quiet():
        network, found = AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True,
            local_files_only=_is_folder(name), **more,
        )  # fmt: skip
    return network, found


def _some(names: Collection[str]) -> str:
    shown = ", ".join(repr(n) for n in sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def architecture(name: str, config: dict[str, Any]) -> nn.Module:
    """Builds a classifier with fresh weights from its configuration; nothing is read or fetched.

    Args:
        name: for messages.
        config: what `pretrained` returned; if it comes from a file, anybody may have written it.

    Raises:
        HoldfastError: if no image classifier can be made from the configuration.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    strange = [k for k in config if k in _NOT_ARCHITECTURE or k.startswith("_")]
    if strange:
        raise HoldfastError(f"hf:{name}: the configuration has {strange[0]!r}, which is no setting of an architecture.")
    _refuse_timm(name, config)
    try:
        network: nn.Module = AutoModelForImageClassification.from_config(
            AutoConfig.for_model(**config), trust_remote_code=False
        )
    except Exception as error:
        raise HoldfastError(
            f"hf:{name}: no image classifier can be built from its configuration: {type(error).__name__}: "
            f"{first_line(error)}."
        ) from error
    return network


def normalisation(name: str) -> Normalisation | None:
    """Returns (mean, std) that a model's preprocessor applies to images in [0, 1]; None if there is no preprocessor.

    A preprocessor first multiplies pixels in [0, 255] by its `rescale_factor`.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        with _quiet():
            read, _ = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=_is_folder(name))
    except Exception:  # the weights were found, so that there is none
        return None
    scale = 255 * (read.get("rescale_factor", 1 / 255) if read.get("do_rescale", True) else 1.0)
    shift = 1.0 if read.get("rescale_offset") else 0.0
    mean, std = (0.0,), (1.0,)
    if read.get("do_normalize", "image_mean" in read) and read.get("image_mean") is not None:
        mean, std = tuple(read["image_mean"]), tuple(read["image_std"])
    return tuple((m + shift) / scale for m in mean), tuple(s / scale for s in std)


def _configuration(name: str) -> Any:
    from transformers import AutoConfig

    _refuse_others(name)
    _refuse_adapter(name)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=_is_folder(name))
    except Exception as error:
        raise _unusable(name, error) from error
    _refuse_timm(name, {"model_type": config.model_type})
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


def _refuse_timm(name: str, config: dict[str, Any]) -> None:
    if config.get("model_type") == "timm_wrapper":
        raise HoldfastError(f"hf:{name} is a model of timm, which may load weights by itself; name it timm:NAME.")


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON: what it takes to build the architecture, and nothing else."""
    plain = {**config.to_diff_dict(), "model_type": config.model_type}
    labels = {"id2label": {str(k): str(v) for k, v in config.id2label.items()}}
    return {k: v for k, v in {**plain, **labels}.items() if k not in _NOT_ARCHITECTURE and not k.startswith("_")}


def _unusable(name: str, error: Exception) -> HoldfastError:
    hint = (
        "Expected a folder that save_pretrained wrote, with config.json and model.safetensors."
        if _is_folder(name)
        else f"There is no folder {name!r} here, and fetching it from the Hub needs a network (or its cache)."
    )
    return HoldfastError(f"hf:{name} cannot be loaded: {first_line(error)}. {hint}")


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers, which would stand in the way of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
