"""From a name to a model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from holdfast.errors import HoldfastError, unknown
from holdfast.models import wrappers
from holdfast.models.compatibility import check_fits
from holdfast.models.families import diffusion
from holdfast.models.families.builtin import BUILTIN
from holdfast.models.families.user_code import Code, is_code, loaded_layers, renew
from holdfast.models.labels import match_outputs, names_in, names_of, real_names
from holdfast.models.split_model import SplitModel, _channels_last
from holdfast.models.weights import read_weights
from holdfast.runtime.storage import load_tensors
from holdfast.tasks import Schedule, Task, Vocabulary, located
from holdfast.tasks.paths import DATA_VARIABLE, place
from holdfast.tasks.schedule import SCHEDULES

Values = tuple[float, ...]

_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl")


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
            `hf:NAME` (a folder, a name on the Hub, or `package:NAME/FOLDER`) and `diffusers:NAME` come with their
            weights, and read text if the task is text; `file.py:function`
            and `module:function` run somebody's code, which you must trust.
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
    spec = _for_text(spec_of(model, data_dir), task)
    check_options(spec, task)
    built = _build(spec, task.input_shape, task.num_outputs, data_dir)
    mean, std = (values or default for values, default in zip((spec.mean, spec.std), built.norm, strict=True))
    more: dict[str, Any] = {
        "name": built.plain.name,
        "mean": mean,
        "std": std,
        "factory": _Factory(built.plain, task.input_shape, task.num_outputs, built.code),
        "spec": built.plain.model_dump(exclude={"weights", "keep_outputs", "classes"}),
    }
    head = spec.head or built.head
    found: SplitModel
    if built.scheduler is not None:
        if head not in (None, diffusion.HEAD) or mean is not None or std is not None:
            raise HoldfastError(
                f"{spec.name} is a denoiser: its head is {diffusion.HEAD!r}, and images from -1 to 1 are its inputs as "
                "they are; leave head, mean and std out."
            )
        del more["mean"], more["std"]
        found = diffusion.Denoiser(built.network, scheduler=built.scheduler, **more)
        found.notes += built.notes
    elif built.foreign:
        found = SplitModel.of(built.network, task, head=head, **more)
        found.notes += built.notes
        if built.code is not None:
            found.code = built.code.sha256
            found.notes += _on_normalisation(spec, built, task)
    else:
        found = SplitModel(built.network, str(head), **more)
    found.vocabulary, found.fresh_head = built.vocabulary, built.fresh_head
    if spec.keep_outputs is not None and (spec.weights is None or built.loaded):
        raise HoldfastError(
            f"{spec.name}: keep_outputs chooses among the outputs of a head in a file of weights, and there is none "
            "such for this model; leave it out."
        )
    found.expect_extractor(spec.extractor)
    if spec.weights is not None and not built.loaded:
        found.load(_find(spec.weights, data_dir), spec.keep_outputs)
    found = _channels_last(found.to(device))
    _name_outputs(found, spec, built.plain.options.get("config"), task)
    check_fits(found, task, own_task=True, trainable=False)
    return found


def _told_names(spec: ModelSpec, network: nn.Module, config: Any) -> tuple[str, ...] | None:
    """What a model's own files call its outputs; only where its head comes from there as well."""
    if spec.name.startswith("hf:"):
        fresh = spec.weights is None and spec.options.get("config") is not None
        return None if fresh else names_in(config)
    if is_code(spec.name) or (spec.name.startswith("timm:") and spec.options.get("pretrained")):
        return names_of(network)
    return None


def check_options(spec: ModelSpec, task: Task) -> None:
    """Refuses what a spec says and nothing would come of.

    Raises:
        HoldfastError: naming it.
    """
    hf = spec.name.startswith("hf:")
    if spec.weights is not None and spec.options.get("pretrained"):
        raise HoldfastError(
            f"{spec.name}: its weights are {spec.weights!r}, and `pretrained` asks for others; leave one out."
        )
    if hf and "num_labels" in spec.options and (spec.weights is not None or spec.options.get("config") is not None):
        raise HoldfastError(
            f"{spec.name}: num_labels puts a fresh head in the place of the model's own, and there is none such with "
            "`weights` or `config`; leave it out."
        )
    if (spec.mean or spec.std) and task.vocabulary is not None:
        raise HoldfastError(f"{spec.name} reads text, which is not normalised; leave mean and std out.")
    if spec.classes is not None and (spec.keep_outputs is not None or not task.labels_are_classes):
        why = "keep_outputs says" if spec.keep_outputs is not None else f"{task.described} has no classes:"
        raise HoldfastError(f"{spec.name}: {why} which outputs stand for which classes; leave `classes` out.")


