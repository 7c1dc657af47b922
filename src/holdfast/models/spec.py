"""Which model: the spec that a recipe, a name or a file of weights stands for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from holdfast.errors import HoldfastError
from holdfast.models.family import is_code
from holdfast.models.weights import read_weights
from holdfast.runtime.storage import load_tensors
from holdfast.tasks.paths import DATA_VARIABLE, place

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl")


class ModelSpec(BaseModel):
    """Which architecture and weights, as a recipe writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        description="`cnn`, `unet`, ... (built in), `timm:NAME`, `hf:NAME`, `diffusers:NAME` or `file.py:function`."
    )
    weights: str | None = Field(
        None, description="A .safetensors file; relative paths are also sought in the data folder."
    )
    options: dict[str, Any] = Field({}, description="Arguments of the architecture, such as `width: 32`.")
    head: str | None = Field(None, description="Dotted name of the head, where another than the one found is meant.")
    mean: tuple[float, ...] | None = Field(None, description="Input normalisation; by default the architecture's.")
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = Field(
        None,
        description="What the outputs are called, in their order; matched with the task's classes by name. By default "
        "what the model's own files say.",
    )
    keep_outputs: tuple[int, ...] | None = Field(
        None,
        description="Which outputs of the weights' head the task's classes are, in their order; null: all of them.",
    )
    extractor: bool | Literal["affine"] = Field(
        False,
        description="Whether the weights have a linear extractor inserted before the head; `affine`: with a shift, as "
        "an eraser has.",
    )


def spec_of(model: str | ModelSpec, data_dir: Path | str | None, head: str | None = None) -> ModelSpec:
    """Returns the spec of a model as `load_model` takes it; a file of weights carries its own.

    Raises:
        HoldfastError: if a file carries none that can be used.
    """
    if isinstance(model, ModelSpec):
        return with_header(model, data_dir)
    if not model.endswith(WEIGHT_SUFFIXES):
        return ModelSpec(name=model)
    path = find_weights(model, data_dir)
    _, meta = load_tensors(path)
    if not isinstance(meta.get("model"), dict):
        raise HoldfastError(
            f"{model!r} does not say which architecture it is for; give the architecture by name and this file as its "
            "weights (`cnn --weights FILE`)."
        )
    try:
        spec = ModelSpec.model_validate({**meta["model"], "weights": str(path)})
    except ValidationError as error:
        raise HoldfastError(f"{model!r} carries an unusable description of its architecture: {error}.") from error
    if is_code(spec.name):  # nothing that was read from a file is executed
        raise HoldfastError(
            f"{model!r} is for a network that code makes, {spec.name!r}, and no file of weights may have code run. If "
            "you trust the code, name it as the model and this file as its weights (`file.py:function --weights FILE`)."
        )
    return spec.model_copy(update={"head": head}) if head is not None else spec


def with_header(spec: ModelSpec, data_dir: Path | str | None) -> ModelSpec:
    """Returns a spec with what its weights say of their head: Holdfast writes it into their header."""
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
    """Returns the file of weights of a name, here or in the data folder.

    Raises:
        HoldfastError: if there is no such file.
    """
    if Path(weights).expanduser().is_dir():
        raise HoldfastError(f"{weights!r} is a folder; name the file of weights in it (.safetensors, or its index).")
    found = place(weights, data_dir, is_there=Path.is_file)
    if found is None:
        where = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE)
        places = [Path(weights).expanduser()]
        if where is not None and not places[0].is_absolute():
            places.append(Path(where).expanduser() / weights)
        raise HoldfastError(f"No weights at {' or '.join(repr(str(p)) for p in places)}: the file does not exist.")
    return found
