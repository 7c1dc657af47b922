"""Any image model of timm, split at the classifier that timm names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from holdfast.errors import HoldfastError, unknown
from holdfast.models.family import Built, Family, Shape, config_in, for_channels, register
from holdfast.models.introspection import first_line
from holdfast.models.labels import names_of
from holdfast.models.spec import ModelSpec
from holdfast.models.split_model import SplitModel
from holdfast.runtime.storage import write_atomic
from holdfast.tasks import Task

REFUSED_OPTIONS = {
    "checkpoint_path": "would open a file that may be a pickle",
    "cache_dir": "is set by timm",
    "state_dict": "would bring weights in",
    "features_only": "leaves no head",
    "out_indices": "leaves no head",
    "feature_cfg": "leaves no head",
    "scriptable": "is a global setting of timm",
    "exportable": "is a global setting of timm",
    "no_jit": "is a global setting of timm",
}
"""Arguments of `timm.create_model` that are refused, and why; so are those of `_SOURCES`, which choose where weights
come from. The scratch control must not get an option that loads weights."""

_SOURCES = ("pretrained_cfg", "pretrained_tag", "pretrained_strict", "pretrained_filter_fn", "pretrained_model_args")


@register("timm:NAME")
class TimmFamily(Family):
    """Models by their name in timm."""

    def build(self, spec: ModelSpec, input_shape: Shape, num_outputs: int, data_dir: Path | str | None) -> Built:
        """See `Family.build`."""
        # Rebuilding it, for the scratch control or from a saved file, must not fetch pretrained weights again.
        rebuild = spec.model_copy(update={"options": {k: v for k, v in spec.options.items() if k != "pretrained"}})
        options = (rebuild if spec.weights else spec).options
        name = spec.name.removeprefix("timm:")
        network = _create(name, input_shape, num_outputs, options)
        norm = tuple(network.pretrained_cfg["mean"]), tuple(network.pretrained_cfg["std"])
        return Built(network, rebuild, find_head(name, network), for_channels(norm, input_shape))

    def for_task(self, spec: ModelSpec, task: Task) -> ModelSpec:
        """See `Family.for_task`."""
        if spec.weights is not None and spec.options.get("pretrained"):
            raise HoldfastError(
                f"{spec.name}: its weights are {spec.weights!r}, and `pretrained` would load others; leave one out."
            )
        return spec

    def released_options(self, name: str, task: Task, *, own_head: bool) -> dict[str, Any]:
        """See `Family.released_options`."""
        if own_head:
            _check_own_head(name.removeprefix("timm:"), task.num_outputs)
        return {"pretrained": True}

    def output_names(self, spec: ModelSpec, built: Built, network: nn.Module) -> tuple[str, ...] | None:
        """See `Family.output_names`."""
        return names_of(network) if spec.options.get("pretrained") else None

    def name_of_folder(self, folder: Path) -> ModelSpec | None:
        """See `Family.name_of_folder`."""
        config = config_in(folder)
        if not isinstance(config.get("architecture"), str) or "model_type" in config:
            return None
        pretrained, arguments = config.get("pretrained_cfg", {}), config.get("model_args", {})
        names = config.get("label_names")
        return ModelSpec(
            name=f"timm:{config['architecture']}",
            weights=str(folder / "model.safetensors"),
            options={k: v for k, v in arguments.items() if k not in ("num_classes", "in_chans", "img_size")},
            mean=pretrained.get("mean"),
            std=pretrained.get("std"),
            classes=tuple(map(str, names)) if isinstance(names, list) else None,
        )

    def save_pretrained(self, model: SplitModel, folder: Path) -> None:
        """Writes a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
        network: Any = model.network
        spec = model.spec or {}
        shape = getattr(model.factory, "input_shape", None)
        config = dict(network.pretrained_cfg)
        size = shape or (network.in_chans, *config["input_size"][1:])
        arguments = {**spec["options"], "in_chans": size[0]}
        if config.get("fixed_input_size"):
            arguments["img_size"] = list(size[1:])
        for key, values in (("mean", model.mean), ("std", model.std)):
            if values is not None:
                config[key] = values.flatten().tolist() * (size[0] if values.numel() == 1 else 1)
        names = spec.get("classes")
        kept = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "pool_size", "first_conv", "classifier")
        settings = {
            "architecture": spec["name"].removeprefix("timm:").partition(".")[0],
            "num_classes": model.num_outputs,
            "num_features": network.num_features,
            "model_args": arguments,
            **({"label_names": list(names)} if names else {}),
            "pretrained_cfg": {
                **{key: config[key] for key in kept if config.get(key) is not None},
                "num_classes": model.num_outputs,
                "input_size": list(size),
                "fixed_input_size": bool(config.get("fixed_input_size")),
                "custom_load": False,
            },
        }
        tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_atomic(folder / "config.json", json.dumps(settings, indent=2))


def _create(name: str, input_shape: tuple[int, ...], num_outputs: int, options: dict[str, Any]) -> Any:
    """Creates a timm model; transformers with learned positions are built for the size of the inputs."""
    import timm

    _check_name(name)
    if len(input_shape) != 3:
        raise HoldfastError(f"timm:{name} takes images; this task's inputs have shape {input_shape}.")
    for option in options:
        if option in REFUSED_OPTIONS or option.startswith(_SOURCES):
            why = REFUSED_OPTIONS.get(option, "would change where weights come from")
            raise HoldfastError(
                f"timm:{name}: the option {option!r} {why}; leave it out. Give weights as .safetensors (`weights`), or "
                "set `pretrained: true`."
            )
    config = timm.get_pretrained_cfg(name)
    # timm's own rule for which architectures are built for one image size, and take it as an argument.
    size = {"img_size": tuple(input_shape[1:])} if config is not None and config.fixed_input_size else {}
    given = {"num_classes": num_outputs, "in_chans": input_shape[0], **size, **options}
    try:
        return timm.create_model(name, **given)
    except Exception as error:  # hundreds of models raise different exceptions
        if options.get("pretrained"):
            raise HoldfastError(
                f"timm:{name} cannot be created with its own weights: {type(error).__name__}: {first_line(error)}. "
                "They are fetched from a network (or timm's cache); or give weights (.safetensors) with --weights."
            ) from error
        raise HoldfastError(
            f"timm:{name} cannot be created with {given}: {type(error).__name__} {error}".rstrip(". ") + "."
        ) from error


def _check_name(name: str) -> None:
    import timm

    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())


def _check_own_head(name: str, num_outputs: int) -> None:
    """Refuses a pretrained model with another number of classes: timm would replace its head by an untrained one."""
    import timm

    _check_name(name)
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise HoldfastError(f"timm has no weights of its own for timm:{name}; give weights (.safetensors).")
    if config.num_classes != num_outputs:
        raise HoldfastError(
            f"timm:{name} is trained for {config.num_classes} classes, and the task has {num_outputs}: it would get an "
            "untrained head. Train one first, and give the .safetensors that Holdfast saved."
        )


def find_head(name: str, model: Any) -> str:
    """Returns the dotted name of a timm model's last layer, inside what `get_classifier` returns.

    Raises:
        HoldfastError: if the model has no classifier, or it holds no linear layer.
    """
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    modules = classifier.modules() if isinstance(classifier, nn.Module) else ()
    layers = [m for m in modules if isinstance(m, nn.Linear | nn.Conv2d)]
    if not layers:
        raise HoldfastError(
            f"timm:{name}: no head was found (get_classifier gives {type(classifier).__name__}); Holdfast needs one "
            "linear layer that makes the logits."
        )
    return next(str(dotted) for dotted, module in model.named_modules() if module is layers[-1])