def _on_normalisation(spec: ModelSpec, built: _Built, task: Task) -> tuple[str, ...]:
    """Which normalisation the inputs of somebody's own code get: it may want one that it does not say."""
    if len(task.input_shape) != 3:
        return ()
    if spec.mean is not None or spec.std is not None:
        return (f"Inputs of {built.plain.name} are normalised with the mean and std that were given.",)
    mean, std = built.norm
    if mean is not None and std is not None:
        shown = ", ".join(f"{name} {[round(v, 4) for v in values]}" for name, values in (("mean", mean), ("std", std)))
        return (f"Inputs of {built.plain.name} are normalised as the network says: {shown}.",)
    return (
        f"{built.plain.name} gets images in [0, 1] as they are. If its weights want them normalised, say so with "
        "--mean and --std (`mean`, `std` in a recipe).",
    )


def _name_outputs(found: SplitModel, spec: ModelSpec, config: Any, task: Task) -> None:
    """Matches outputs with classes by name, and has the names saved with the model."""
    if not task.labels_are_classes:
        return
    if spec.keep_outputs is None and not found.fresh_head:
        names = spec.classes or _told_names(spec, found.network, config)
        if spec.classes is None and len(names or ()) != found.num_outputs:
            names = None  # of a head that was replaced
        if names is not None:
            check_fits(found, task, own_task=False, trainable=False)
            match_outputs(found, names, task)
    classes = getattr(task, "class_names", None)
    if found.spec is None or classes is None or len(classes) != found.num_outputs:
        return
    named = tuple(map(str, classes)) if real_names(classes) is not None else None
    options = dict(found.spec["options"])
    if isinstance(options.get("config"), dict) and isinstance(options["config"].get("id2label"), dict):
        labels = options["config"]["id2label"]
        if len(labels) != len(classes) or named is not None:  # their number makes the head of an architecture
            options["config"] = {**options["config"], "id2label": {str(i): str(c) for i, c in enumerate(classes)}}
    found.spec = {**found.spec, "options": options, "classes": named}


def _for_text(spec: ModelSpec, task: Task) -> ModelSpec:
    """A transformers model whose task is text reads the task's ids, unless its weights already say which it reads."""
    read = task.vocabulary if spec.name.startswith("hf:") else None
    if read is None or "vocabulary" in spec.options:
        return spec
    return spec.model_copy(update={"options": {**spec.options, "vocabulary": asdict(read)}})


