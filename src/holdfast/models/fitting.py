"""Whether a model fits a task, in what it differs from another, and its weights inside the other's code."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from holdfast.errors import HoldfastError
from holdfast.models.base import SplitModel
from holdfast.models.denoiser import Denoiser
from holdfast.models.heads import every_tensor, first_line
from holdfast.tasks import DenoisingTask, Task, TextTask


def check_fits(model: SplitModel, task: Task, *, own_task: bool, finite: bool = True, trainable: bool = True) -> None:
    """Refuses, with the reason, a model that cannot be trained or scored on a task.

    Args:
        model: on any device; two samples of the task are passed through a copy in evaluation mode.
        task: the task it is to work on.
        own_task: whether the model's outputs must be this task's classes (its benign task), or may be more (a
            restricted task that a fresh head will serve).
        finite: whether its outputs must be finite.
        trainable: whether it must have parameters that may be trained. Who immunizes a model respects what its owner
            froze; an adversary does not, so that an audit asks for none.

    Raises:
        HoldfastError: no trainable parameters, inputs of another shape, another class count, non-finite outputs.
    """
    if trainable and not any(p.requires_grad for p in model.parameters()):
        raise HoldfastError(
            f"{model.name} has no trainable parameters; un-freeze what may be trained (requires_grad_)."
        )
    if isinstance(model, Denoiser) != (task.kind == "denoising"):
        what = "is a denoiser" if isinstance(model, Denoiser) else "is no denoiser"
        raise HoldfastError(
            f"{model.name} {what}, and the kind of task {task.name!r} is {task.kind}. A denoiser's tasks are given as "
            "NAME@kind=denoising (kind: denoising in a recipe); a model for them is `unet` or a diffusers folder."
        )
    if isinstance(model, Denoiser) and isinstance(task, DenoisingTask) and own_task:
        model.check_schedule(task.schedule, task.name)
    _check_vocabulary(model, task)
    _check_normalisation(model, task)
    # Of a copy: somebody's forward pass may change the model, or draw random numbers.
    probe = model.clone().eval()
    batch = next(iter(task.batches("test", 2, device=model.device)))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = probe(batch.x)
    except HoldfastError:
        raise
    except Exception as error:  # the code may be anybody's, and so is what it raises
        raise HoldfastError(
            f"{model.name} cannot take the inputs of task {task.name!r}, shape {task.input_shape}: "
            f"{first_line(error)}. For images, set the task's image_size and channels to what the model "
            "expects; for text, take a language model (hf:NAME), and set the task's length."
        ) from error
    wanted = (len(batch.x), model.num_outputs, *task.output_shape[1:])
    if tuple(logits.shape) != wanted:
        raise HoldfastError(
            f"{model.name} returns {tuple(logits.shape)} for {len(batch.x)} inputs; its head "
            f"{model.head_name!r} says {wanted}."
        )
    if own_task and model.num_outputs != task.num_outputs:
        raise HoldfastError(
            f"{model.name} has {model.num_outputs} outputs and its task {task.name!r} {task.num_outputs} classes; "
            "they must agree. Keep the right classes with NAME[...], or build the model for this task."
        )
    if finite and not bool(logits.isfinite().all()):
        raise HoldfastError(
            f"{model.name} returns values that are not finite on task {task.name!r}; its weights are unusable."
        )


def _check_normalisation(model: SplitModel, task: Task) -> None:
    """Refuses a mean and std of other channels than the inputs have: they would be broadcast to something else."""
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
    """Refuses token ids that mean something else to the model, or nothing."""
    own = model.vocabulary
    given = task.vocabulary if isinstance(task, TextTask) else None
    if own is None or (given is not None and own.agrees(given)):
        return
    if given is None:
        raise HoldfastError(f"{model.name} reads text, and task {task.name!r} is none; give it a task of sentences.")
    raise HoldfastError(
        f"{model.name} reads ids of the tokenizer {own.name!r} ({own.size} tokens), and those of task {task.name!r} "
        f"are of {given.name!r} ({given.size} tokens); load the task with the model's own tokenizer."
    )


def architecture_differences(model: SplitModel, original: SplitModel) -> list[str]:
    """Returns in which ways a model is more than other weights for the original's architecture; empty if it is not.

    Compared are the names and shapes of all tensors and whether each is a parameter, the kinds of all layers, their
    settings, hooks and functions of their own, the head, and the input normalisation. An inserted extractor is no
    difference: it is a defense's, and part of what is audited.

    Returns:
        A sentence for each difference.

    Example:
        >>> one = SplitModel(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)), head="2")
        >>> other = SplitModel(nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)), head="2")
        >>> architecture_differences(other, one)
        ["Layer '1' is Tanh instead of ReLU."]
    """
    found = []
    own, theirs = _plain_tensors(model), _plain_tensors(original)
    found += [f"Only the original has the tensor {n!r}." for n in theirs if n not in own]
    found += [f"Only {model.name} has the tensor {n!r}." for n in own if n not in theirs]
    for name in (n for n in own if n in theirs):
        mine, other = own[name], theirs[name]
        if mine.shape != other.shape:
            found.append(f"{name!r} is {tuple(mine.shape)} instead of {tuple(other.shape)}.")
        if isinstance(mine, nn.Parameter) != isinstance(other, nn.Parameter):
            found.append(f"{name!r} is {_kind(mine)} instead of {_kind(other)}.")
    found += _layer_differences(_plain_layers(model), _plain_layers(original), model.name)
    if _plain_name(model, model.head_name) != _plain_name(original, original.head_name):
        found.append(f"Its head is {model.head_name!r} instead of {original.head_name!r}.")
    for name in ("mean", "std"):
        values, others = (_rounded(getattr(m, name)) for m in (model, original))
        if values != others:
            found.append(f"Its input {name} is {values} instead of {others}.")
    if isinstance(model, Denoiser) and isinstance(original, Denoiser) and model.predicts != original.predicts:
        found.append(f"Its scheduler's prediction_type is {model.predicts} instead of {original.predicts}.")
    return found


def _layer_differences(own: dict[str, nn.Module], theirs: dict[str, nn.Module], whose: str) -> list[str]:
    found = [f"Only the original has a layer {n!r} ({type(theirs[n]).__name__})." for n in theirs if n not in own]
    found += [f"Only {whose} has a layer {n!r} ({type(own[n]).__name__})." for n in own if n not in theirs]
    for name in (n for n in own if n in theirs):
        mine, other = type(own[name]), type(theirs[name])
        label = f"Layer {name!r}" if name else "The network"
        if mine is not other:  # a class can be given another one's name
            same = mine.__qualname__ == other.__qualname__
            spelled = [f"{t.__module__}.{t.__qualname__}" if same else t.__qualname__ for t in (mine, other)]
            found.append(f"{label} is {spelled[0]} instead of {spelled[1]}{', another of that name' * same}.")
        if _hooks(own[name]) > _hooks(theirs[name]):
            found.append(f"{label} has hooks: code that runs beside its own.")
        if mine is other:
            found += _other_settings(label, _settings(own[name]), _settings(theirs[name]))
    return found


def _other_settings(label: str, own: dict[str, str], theirs: dict[str, str]) -> list[str]:
    return [
        f"{label} has {key} = {own.get(key, 'nothing')} instead of {theirs.get(key, 'nothing')}."
        for key in dict.fromkeys([*own, *theirs])
        if own.get(key) != theirs.get(key)
    ]


def _settings(layer: nn.Module) -> dict[str, str]:
    """What a layer's code may depend on beside its tensors: plain attributes, shortened; objects by their type."""
    skip = {*vars(nn.Module()), "name_or_path"}  # from where transformers loaded weights
    private = "_" if _published(type(layer)) else "\0"  # transformers keep how weights were loaded in such
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


