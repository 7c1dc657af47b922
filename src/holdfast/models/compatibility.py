"""Whether a model fits a task, and how it differs from another."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.extractor import layers_without_extractor, name_without_extractor, tensors_without_extractor
from holdfast.models.families.diffusion import Denoiser
from holdfast.models.introspection import first_line
from holdfast.models.split_model import SplitModel
from holdfast.models.transplant import count_hooks, is_published
from holdfast.tasks import DenoisingTask, Task


def check_fits(model: SplitModel, task: Task, *, own_task: bool, finite: bool = True, trainable: bool = True) -> None:
    """Refuses, with the reason, a model that cannot be trained or scored on a task.

    Args:
        model: on any device; two samples of the task are passed through a copy in evaluation mode.
        task: the task.
        own_task: whether the model's outputs must be this task's classes (its benign task), or may be others (a
            restricted task, for which it gets a fresh head).
        finite: whether its outputs must be finite.
        trainable: whether it must have trainable parameters. A defense respects what the model's owner froze; an
            adversary does not, so an audit works without any.

    Raises:
        HoldfastError: no trainable parameters, inputs of another shape, another class count, non-finite outputs.
    """
    if trainable and not any(p.requires_grad for p in model.parameters()):
        raise HoldfastError(
            f"{model.name} has no trainable parameters; unfreeze those that may be trained (requires_grad_)."
        )
    if model.answers_with != task.answers_with:
        what = _KINDS.get(model.answers_with, "a model")
        unit = "position" if model.answers_with == "next token" else "sample"
        raise HoldfastError(
            f"{model.name} is {what}: it returns one {model.answers_with} a {unit}, and "
            f"{task.described} needs one {task.answers_with}. {_REMEDIES[task.answers_with]}"
        )
    if isinstance(model, Denoiser) and isinstance(task, DenoisingTask) and own_task:
        model.check_schedule(task.schedule, task.name)
    _check_vocabulary(model, task)
    _check_tokens(model, task)
    _check_normalisation(model, task)
    # In a copy: the user's forward pass may change the model, or draw random numbers.
    probe = model.clone().eval()
    batch = next(iter(task.batches("test", 2, device=model.device)))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = probe(batch.x)
    except HoldfastError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise HoldfastError(
            f"{model.name} cannot take the inputs of task {task.name!r}, shape {task.input_shape}: "
            f"{first_line(error)}. For images, set the task's image_size and channels to what the model "
            "expects; for text, take a language model (hf:NAME), and set the task's length."
        ) from error
    shape = list(task.output_shape)
    shape[task.output_axis] = model.num_outputs
    wanted = (len(batch.x), *shape)
    if tuple(logits.shape) != wanted:
        raise HoldfastError(
            f"{model.name} returns {tuple(logits.shape)} for {len(batch.x)} inputs; its head "
            f"{model.head_name!r} says {wanted}."
        )
    if own_task and not task.takes_outputs(model.num_outputs):
        raise HoldfastError(
            f"{model.name} has {model.num_outputs} outputs and its task {task.name!r} {task.num_outputs} classes; "
            "they must agree. Keep the right classes with NAME[...], or build the model for this task."
        )
    if finite and not bool(logits.isfinite().all()):
        raise HoldfastError(
            f"{model.name} returns values that are not finite on task {task.name!r}; its weights cannot be used."
        )


_KINDS = {
    "noise": "a denoiser",
    "noise of a captioned image": "a text-to-image model",
    "vector": "not a denoiser or language model",
    "next token": "a language model",
}
_REMEDIES = {
    "noise": "Models for it are `unet` or a folder of an unconditional pipeline of diffusers.",
    "noise of a captioned image": "Models for it are `text-unet` or a folder of a text-to-image pipeline of diffusers.",
    "vector": "A denoiser's tasks are written NAME@kind=denoising, those of a text-to-image model "
    "NAME@kind=text-to-image, those of a causal language model NAME@kind=next-token (kind: in a recipe).",
    "next token": "A model for it is a causal language model, hf:FOLDER.",
}


def _check_normalisation(model: SplitModel, task: Task) -> None:
    """Refuses mean and std for another number of channels than the inputs have, which torch would broadcast."""
    channels = task.input_shape[0] if len(task.input_shape) == 3 else 1
    for name in ("mean", "std"):
        values = getattr(model, name)
        if values is None:
            continue
        if values.numel() not in (1, channels) or len(task.input_shape) == 2:
            raise HoldfastError(
                f"{model.name}: {name} of the input normalisation has {values.numel()} values, and inputs of task "
                f"{task.name!r} have shape {task.input_shape}; expected one for all, or one a channel."
            )
        if not bool(values.isfinite().all()):
            raise HoldfastError(
                f"{model.name}: {name} of the input normalisation is not finite: {values.flatten().tolist()}."
            )


def _check_vocabulary(model: SplitModel, task: Task) -> None:
    """Refuses token ids of another tokenizer than the model's."""
    own, given = model.vocabulary, task.vocabulary
    if own is None or (given is not None and own.agrees(given)):
        return
    if given is None:
        raise HoldfastError(f"{model.name} reads text, and task {task.name!r} is not text; give a task of sentences.")
    raise HoldfastError(
        f"{model.name} reads ids of the tokenizer {own.name!r} ({own.size} tokens), and those of task {task.name!r} "
        f"are of {given.name!r} ({given.size} tokens); load the task with the model's own tokenizer."
    )


