"""From a name to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models.batchnorm import is_folded, unfold_batchnorm
from holdfast.models.compatibility import check_fits
from holdfast.models.families.diffusion import Denoiser
from holdfast.models.families.text_to_image import TextToImage
from holdfast.models.family import Built, family_of, folder_spec
from holdfast.models.labels import match_outputs, real_names
from holdfast.models.spec import WEIGHT_SUFFIXES, ModelSpec, find_weights, spec_of, with_header
from holdfast.models.split_model import SplitModel
from holdfast.tasks import Task
from holdfast.tasks.pipeline_folder import is_pipeline

FOLDED = (
    "BatchNorm only shifts in these weights, as if its scale were folded into the convolutions for inference. In "
    "training mode it normalises, and the network is another one. `unfold_batchnorm: true` (in a recipe's model) mends "
    "this."
)


def load_model(
    model: str | ModelSpec, task: Task, *, data_dir: Path | str | None = None, device: torch.device | str = "cpu"
) -> SplitModel:
    """Builds a model for a task, with weights if the spec names some.

    Args:
        model: a name, a `ModelSpec`, or the path of a `model.safetensors` that Holdfast saved (it contains its spec).
            `hf:NAME` (a folder, a name on the Hub, or `package:NAME/FOLDER`) and `diffusers:NAME` come with their
            weights, and read text if the task is text; `file.py:function` and `module:function` run code, which you
            must trust.
        task: gives the model's input shape and number of outputs.
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
    spec = spec_of(model, data_dir)
    family = family_of(spec.name)
    spec = family.for_task(spec, task)
    _check_options(spec, task)
    built = family.build(spec, task.input_shape, task.num_outputs, data_dir)
    if spec.keep_outputs is not None and (spec.weights is None or built.loaded):
        raise HoldfastError(
            f"{spec.name}: keep_outputs chooses among the outputs of a head in a file of weights, and this model has "
            "no such file; leave it out."
        )
    split = _split(spec, built, task)
    split.vocabulary = built.vocabulary if built.text is None else built.text.vocabulary
    split.tokenizer, split.fresh_head = built.tokenizer, built.fresh_head
    split.expect_extractor(spec.extractor)
    if spec.weights is not None and not built.loaded:
        split.load(find_weights(spec.weights, data_dir), spec.keep_outputs)
    split = split.to(device).in_memory_format()
    if spec.unfold_batchnorm:
        unfold_batchnorm(split, task)
    elif spec.weights is not None and is_folded(split.network):
        split.notes += (FOLDED,)
    _name_outputs(split, spec, family.output_names(spec, built, split.network), task)
    check_fits(split, task, own_task=True, trainable=False)
    return split


def _split(spec: ModelSpec, built: Built, task: Task) -> SplitModel:
    """Splits a network into body and head, with the settings that its spec and its family give."""
    mean, std = (values or default for values, default in zip((spec.mean, spec.std), built.norm, strict=True))
    head = spec.head or built.head
    more: dict[str, Any] = {
        "name": built.rebuild.name,
        "factory": built.factory or _Factory(built.rebuild, task.input_shape, task.num_outputs),
        "spec": built.rebuild.model_dump(exclude={"weights", "keep_outputs", "classes", "unfold_batchnorm"}),
    }
    model: SplitModel
    if built.scheduler is not None:
        if built.text is not None:
            model = TextToImage(
                built.network, built.text, scheduler=built.scheduler, source=built.source, **more
            )  # fmt: skip
        else:
            model = Denoiser(built.network, scheduler=built.scheduler, **more)
        if head not in (None, model.head_name) or mean is not None or std is not None:
            raise HoldfastError(
                f"{spec.name} is a denoiser: its head is {model.head_name!r}, and its inputs are images from -1 to 1, "
                "or their latents, which are not normalised; leave head, mean and std out."
            )
    elif built.kind is not None:
        model = built.kind(built.network, str(head), **more)
    elif built.foreign or head is None:
        model = SplitModel.of(built.network, task, head=head, mean=mean, std=std, **more)
    else:
        model = SplitModel(built.network, head, mean=mean, std=std, **more)
    model.notes += built.notes
    if built.code is not None:
        model.code = built.code
        model.notes += _on_normalisation(spec, built, task)
    return model


def _check_options(spec: ModelSpec, task: Task) -> None:
    """Refuses settings of a spec that would have no effect."""
    if (spec.mean or spec.std) and task.vocabulary is not None:
        raise HoldfastError(f"{spec.name} reads text, which is not normalised; leave mean and std out.")
    if spec.classes is not None and (spec.keep_outputs is not None or not task.labels_are_classes):
        why = "keep_outputs says" if spec.keep_outputs is not None else f"{task.described} has no classes:"
        raise HoldfastError(f"{spec.name}: {why} which outputs stand for which classes; leave `classes` out.")


def _on_normalisation(spec: ModelSpec, built: Built, task: Task) -> tuple[str, ...]:
    """A note on how inputs of the user's code are normalised: its weights may need another normalisation."""
    if len(task.input_shape) != 3:
        return ()
    if spec.mean is not None or spec.std is not None:
        return (f"Inputs of {built.rebuild.name} are normalised with the mean and std that were given.",)
    mean, std = built.norm
    if mean is not None and std is not None:
        shown = ", ".join(f"{name} {[round(v, 4) for v in values]}" for name, values in (("mean", mean), ("std", std)))
        return (f"Inputs of {built.rebuild.name} are normalised by the network's own configuration: {shown}.",)
    return (
        f"{built.rebuild.name} gets images in [0, 1] without normalisation. If its weights need one, set --mean and "
        "--std (`mean`, `std` in a recipe).",
    )