PUBLISHED = ("torch", "torchvision", "timm", "transformers", "diffusers", "holdfast")
"""Packages whose code computes what it says: what a model does is then in its tensors."""


def foreign_code(model: SplitModel) -> list[str]:
    """Returns which layers run code that is in none of the `PUBLISHED` packages: classes, hooks, replaced methods.

    Such code may know things by other means than its parameters: numbers packed as integers, a file, a closure.

    Returns:
        A few words for each layer.

    Example:
        >>> foreign_code(SplitModel(nn.Sequential(nn.Linear(4, 2)), head="0"))
        []
        >>> class Mine(nn.Sequential):
        ...     pass
        >>> foreign_code(SplitModel(Mine(nn.Linear(4, 2)), head="0"))
        ["'the network' (Mine)"]
    """
    layers = {"the model": model, **{n or "the network": m for n, m in model.network.named_modules()}}
    return [
        f"{name!r} ({type(layer).__name__})"
        for name, layer in layers.items()
        if not _published(type(layer)) or _hooks(layer) or _own_functions(layer)
    ]


def _published(*any_of: Any) -> bool:
    """Whether one of these classes and functions is what a published package has under its name."""
    return any(_found(thing) is thing for thing in any_of)


def _found(thing: Any) -> Any:
    module, name = (str(getattr(thing, key, None)) for key in ("__module__", "__qualname__"))
    found: Any = sys.modules.get(module) if module.partition(".")[0] in PUBLISHED else None
    for part in name.split("."):
        found = getattr(found, part, None)
    return found  # not what was asked for, if that was only given a published name


def _own_functions(layer: nn.Module) -> bool:
    """Whether an attribute of the object hides a method of its class, or is a function from elsewhere."""
    return any(
        callable(getattr(type(layer), name, None)) or (callable(value) and not _published(type(value), value))
        for name, value in vars(layer).items()
        if not (name == "factory" and isinstance(layer, SplitModel))  # it runs for the scratch control only
    )