@dataclass(frozen=True)
class _Factory:
    """Builds an architecture anew; an object and no closure, so that the model can be sent to another process."""

    spec: ModelSpec
    input_shape: tuple[int, ...]
    num_outputs: int
    code: Code | None = None

    def __call__(self) -> nn.Module:
        if self.code is None:
            return _build(self.spec, self.input_shape, self.num_outputs).network
        state = torch.get_rng_state()
        options = self.spec.options
        twice = [_plain_network(self.code, self.code.build(self.input_shape, self.num_outputs, options)) for _ in "ab"]
        if any(renewed := loaded_layers(*twice)):
            torch.set_rng_state(state)  # the function may have put its own seed in the place of ours
            renew(twice[1], renewed, self.spec.name)
        return twice[1]


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
    """Loads a model that has weights, as the command line names it.

    Args:
        name: a `model.safetensors` that Holdfast saved; a folder of a diffusers pipeline; `timm:NAME` or `hf:NAME`,
            with their own weights if there are no others; `module:function` or `file.py:function`, whose code is run;
            or an architecture.
        weights: the weights, where `name` is an architecture.
        task: see `load_model`.
        head: dotted name of the head, where it is not to be found.
        mean: of the input normalisation, where another is meant than the model's own.
        std: likewise.
        own_head: whether pretrained weights must bring a head for the task's classes; else it is a fresh one.
        data_dir: see `load_model`.

    Raises:
        HoldfastError: see `load_model`; if an architecture comes without weights; and if a file that names its
            architecture comes with others.
    """
    if (mean is None) != (std is None):
        raise HoldfastError("Give --mean and --std together, one number a channel, such as --mean 0.5 --std 0.25.")
    said: dict[str, Any] = {key: tuple(v) for key, v in (("mean", mean), ("std", std)) if v is not None}
    if diffusion.is_pipeline(name):
        name = f"diffusers:{name}"
    if name.endswith(_WEIGHT_SUFFIXES):
        described = spec_of(name, data_dir, head)
        if weights is not None:
            raise HoldfastError(
                f"{name!r} is a file of weights that names its architecture ({described.name}), and the weights "
                f"{str(weights)!r} are given beside it; leave one of them out, or name the architecture in place "
                "of the file."
            )
        return load_model(described.model_copy(update=said), task, data_dir=data_dir)
    _refuse_place(name)
    options: dict[str, Any] = {}
    if weights is None and name.startswith("timm:"):
        from holdfast.models.families.timm import check_own_head

        if own_head:
            check_own_head(name.removeprefix("timm:"), task.num_outputs)
        options = {"pretrained": True}
    elif weights is None and name.startswith("hf:"):
        options = {} if own_head else {"num_labels": task.num_outputs}
    elif weights is None and ":" not in name:
        _build(ModelSpec(name=name), task.input_shape, task.num_outputs)
        raise HoldfastError(
            f"{name!r} is an architecture without weights; add its weights (.safetensors), or give a "
            "model.safetensors that Holdfast saved."
        )
    given = None if weights is None else str(weights)
    described = _with_header(ModelSpec(name=name, options=options, head=head, weights=given, **said), data_dir)
    found = load_model(described, task, data_dir=data_dir)
    if own_head and found.fresh_head:
        raise HoldfastError(
            f"{name} comes without a head for classes, and what is released has one. Train it on {task.name!r} first, "
            "by a recipe with `pretrain` or by holdfast.pretrain, and name the file that was saved."
        )
    return found


def spec_of(model: str | ModelSpec, data_dir: Path | str | None, head: str | None = None) -> ModelSpec:
    """Returns the spec of a model as `load_model` takes it; a file of weights carries its own.

    Raises:
        HoldfastError: if a file carries none that can be used.
    """
    if isinstance(model, ModelSpec):
        return _with_header(model, data_dir)
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
        spec = ModelSpec.model_validate({**meta["model"], "weights": str(path)})
    except ValidationError as error:
        raise HoldfastError(f"{model!r} carries an unusable description of its architecture: {error}.") from error
    if is_code(spec.name):  # nothing that was read from a file is executed
        raise HoldfastError(
            f"{model!r} is for a network that code makes, {spec.name!r}, and no file of weights may have code run. If "
            "you trust the code, name it as the model and this file as its weights (`file.py:function --weights FILE`)."
        )
    return spec.model_copy(update={"head": head}) if head is not None else spec


def _with_header(spec: ModelSpec, data_dir: Path | str | None) -> ModelSpec:
    """Weights that Holdfast saved say what their head is like, also where their architecture is named."""
    if spec.weights is None:
        return spec
    described = read_weights(_find(spec.weights, data_dir)).meta.get("model")
    if not isinstance(described, dict):
        return spec
    inserted, classes = described.get("extractor"), described.get("classes")
    more: dict[str, Any] = {}
    if not spec.extractor and inserted in (True, "affine"):
        more["extractor"] = inserted
    if spec.classes is None and spec.keep_outputs is None and isinstance(classes, list):
        more["classes"] = tuple(map(str, classes))
    return spec.model_copy(update=more) if more else spec


def _refuse_place(name: str) -> None:
    """Says of a file or folder that is no model what to write instead."""
    path = Path(name).expanduser()
    if name.endswith(".py"):
        raise HoldfastError(
            f"{name!r} is a file of code; name the function in it that returns a network: {name}:FUNCTION."
        )
    if name.endswith(".json"):
        raise HoldfastError(
            f"{name!r} does not say how the network is built; name the architecture, and this file as its weights "
            "(--weights) if it is the index of several files."
        )
    if ":" not in name and path.is_dir():
        held = {each.name for each in path.iterdir()}
        if "config.json" in held or "adapter_config.json" in held:
            raise HoldfastError(f"{name!r} is a folder as transformers write it; name it hf:{name}.")
        files = sorted(each for each in held if each.endswith(_WEIGHT_SUFFIXES))
        hint = f"name the file in it: {path / files[0]}" if files else "it holds no model"
        raise HoldfastError(f"{name!r} is a folder and no model that is known here; {hint}.")


