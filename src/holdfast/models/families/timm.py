"""Any image model of timm, split at the classifier that timm itself names."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from holdfast.errors import HoldfastError, unknown
from holdfast.models.introspection import first_line

REFUSED_OPTIONS = {
    "checkpoint_path": "would open a file that may be a pickle",
    "cache_dir": "is timm's own affair",
    "state_dict": "would bring weights in",
    "features_only": "leaves no head",
    "out_indices": "leaves no head",
    "feature_cfg": "leaves no head",
    "scriptable": "is a global setting of timm",
    "exportable": "is a global setting of timm",
    "no_jit": "is a global setting of timm",
}
"""Arguments of `timm.create_model` that are no setting of the architecture, and why; beside them those of
`_SOURCES`, which configure where weights come from. Nothing that loads weights may reach the scratch control."""

_SOURCES = ("pretrained_cfg", "pretrained_tag", "pretrained_strict", "pretrained_filter_fn", "pretrained_model_args")


def build_timm(
    name: str, input_shape: tuple[int, ...], num_outputs: int, options: dict[str, Any]
) -> tuple[nn.Module, str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Creates a timm model.

    Args:
        name: a name of `timm.list_models()`, with or without a pretrained tag.
        input_shape: (channels, height, width) of the images it will get; transformers with learned positions are built
            for this size.
        num_outputs: number of logits.
        options: further arguments of `timm.create_model`, such as `pretrained: true`.

    Returns:
        The model, the dotted name of its head, and (mean, std) of its pretrained configuration.

    Raises:
        HoldfastError: if timm does not know the name, rejects an option, or names no classifier; and for an option that
            loads weights from elsewhere.
    """
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    if len(input_shape) != 3:
        raise HoldfastError(f"timm:{name} takes images; this task's inputs have shape {input_shape}.")
    for option in options:
        if option in REFUSED_OPTIONS or option.startswith(_SOURCES):
            why = REFUSED_OPTIONS.get(option, "would change where weights come from")
            raise HoldfastError(
                f"timm:{name}: the option {option!r} {why}; leave it out. Weights are given as .safetensors "
                "(`weights`), or by `pretrained: true`."
            )
    config = timm.get_pretrained_cfg(name)
    # timm's own rule for which architectures are built for one size of image, and take it as an argument.
    size = {"img_size": tuple(input_shape[1:])} if config is not None and config.fixed_input_size else {}
    given = {"num_classes": num_outputs, "in_chans": input_shape[0], **size, **options}
    try:
        model = timm.create_model(name, **given)
    except Exception as error:  # whatever its hundreds of models raise, it is for these arguments
        if options.get("pretrained"):
            raise HoldfastError(
                f"timm:{name} cannot be created with its own weights: {type(error).__name__}: {first_line(error)}. "
                "They are fetched from a network (or timm's cache); else give weights (.safetensors) with --weights."
            ) from error
        raise HoldfastError(
            f"timm:{name} cannot be created with {given}: {type(error).__name__} {error}".rstrip(". ") + "."
        ) from error
    config = model.pretrained_cfg
    return model, find_head(name, model), (tuple(config["mean"]), tuple(config["std"]))


def check_own_head(name: str, num_outputs: int) -> None:
    """Refuses a pretrained model whose head is for other classes: timm would put an untrained one in its place.

    Raises:
        HoldfastError: if so, or if timm does not know the name or has no weights for it.
    """
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise HoldfastError(f"timm has no weights of its own for timm:{name}; give weights (.safetensors).")
    if config.num_classes != num_outputs:
        raise HoldfastError(
            f"timm:{name} is trained for {config.num_classes} classes, and the task has {num_outputs}: it would get an "
            "untrained head. Train one first, and name the .safetensors that Holdfast saved."
        )


def find_head(name: str, model: Any) -> str:
    """Returns the dotted name of a timm model's last layer, inside what `get_classifier` returns.

    Raises:
        HoldfastError: if the model has no classifier, or it holds no linear layer.
    """
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    inside = (
        [m for m in classifier.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        if isinstance(classifier, nn.Module)
        else []
    )
    if not inside:
        raise HoldfastError(
            f"timm:{name}: no head was found (get_classifier gives {type(classifier).__name__}); Holdfast needs one "
            "linear layer that makes the logits."
        )
    found: str = next(dotted for dotted, module in model.named_modules() if module is inside[-1])
    return found
