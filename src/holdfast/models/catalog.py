"""From a name to a model."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from holdfast.errors import HoldfastError, unknown
from holdfast.execution import load_tensors
from holdfast.models.base import SplitModel, _channels_last, check_fits
from holdfast.models.builtin import BUILTIN
from holdfast.tasks import Task
from holdfast.tasks.catalog import DATA_VARIABLE

_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl")


class ModelSpec(BaseModel):
    """Which architecture and weights, as a recipe writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="`cnn`, `mlp`, `cifar_resnet`, or `timm:NAME`.")
    weights: str | None = Field(
        None, description="A .safetensors file; relative paths are also sought in the data folder."
    )
    options: dict[str, Any] = Field({}, description="Arguments of the architecture, such as `width: 32`.")
    mean: tuple[float, ...] | None = Field(None, description="Input normalisation; by default the architecture's.")
    std: tuple[float, ...] | None = None
    extractor: bool = Field(False, description="Whether the weights have a linear extractor inserted before the head.")


def load_model(
    model: str | ModelSpec,
    task: Task,
    *,
    data_dir: Path | str | None = None,
    device: torch.device | str = "cpu",
) -> SplitModel:
    """Builds a model for a task, with weights if the spec names some.

    Args:
        model: a name, a `ModelSpec`, or the path of a `model.safetensors` that Holdfast saved (it carries its spec).
        task: its input shape and number of classes size the model.
        data_dir: also searched for relative weight files.
        device: where the model is put.

    Returns:
        The model, checked against the task. Without weights it is freshly initialised from torch's global generator.

    Raises:
        HoldfastError: for an unknown name or option, unusable weights, or a model that does not fit the task.

    Example:
        >>> from holdfast.tasks import load_task
        >>> load_model("cnn", load_task("digits[0-4]")).num_outputs
        5
    """
    spec = _spec(model, data_dir)
    # What is rebuilt later, for the scratch control or from a saved file, must not fetch pretrained weights again.
    plain = spec.model_copy(update={"options": {k: v for k, v in spec.options.items() if k != "pretrained"}})
    network, head, norm = _build(plain if spec.weights else spec, task.input_shape, task.num_outputs)
    mean, std = (spec.mean or (norm[0] if norm else None)), (spec.std or (norm[1] if norm else None))
    built = SplitModel(
        network,
        head,
        name=spec.name,
        mean=mean,
        std=std,
        factory=_Factory(plain, task.input_shape, task.num_outputs),
        spec=plain.model_dump(exclude={"weights"}),
    )
    if spec.extractor:
        built.add_extractor()
    if spec.weights is not None:
        built.load(_find(spec.weights, data_dir))
    built = _channels_last(built.to(device))
    check_fits(built, task, own_task=True)
    return built


@dataclass(frozen=True)
class _Factory:
    """Builds an architecture anew; an object and no closure, so that the model can be sent to another process."""

    spec: ModelSpec
    input_shape: tuple[int, ...]
    num_outputs: int

    def __call__(self) -> nn.Module:
        return _build(self.spec, self.input_shape, self.num_outputs)[0]


def load_released(
    name: str, weights: Path | str | None, task: Task, *, data_dir: Path | str | None = None
) -> SplitModel:
    """Loads a model that has weights, as the command line names it.

    Args:
        name: a `model.safetensors` that Holdfast saved, or an architecture.
        weights: the weights, where `name` is an architecture.
        task: see `load_model`.
        data_dir: see `load_model`.

    Raises:
        HoldfastError: see `load_model`; and if an architecture comes without weights.
    """
    is_file = name.endswith(_WEIGHT_SUFFIXES)
    if not is_file and weights is None:
        _build(ModelSpec(name=name), task.input_shape, task.num_outputs)
        raise HoldfastError(
            f"{name!r} is an architecture without weights; add its weights (.safetensors), or give a "
            "model.safetensors that Holdfast saved."
        )
    spec = name if is_file else ModelSpec(name=name, weights=str(weights))
    return load_model(spec, task, data_dir=data_dir)


def _spec(model: str | ModelSpec, data_dir: Path | str | None) -> ModelSpec:
    if isinstance(model, ModelSpec):
        return model
    if not model.endswith(_WEIGHT_SUFFIXES):
        return ModelSpec(name=model)
    path = _find(model, data_dir)
    _, meta = load_tensors(path)
    if not isinstance(meta.get("model"), dict):
        raise HoldfastError(
            f"{model!r} does not say which architecture it is for; give the architecture by name and this file as its "
            "weights (`cnn --weights FILE`)."
        )
    try:
        return ModelSpec.model_validate({**meta["model"], "weights": str(path)})
    except ValidationError as error:
        raise HoldfastError(f"{model!r} carries an unusable description of its architecture: {error}.") from error


def _find(weights: str, data_dir: Path | str | None) -> Path:
    data_dir = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE)
    path = Path(weights).expanduser()
    places = [path] if path.is_absolute() or data_dir is None else [path, Path(data_dir).expanduser() / path]
    for place in places:
        if place.is_file():
            return place
    raise HoldfastError(f"No weights at {' or '.join(repr(str(p)) for p in places)}: the file does not exist.")


def _build(
    spec: ModelSpec, input_shape: tuple[int, ...], num_outputs: int
) -> tuple[nn.Module, str, tuple[tuple[float, ...], tuple[float, ...]] | None]:
    if spec.name.startswith("timm:"):
        from holdfast.models.timm import build_timm

        return build_timm(spec.name.removeprefix("timm:"), input_shape, num_outputs, spec.options)
    if spec.name not in BUILTIN:
        raise unknown("model", spec.name, [*BUILTIN, "timm:NAME"])
    builder, head, norm = BUILTIN[spec.name]
    known = [p.name for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in spec.options:
        if option not in known:
            raise unknown(f"option of model {spec.name!r}:", option, known)
    for option, value in spec.options.items():
        if isinstance(value, int) and value < 1:
            raise HoldfastError(f"Model {spec.name!r}: {option} is {value}; expected at least 1.")
    try:
        network = builder(input_shape, num_outputs, **spec.options)
    except (RuntimeError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise HoldfastError(
            f"Model {spec.name!r} cannot be built for inputs of shape {input_shape} with {spec.options}: {error}."
        ) from error
    if len(input_shape) != 3:
        norm = None
    return network, head, norm