def _find(weights: str, data_dir: Path | str | None) -> Path:
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


@dataclass(frozen=True)
class _Built:
    """A network, and what is known of it.

    Attributes:
        network: with its own weights, if its name stands for some.
        plain: the spec that builds the same architecture with fresh weights, without fetching or reading any.
        head: dotted name of the head; None: it is still to be found.
        norm: mean and std of the input normalisation, or twice None.
        foreign: whether nothing is known about its code.
        scheduler: the configuration of its scheduler, if it is a denoiser.
        loaded: whether the weights of the spec are in it.
        code: what made it, if that is somebody's own code.
        notes: see `SplitModel`.
        vocabulary: see `SplitModel`.
        fresh_head: see `SplitModel`.
    """

    network: nn.Module
    plain: ModelSpec
    head: str | None = None
    norm: tuple[Values | None, Values | None] = (None, None)
    foreign: bool = False
    scheduler: Mapping[str, Any] | None = None
    loaded: bool = False
    code: Code | None = None
    notes: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None
    fresh_head: bool = False


def _build(
    spec: ModelSpec, input_shape: tuple[int, ...], num_outputs: int, data_dir: Path | str | None = None
) -> _Built:
    if spec.name.startswith("timm:"):
        return _build_timm(spec, input_shape, num_outputs)
    if spec.name.startswith("hf:"):
        text = "vocabulary" in spec.options
        return _build_language(spec, num_outputs, data_dir) if text else _build_huggingface(spec, input_shape, data_dir)
    if spec.name.startswith("diffusers:"):
        return _build_diffusers(spec, data_dir)
    if is_code(spec.name):
        return _build_code(spec, input_shape, num_outputs)
    if spec.name not in BUILTIN:
        raise unknown("model", spec.name, [*BUILTIN, "timm:NAME", "hf:NAME", "diffusers:NAME", "file.py:FUNCTION"])
    builder, head, norm = BUILTIN[spec.name]
    known = inspect.getfullargspec(builder).kwonlyargs
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
    if spec.name == "unet":
        return _built_unet(network, spec)
    known_norm = _for_channels(norm, input_shape) if norm and len(input_shape) == 3 else (None, None)
    return _Built(network, spec, head, known_norm)


def _built_unet(network: nn.Module, spec: ModelSpec) -> _Built:
    """With its noise schedule: weights travel, and a folder stays, so that its configuration takes its place."""
    wanted = spec.options.get("schedule", "linear")
    schedule = Schedule(wanted) if isinstance(wanted, Mapping) else Schedule.named(wanted)
    plain = spec
    if wanted not in SCHEDULES:
        plain = spec.model_copy(update={"options": {**spec.options, "schedule": schedule.config}})
    return _Built(network, plain, diffusion.HEAD, scheduler=schedule.config)


def _build_timm(spec: ModelSpec, input_shape: tuple[int, ...], num_outputs: int) -> _Built:
    from holdfast.models.families.timm import build_timm

    # What is rebuilt later, for the scratch control or from a saved file, must not fetch pretrained weights again.
    plain = spec.model_copy(update={"options": {k: v for k, v in spec.options.items() if k != "pretrained"}})
    options = (plain if spec.weights else spec).options
    network, head, norm = build_timm(spec.name.removeprefix("timm:"), input_shape, num_outputs, options)
    return _Built(network, plain, head, _for_channels(norm, input_shape))


def _build_huggingface(spec: ModelSpec, input_shape: tuple[int, ...], data_dir: Path | str | None) -> _Built:
    from holdfast.models.families import hf_vision

    unused = [o for o in spec.options if o not in ("config", "num_labels")]
    if unused:
        raise unknown(f"option of model {spec.name!r}:", unused[0], ["config", "num_labels"])
    config = spec.options.get("config")
    if config is not None:
        return _Built(hf_vision.architecture(spec.name.removeprefix("hf:"), config), spec, foreign=True)
    place = located(spec.name.removeprefix("hf:"), data_dir)
    notes: tuple[str, ...] = ()
    if spec.weights:
        network, config, notes = hf_vision.with_weights(place, _find(spec.weights, data_dir))
    else:
        network, config = hf_vision.pretrained(place, **spec.options)
    network, merged = _merged(network, spec.name)
    norm = hf_vision.normalisation(place)
    mean, std = _for_channels(norm, input_shape) if norm is not None else (None, None)
    name = f"hf:{Path(place).name}" if Path(place).is_dir() else spec.name
    plain = spec.model_copy(
        update={"name": name, "options": {"config": config}, "mean": spec.mean or mean, "std": spec.std or std}
    )
    missing = f"{name} comes without a preprocessor configuration; images in [0, 1] are handed to it as they are."
    return _Built(
        network,
        plain,
        norm=(mean, std),
        foreign=True,
        loaded=True,
        notes=(*notes, *merged) if norm is not None or spec.mean else (*notes, *merged, missing),
    )


