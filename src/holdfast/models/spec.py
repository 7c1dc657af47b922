"""The spec of a model, from a recipe, a name or a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from holdfast.errors import HoldfastError
from holdfast.models.family import is_code
from holdfast.models.weights import read_weights
from holdfast.runtime.storage import load_tensors
from holdfast.tasks.paths import data_folder, place

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl")


class ModelSpec(BaseModel):
    """Which architecture and weights, as a recipe writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        description="`cnn`, `unet`, ... (built in), `timm:NAME`, `hf:NAME`, `diffusers:NAME` or `file.py:function`."
    )
    weights: str | None = Field(
        None, description="A .safetensors file; relative paths are also searched for in the data folder."
    )
    options: dict[str, Any] = Field({}, description="Arguments of the architecture, such as `width: 32`.")
    head: str | None = Field(None, description="Dotted name of the head, instead of the one that is found.")
    mean: tuple[float, ...] | None = Field(None, description="Input normalisation; by default the architecture's.")
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = Field(
        None,
        description="Names of the outputs, in their order; matched with the task's classes by name. By default those "
        "in the model's own files.",
    )
    keep_outputs: tuple[int, ...] | None = Field(
        None,
        description="Outputs of the weights' head that are the task's classes, in their order; null: all.",
    )
    unfold_batchnorm: bool = Field(
        False,
        description="Whether the weights have BatchNorm folded into the convolutions, so that it gets its statistics "
        "from the benign training samples; outputs in evaluation mode do not change.",
    )
    extractor: bool | Literal["affine"] = Field(
        False,
        description="Whether the weights have a linear extractor before the head; `affine`: one with a shift, as an "
        "eraser has.",
    )


def spec_of(model: str | ModelSpec, data_dir: Path | str | None, head: str | None = None) -> ModelSpec:
    """Returns the spec of a model that `load_model` takes; a file of weights contains its own.

    Raises:
        HoldfastError: if a file contains no usable spec.
    """
    if isinstance(model, ModelSpec):
        return with_header(model, data_dir)
    if not model.endswith(WEIGHT_SUFFIXES):
        return ModelSpec(name=model)
    path = find_weights(model, data_dir)
    _, meta = load_tensors(path)
    if not isinstance(meta.get("model"), dict):
        raise HoldfastError(
            f"{model!r} does not name its architecture; name the architecture, and give this file as its weights "
            "(`cnn --weights FILE`)."
        )
    try:
        spec = ModelSpec.model_validate({**meta["model"], "weights": str(path)})
    except ValidationError as error:
        raise HoldfastError(f"{model!r} has an unusable description of its architecture: {error}.") from error
    if is_code(spec.name):  # a file of weights must not execute code
        raise HoldfastError(
            f"{model!r} is for a network that code makes, {spec.name!r}, and a file of weights may not run code. If "
            "you trust the code, name it as the model and this file as its weights (`file.py:function --weights FILE`)."
        )
    return spec.model_copy(update={"head": head}) if head is not None else spec


def with_header(spec: ModelSpec, data_dir: Path | str | None) -> ModelSpec:
    """Returns a spec with the extractor and the classes that Holdfast wrote into the header of its weights."""
    if spec.weights is None:
        return spec
    described = read_weights(find_weights(spec.weights, data_dir)).meta.get("model")
    if not isinstance(described, dict):
        return spec
    inserted, classes = described.get("extractor"), described.get("classes")
    more: dict[str, Any] = {}
    if not spec.extractor and inserted in (True, "affine"):
        more["extractor"] = inserted
    if spec.classes is None and spec.keep_outputs is None and isinstance(classes, list):
        more["classes"] = tuple(map(str, classes))
    return spec.model_copy(update=more) if more else spec


def find_weights(weights: str, data_dir: Path | str | None) -> Path:
    """Returns a file of weights by its name, in the current folder or the data folder.

    Raises:
        HoldfastError: if the file does not exist.
    """
    if Path(weights).expanduser().is_dir():
        raise HoldfastError(f"{weights!r} is a folder; name the file of weights in it (.safetensors, or its index).")
    file = place(weights, data_dir, is_there=Path.is_file)
    if file is None:
        folder, tried = data_folder(data_dir), [Path(weights).expanduser()]
        if folder is not None and not tried[0].is_absolute():
            tried.append(folder / weights)
        raise HoldfastError(f"No weights at {' or '.join(repr(str(p)) for p in tried)}: the file does not exist.")
    return file