def _check_tokens(model: SplitModel, task: Task) -> None:
    """Refuses rows that are longer than a language model reads, and tokens that it has no embeddings for."""
    if model.context is not None:
        check_length(model.name, model.context, task.input_shape[0], f"rows of task {task.name!r}")
    found = None if model.known_tokens is None else task.token_beyond(model.known_tokens)
    if found is not None:
        raise HoldfastError(
            f"{model.name} has embeddings for {model.known_tokens} tokens, and {found}, which the tokenizer has beyond "
            "them. Leave out what is written with this token, or extend the model's embedding "
            "(resize_token_embeddings) and train it."
        )


def check_length(name: str, context: int, length: int, what: str) -> None:
    """Refuses more tokens than a language model reads: beyond its positions it answers anything.

    Raises:
        HoldfastError: naming both numbers.
    """
    if length > context:
        raise HoldfastError(
            f"{name} reads at most {context} tokens (max_position_embeddings), and {what} have {length}; set the "
            f"task's length to at most {context}."
        )


def architecture_differences(model: SplitModel, original: SplitModel) -> list[str]:
    """Returns how a model differs from the original's architecture, beside its weights; empty if it does not.

    It compares the names and shapes of all tensors, whether each is a parameter, the types, settings and hooks of all
    layers, the head, and the input normalisation. An inserted extractor does not count: a defense inserted it, and it
    is part of what is audited.

    Returns:
        A sentence for each difference.

    Example:
        >>> one = SplitModel(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)), head="2")
        >>> other = SplitModel(nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)), head="2")
        >>> architecture_differences(other, one)
        ["Layer '1' is Tanh instead of ReLU."]
    """
    ours, theirs = tensors_without_extractor(model), tensors_without_extractor(original)
    differences = [f"Only the original has the tensor {n!r}." for n in theirs if n not in ours]
    differences += [f"Only {model.name} has the tensor {n!r}." for n in ours if n not in theirs]
    for name in (n for n in ours if n in theirs):
        tensor, other = ours[name], theirs[name]
        if tensor.shape != other.shape:
            differences.append(f"{name!r} is {tuple(tensor.shape)} instead of {tuple(other.shape)}.")
        if isinstance(tensor, nn.Parameter) != isinstance(other, nn.Parameter):
            differences.append(f"{name!r} is {_kind(tensor)} instead of {_kind(other)}.")
    differences += _layer_differences(layers_without_extractor(model), layers_without_extractor(original), model.name)
    if name_without_extractor(model, model.head_name) != name_without_extractor(original, original.head_name):
        differences.append(f"Its head is {model.head_name!r} instead of {original.head_name!r}.")
    for name in ("mean", "std"):
        values, others = (_rounded(getattr(m, name)) for m in (model, original))
        if values != others:
            differences.append(f"Its input {name} is {values} instead of {others}.")
    if isinstance(model, Denoiser) and isinstance(original, Denoiser) and model.predicts != original.predicts:
        differences.append(f"Its scheduler's prediction_type is {model.predicts} instead of {original.predicts}.")
    return differences


def _kind(tensor: Tensor) -> str:
    return "a parameter" if isinstance(tensor, nn.Parameter) else "not a parameter"


def _rounded(values: Tensor | None) -> list[float] | None:
    return None if values is None else [round(v, 6) for v in values.flatten().tolist()]


def _layer_differences(ours: dict[str, nn.Module], theirs: dict[str, nn.Module], name_of_ours: str) -> list[str]:
    differences = [
        f"Only the original has a layer {n!r} ({type(theirs[n]).__name__})." for n in theirs if n not in ours
    ]
    differences += [
        f"Only {name_of_ours} has a layer {n!r} ({type(ours[n]).__name__})." for n in ours if n not in theirs
    ]
    for name in (n for n in ours if n in theirs):
        kind, other = type(ours[name]), type(theirs[name])
        label = f"Layer {name!r}" if name else "The network"
        if kind is not other:  # two classes may have one name
            same = kind.__qualname__ == other.__qualname__
            spelled = [f"{t.__module__}.{t.__qualname__}" if same else t.__qualname__ for t in (kind, other)]
            differences.append(f"{label} is {spelled[0]} instead of {spelled[1]}{', another of that name' * same}.")
        if count_hooks(ours[name]) > count_hooks(theirs[name]):
            differences.append(f"{label} has hooks: code that runs beside its own.")
        if kind is other:
            settings, others = _settings(ours[name]), _settings(theirs[name])
            differences += [
                f"{label} has {key} = {settings.get(key, 'nothing')} instead of {others.get(key, 'nothing')}."
                for key in dict.fromkeys([*settings, *others])
                if settings.get(key) != others.get(key)
            ]
    return differences


def _settings(layer: nn.Module) -> dict[str, str]:
    """The attributes that a layer's code may depend on beside its tensors, shortened; objects by their type."""
    skip = {*vars(nn.Module()), "name_or_path"}  # the folder that transformers loaded weights from
    private = "_" if is_published(type(layer)) else "\0"  # transformers store how they loaded weights in private ones
    return {k: _spelled(v) for k, v in vars(layer).items() if k not in skip and not k.startswith(private)}


def _spelled(value: Any, inside: bool = False) -> str:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype):
        return repr(value)[:200]
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, list | tuple | Mapping) and not inside:
        pairs = islice(value.items() if isinstance(value, Mapping) else enumerate(value), 100)
        return f"{len(value)} values ({', '.join(f'{key}: {_spelled(item, True)}' for key, item in pairs)})"
    return type(value).__qualname__