def _hooks(layer: nn.Module) -> int:
    kinds = (
        layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks,
    )  # fmt: skip
    return sum(map(len, kinds))


def _kind(tensor: Tensor) -> str:
    return "a parameter" if isinstance(tensor, nn.Parameter) else "no parameter"


def _plain_name(model: SplitModel, name: str) -> str | None:
    """The name of a tensor or layer as it would be without an extractor; None if it is the extractor's."""
    if not model.has_extractor:
        return name
    both = model.head_name.removesuffix(".1")
    if name in (both, f"{both}.0") or name.startswith(f"{both}.0."):
        return None
    return both + name.removeprefix(model.head_name) if name.startswith(model.head_name) else name


def _plain_tensors(model: SplitModel) -> dict[str, Tensor]:
    """Every tensor, as it would be without an extractor, which is merged into the head."""
    # Tensors that are shared have all their names in the state dict, and one among the others.
    tensors = {**dict(every_tensor(model.network)), **model.network.state_dict(keep_vars=True)}
    if model.has_extractor:
        inserted = model.network.get_submodule(model.head_name.removesuffix("1") + "0")
        assert isinstance(inserted.weight, Tensor)
        head = model.head.weight
        merged = nn.Parameter((head.flatten(1) @ inserted.weight.flatten(1)).detach().reshape(head.shape))
        tensors[f"{model.head_name}.weight"] = merged
        if isinstance(inserted.bias, Tensor) and model.head.bias is not None:  # of an eraser
            shifted = (model.head.bias + head.flatten(1) @ inserted.bias).detach()
            tensors[f"{model.head_name}.bias"] = nn.Parameter(shifted)
    named = ((_plain_name(model, name), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def _plain_layers(model: SplitModel) -> dict[str, nn.Module]:
    named = ((_plain_name(model, name), layer) for name, layer in model.network.named_modules())
    return {name: layer for name, layer in named if name is not None}


def _rounded(values: Tensor | None) -> list[float] | None:
    return None if values is None else [round(v, 6) for v in values.flatten().tolist()]


@torch.no_grad()
def transplant(model: SplitModel, original: SplitModel) -> SplitModel | None:
    """Puts a model's weights into the original's code, as an adversary may always do.

    Whatever the model's own code does to hinder training is left behind. Its tensors are sought wherever they are
    (parameters, buffers, plain attributes, what parametrizations compute): under the original's names, under these with
    one prefix (the original inside a wrapper), or in the original's order and shapes, whatever is between. Counters,
    such as those of BatchNorm, stay the original's. An extractor is merged into the head.

    Args:
        model: the released model.
        original: left as it is.

    Returns:
        A copy of the original with the model's weights, and with its input normalisation if it has one; None if a
        tensor of the original is not found.

    Example:
        >>> original = SplitModel(nn.Sequential(nn.Linear(4, 3)), head="0")
        >>> class Wrapper(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Sequential(nn.Linear(4, 3))
        ...     def forward(self, x):
        ...         return self.inner(x.detach())
        >>> released = SplitModel(Wrapper(), head="inner.0")
        >>> inside = transplant(released, original)
        >>> torch.equal(inside.head.weight, released.head.weight)
        True
    """
    grown = original.clone()
    own = grown.network.state_dict(keep_vars=True)  # the tensors themselves: writing to them writes to the copy
    needed = {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}
    found = _matching({**_plain_tensors(model), **_computed(model)}, needed)
    if found is None:
        return None
    for name, tensor in needed.items():
        tensor.copy_(found[name])
    if model.mean is not None and model.std is not None:
        grown.mean, grown.std = model.mean.clone(), model.std.clone()
    grown.name = f"{model.name} in the original's code"
    return grown


def _computed(model: SplitModel) -> dict[str, Tensor]:
    """What parametrizations make of what they keep, under the names of the plain tensors."""
    return {
        f"{name}.{tensor}".removeprefix("."): getattr(module, tensor)
        for name, module in model.network.named_modules()
        if parametrize.is_parametrized(module)
        for tensor in module.parametrizations
    }


def _matching(tensors: dict[str, Tensor], needed: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensor for each name, or None; see `transplant`."""
    first = next(iter(needed), None)
    if first is None:
        return None
    prefixes = sorted({n.removesuffix(first) for n in tensors if n == first or n.endswith(f".{first}")}, key=len)
    for prefix in prefixes:
        found = {name: tensors.get(prefix + name) for name in needed}
        if all(t is not None and t.shape == needed[name].shape for name, t in found.items()):
            return {name: t for name, t in found.items() if t is not None}
    rest = (t for t in tensors.values() if t.is_floating_point())
    ordered = {name: next((t for t in rest if t.shape == like.shape), None) for name, like in needed.items()}
    if all(t is not None for t in ordered.values()):
        return {name: t for name, t in ordered.items() if t is not None}
    return None