def _name_outputs(model: SplitModel, spec: ModelSpec, own: tuple[str, ...] | None, task: Task) -> None:
    """Matches outputs with classes by name, and records the names in the model's spec."""
    if not task.labels_are_classes:
        return
    if spec.keep_outputs is None and not model.fresh_head:
        names = spec.classes or own
        if spec.classes is None and len(names or ()) != model.num_outputs:
            names = None  # of a head that was replaced
        if names is not None:
            check_fits(model, task, own_task=False, trainable=False)
            match_outputs(model, names, task)
    classes = getattr(task, "class_names", None)
    if model.spec is None or classes is None or len(classes) != model.num_outputs:
        return
    named = tuple(map(str, classes)) if real_names(classes) is not None else None
    options = dict(model.spec["options"])
    if isinstance(options.get("config"), dict) and isinstance(options["config"].get("id2label"), dict):
        labels = options["config"]["id2label"]
        if len(labels) != len(classes) or named is not None:  # their number is the size of the architecture's head
            options["config"] = {**options["config"], "id2label": {str(i): str(c) for i, c in enumerate(classes)}}
    model.spec = {**model.spec, "options": options, "classes": named}


@dataclass(frozen=True)
class _Factory:
    """Builds an architecture anew; an object and not a closure, so that it can be pickled."""

    spec: ModelSpec
    input_shape: tuple[int, ...]
    num_outputs: int

    def __call__(self) -> nn.Module:
        return family_of(self.spec.name).build(self.spec, self.input_shape, self.num_outputs, None).network


def load_released(
    name: str,
    weights: Path | str | None,
    task: Task,
    *,
    head: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    own_head: bool = True,
    data_dir: Path | str | None = None,
) -> SplitModel:
    """Loads a model with weights, by the name that the command line takes.

    Args:
        name: a `model.safetensors` that Holdfast saved; a folder of a diffusers pipeline; `timm:NAME` or `hf:NAME`,
            with their own weights if `weights` is None; `module:function` or `file.py:function`, whose code is run;
            or an architecture.
        weights: the weights, if `name` is an architecture.
        task: see `load_model`.
        head: dotted name of the head, if Holdfast does not find it.
        mean: of the input normalisation, instead of the model's own.
        std: likewise.
        own_head: whether pretrained weights must have a head for the task's classes; otherwise the head is fresh.
        data_dir: see `load_model`.

    Raises:
        HoldfastError: see `load_model`; if an architecture comes without weights; and if other weights are given with
            a file that names its architecture.
    """
    if (mean is None) != (std is None):
        raise HoldfastError("Give --mean and --std together, one number a channel, such as --mean 0.5 --std 0.25.")
    norm: dict[str, Any] = {key: tuple(v) for key, v in (("mean", mean), ("std", std)) if v is not None}
    if is_pipeline(name):
        name = f"diffusers:{name}"
    if name.endswith(WEIGHT_SUFFIXES):
        spec = spec_of(name, data_dir, head)
        if weights is not None:
            raise HoldfastError(
                f"{name!r} is a file of weights that names its architecture ({spec.name}), and the weights "
                f"{str(weights)!r} are given beside it; leave one of them out, or name the architecture in place of "
                "the file."
            )
        return load_model(spec.model_copy(update=norm), task, data_dir=data_dir)
    _refuse_path(name)
    options = {} if weights is not None else family_of(name).released_options(name, task, own_head=own_head)
    given = None if weights is None else str(weights)
    spec = with_header(ModelSpec(name=name, options=options, head=head, weights=given, **norm), data_dir)
    model = load_model(spec, task, data_dir=data_dir)
    if own_head and model.fresh_head:
        raise HoldfastError(
            f"{name} comes without a head for classes, which a released model has. Train it on {task.name!r} first, "
            "by a recipe with `pretrain` or by holdfast.pretrain, and give the file that was saved."
        )
    return model


def _refuse_path(name: str) -> None:
    """Refuses a file or folder that is not a model; the message says what to write instead."""
    path = Path(name).expanduser()
    if name.endswith(".py"):
        raise HoldfastError(
            f"{name!r} is a file of code; name the function in it that returns a network: {name}:FUNCTION."
        )
    if name.endswith(".json"):
        raise HoldfastError(
            f"{name!r} does not describe a network; name the architecture, and give this file as its weights "
            "(--weights) if it is the index of several files."
        )
    if ":" not in name and path.is_dir():
        entries = {entry.name for entry in path.iterdir()}
        if "config.json" in entries or "adapter_config.json" in entries:
            raise HoldfastError(f"{name!r} is a folder of transformers; name it hf:{name}.")
        files = sorted(entry for entry in entries if entry.endswith(WEIGHT_SUFFIXES))
        hint = f"name the file in it: {path / files[0]}" if files else "it holds no model"
        raise HoldfastError(f"{name!r} is a folder, not a model; {hint}.")


def load_folder(place: Path | str, task: Task, *, data_dir: Path | str | None = None, **more: Any) -> SplitModel:
    """Loads a model that a library, or Holdfast, wrote; see `SplitModel.from_pretrained`.

    Raises:
        HoldfastError: if `place` is neither a file nor a folder with a model.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return load_model(spec_of(str(place), data_dir), task, data_dir=data_dir, **more)
    spec = folder_spec(folder)
    if spec is None:
        if not (folder / "model.safetensors").is_file():
            _refuse_path(str(folder))
        spec = spec_of(str(folder / "model.safetensors"), data_dir)
    return load_model(spec, task, data_dir=data_dir, **more)
