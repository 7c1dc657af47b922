"""Image classifiers of Hugging Face's transformers, by name or from a folder; safetensors only, and no remote code."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.families.hf_files import (
    check_config,
    configuration,
    from_pretrained,
    is_folder,
    listed,
    plain_config,
    quiet,
    refuse_timm,
    unusable,
)
from holdfast.models.introspection import first_line
from holdfast.models.weights import read_weights, without_wrappers
from holdfast.runtime.storage import write_atomic

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


def pretrained(name: str, num_labels: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a classifier with its weights.

    Args:
        name: a folder that `save_pretrained` wrote, or a name on the Hub (which needs a network, or its cache).
        num_labels: outputs of a fresh head, which replaces the model's own if that has another number; None: keep it.

    Returns:
        The network and its configuration, from which `architecture` rebuilds it.

    Raises:
        HoldfastError: if the model does not exist, has no safetensors, or needs remote code.
    """
    from transformers import AutoModelForImageClassification

    config = configuration(name)
    fresh = num_labels is not None and config.num_labels != num_labels
    more = {"num_labels": num_labels, "ignore_mismatched_sizes": True} if fresh else {}
    try:
        network, info = from_pretrained(AutoModelForImageClassification, name, **more)
    except Exception as error:  # hundreds of models, a network and a cache raise different exceptions
        raise unusable(name, error) from error
    if info["missing_keys"] and not fresh:
        raise HoldfastError(
            f"hf:{name} has no weights for {listed(info['missing_keys'])}; it is not a trained image classifier. Train "
            "its head first, and save the whole model."
        )
    return network, plain_config(network.config)


def with_weights(name: str, path: Path) -> tuple[nn.Module, dict[str, Any], tuple[str, ...]]:
    """Loads other weights into a classifier, strictly.

    Old files may have other names of tensors than today's classes; transformers itself converts them.

    Args:
        name: of the folder or model with the configuration.
        path: the weights, saved by transformers or from a state dict.

    Returns:
        The network, its configuration (see `pretrained`), and notes on how the weights were read.

    Raises:
        HoldfastError: if the weights are unusable, or do not fit.
    """
    from transformers import AutoModelForImageClassification

    config = configuration(name)
    read = read_weights(path)
    tensors, renamed = without_wrappers(read.tensors)
    # Quantised weights are integers, and useless without their scales, which are stored elsewhere.
    integers = {n for n, t in tensors.items() if t.dim() and not t.is_floating_point()}
    if integers:
        raise HoldfastError(
            f"{str(path)!r} holds integers in {listed(integers)}; floating-point numbers were expected."
        )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        try:
            network, info = from_pretrained(AutoModelForImageClassification, folder)
        except Exception as error:
            raise HoldfastError(f"{str(path)!r} does not fit hf:{name}: {first_line(error)}.") from error
    for what in ("missing", "unexpected"):
        if info[f"{what}_keys"]:
            raise HoldfastError(f"{str(path)!r} does not fit hf:{name}: {what} {listed(info[f'{what}_keys'])}.")
    return network, plain_config(config), (*read.notes, *renamed)


def architecture(name: str, config: dict[str, Any]) -> nn.Module:
    """Builds a classifier with fresh weights from its configuration, without reading or fetching any.

    Args:
        name: for messages.
        config: returned by `pretrained`, or from a file, which is untrusted.

    Raises:
        HoldfastError: if the configuration is not that of an image classifier.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    check_config(name, config)
    refuse_timm(name, config)
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
        with quiet():
            read, _ = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=is_folder(name))
    except Exception:  # the weights were found, so the preprocessor is missing
        return None
    scale = 255 * (read.get("rescale_factor", 1 / 255) if read.get("do_rescale", True) else 1.0)
    shift = 1.0 if read.get("rescale_offset") else 0.0
    mean, std = (0.0,), (1.0,)
    if read.get("do_normalize", "image_mean" in read) and read.get("image_mean") is not None:
        mean, std = tuple(read["image_mean"]), tuple(read["image_std"])
    return tuple((m + shift) / scale for m in mean), tuple(s / scale for s in std)


def write(network: Any, folder: Path, names: dict[int, str]) -> None:
    """Writes a classifier with `save_pretrained`, and the names of its outputs into its configuration."""
    network.config.id2label = names
    network.config.label2id = {name: i for i, name in names.items()}
    with quiet():
        network.save_pretrained(folder)


def write_normalisation(mean: Tensor, std: Tensor, folder: Path) -> None:
    """Writes a preprocessor of images in [0, 255] that divides by 255 and normalises; it does not change their size."""
    described = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean.flatten().tolist(),
        "image_std": std.flatten().tolist(),
    }
    write_atomic(folder / "preprocessor_config.json", json.dumps(described, indent=2))