def _build_language(spec: ModelSpec, num_outputs: int, data_dir: Path | str | None) -> _Built:
    from holdfast.models.families import hf_text

    name = spec.name.removeprefix("hf:")
    configured = spec.options.get("config") is not None
    place = name if configured else located(name, data_dir)
    built = hf_text.build(name, place, spec.options, num_outputs)
    folder = not configured and Path(place).is_dir() and not name.startswith("package:")
    plain = spec.model_copy(
        update={"name": f"hf:{Path(place).name}" if folder else spec.name, "options": built.options}
    )
    return _Built(
        built.network,
        plain,
        head="head" if isinstance(built.network, hf_text.Pooled) else None,
        foreign=True,
        vocabulary=built.vocabulary,
        fresh_head=built.fresh_head and spec.weights is None,
        notes=built.notes,
    )


def _build_diffusers(spec: ModelSpec, data_dir: Path | str | None) -> _Built:
    unused = [o for o in spec.options if o not in ("config", "scheduler")]
    if unused:
        raise unknown(f"option of model {spec.name!r}:", unused[0], ["config", "scheduler"])
    if "config" in spec.options:
        network = diffusion.architecture(spec.options["config"])
        return _Built(network, spec, scheduler=spec.options.get("scheduler") or {})
    place = located(spec.name.removeprefix("diffusers:"), data_dir)
    network, scheduler, notes = diffusion.pretrained(place)
    plain = spec.model_copy(
        update={
            "name": f"diffusers:{Path(place).name}" if Path(place).is_dir() else spec.name,
            "options": {"config": diffusion.plain_config(network), "scheduler": Schedule(scheduler).config},
        }
    )
    return _Built(network, plain, scheduler=scheduler, loaded=spec.weights is None, notes=notes)


def _build_code(spec: ModelSpec, input_shape: tuple[int, ...], num_outputs: int) -> _Built:
    code = Code.named(spec.name)
    made = code.build(input_shape, num_outputs, spec.options)
    described = spec.model_copy(update={"name": code.label})
    if not isinstance(made, SplitModel):
        found = wrappers.plain(made, code.label, spec.head)
        norm = _said_normalisation(found.network) if len(input_shape) == 3 else None
        mean, std = (None, None) if norm is None else norm
        return _Built(found.network, described, None, (mean, std), foreign=True, code=code, notes=found.notes)
    made = made.made_plain()
    mean, std = (None if v is None else tuple(v.flatten().tolist()) for v in (made.mean, made.std))
    return _Built(made.network, described, made.head_name, (mean, std), foreign=True, code=code, notes=made.notes)


def _said_normalisation(network: nn.Module) -> tuple[Values, Values] | None:
    """Mean and std that a network says as timm's do; None if it says none, or a reader could not use it."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(network, attribute, None)
        values = [config.get(key) if isinstance(config, Mapping) else None for key in ("mean", "std")]
        if all(isinstance(v, list | tuple) and v for v in values):
            mean, std = (tuple(map(float, v)) for v in values if v is not None)
            return mean, std
    return None


def _plain_network(code: Code, made: nn.Module) -> nn.Module:
    return wrappers.plain(made.network if isinstance(made, SplitModel) else made, code.label).network


def _merged(network: nn.Module, name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Without the adapter that transformers finds beside a model, which becomes a part of its weights."""
    found = wrappers.plain(network, name)
    return found.network, found.notes


def _for_channels(norm: tuple[Values, Values], input_shape: tuple[int, ...]) -> tuple[Values, Values]:
    """Normalisation of images with another number of channels is the mean of what each channel had."""
    mean, std = norm
    if len(mean) in (1, input_shape[0]):
        return mean, std
    return (sum(mean) / len(mean),), (sum(std) / len(std),)
