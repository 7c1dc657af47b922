"""Files of weights, one or several: their tensors, under an architecture's names, checked against its shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import methodcaller
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.models.wrappers import HALF, WRAPPERS
from holdfast.runtime.storage import load_tensors

INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")
_PREFIXES = (*(f"{name}." for name in WRAPPERS), "model.", "network.", "net.", "backbone.", "base_model.model.")
"""Prefixes that wrappers, training loops and adapters put before the names of the network's tensors."""


@dataclass(frozen=True)
class Weights:
    """Weights read from files.

    Attributes:
        tensors: by name, on the CPU.
        meta: what Holdfast wrote into the header; empty for a file of another origin.
        notes: how they were read, in sentences.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_weights(path: Path) -> Weights:
    """Reads weights from a safetensors file, or from all files of a model that has several.

    Args:
        path: the file, the index of several (`model.safetensors.index.json`), or one of them.

    Raises:
        HoldfastError: if a file is missing or unreadable, or lacks a tensor that the index lists.
    """
    if path.name.endswith(INDEX):
        return _indexed(path)
    match = _SHARD.match(path.name)
    if match is None or int(match["count"]) == 1:
        tensors, meta = load_tensors(path)
        return Weights(tensors, meta, _stored(path, tensors))
    numbers = range(1, int(match["count"]) + 1)
    return _together(path, [f"{match['stem']}-{i:05d}-of-{match['count']}.safetensors" for i in numbers])


def _indexed(path: Path) -> Weights:
    if not path.is_file():
        raise HoldfastError(f"No weights at {str(path)!r}: the file does not exist.")
    try:
        files_of = {str(name): str(file) for name, file in json.loads(path.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HoldfastError(
            f"{str(path)!r} is not an index of weights: {type(error).__name__}: {error}. Expected JSON with a "
            "weight_map from names of tensors to files."
        ) from error
    files = list(dict.fromkeys(files_of.values()))
    outside = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
    if outside or not files:
        raise HoldfastError(
            f"{str(path)!r} names {outside[0] if outside else 'no file'!r}; expected .safetensors files beside it."
        )
    weights = _together(path, files)
    missing = [name for name in files_of if name not in weights.tensors]
    if missing:
        raise HoldfastError(
            f"{str(path)!r}: {files_of[missing[0]]!r} has no {missing[0]!r}, which the index says is in it"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}; the files are not of one model."
        )
    return weights


def _together(path: Path, files: list[str]) -> Weights:
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        shown = f"{', '.join(map(repr, missing[:3]))}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}"
        raise HoldfastError(
            f"{str(path)!r} belongs to weights in {len(files)} files, but {shown} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it."
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        more, _ = load_tensors(path.parent / file)
        twice = [name for name in more if name in tensors]
        if twice:
            raise HoldfastError(f"{str(path.parent / file)!r} holds {twice[0]!r}, and so does another of the files.")
        tensors |= more
    return Weights(tensors, {}, (f"The weights were read from {len(files)} files.", *_stored(path, tensors)))


def _stored(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    half = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.dtype in HALF)
    return (f"{path.name} is stored in {' and '.join(half)}; the model computes in float32.",) if half else ()


def fitted(weights: Weights, own: Mapping[str, Tensor]) -> Weights:
    """Returns weights under an architecture's names, if they differ from these only by a wrapper's prefix.

    Names are changed only if all of them then are the architecture's. Tied weights may be stored once; counters of
    BatchNorm, which old files lack, stay as they are.

    Example:
        >>> import torch
        >>> own = {"fc.weight": torch.zeros(1)}
        >>> fitted(Weights({"module.fc.weight": torch.ones(1)}, {}), own).notes
        ("The names in the weights begin with 'module.', which was left out.",)
    """
    candidate = _completed(weights, own)
    if candidate.tensors.keys() == own.keys():
        return candidate
    for rename, note in _renamings(weights.tensors, own):
        renamed = {rename(name): tensor for name, tensor in weights.tensors.items()}
        if len(renamed) != len(weights.tensors):
            continue
        candidate = _completed(replace(weights, tensors=renamed), own)
        if candidate.tensors.keys() == own.keys():
            return replace(candidate, notes=(*candidate.notes, note))
    return weights


def without_wrappers(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns weights without the prefixes of DataParallel and torch.compile, and a note that names them."""
    removed = ""
    while prefix := next((f"{w}." for w in WRAPPERS if tensors and all(n.startswith(f"{w}.") for n in tensors)), ""):
        tensors, removed = {n.removeprefix(prefix): t for n, t in tensors.items()}, removed + prefix
    return tensors, (_left_out(removed),) if removed else ()


def _completed(weights: Weights, own: Mapping[str, Tensor]) -> Weights:
    """Adds tied weights and counters that a file may lack, and drops the counter of an averaged model."""
    tensors, notes = dict(weights.tensors), weights.notes
    extra = [n for n in tensors if n not in own and n.rpartition(".")[2] == "n_averaged"]
    for name in extra:
        del tensors[name]
    places = {(t.data_ptr(), t.shape): n for n, t in own.items() if n in tensors and t.numel()}
    tied = {n: places[key] for n, t in own.items() if n not in tensors and (key := (t.data_ptr(), t.shape)) in places}
    if tied:
        tensors |= {n: tensors[other] for n, other in tied.items()}
        name = next(iter(tied))
        notes += (f"The weights lack {name!r}, which has the values of {tied[name]!r} (tied weights).",)
    counters = [n for n in own if n not in tensors and n.endswith("num_batches_tracked")]
    if counters and len(tensors) > len(extra):
        tensors |= {n: own[n] for n in counters}
    return replace(weights, tensors=tensors, notes=notes)


def _renamings(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[tuple[Callable[[str], str], str]]:
    for first in _PREFIXES:
        for second in ("", *_PREFIXES):
            prefix = first + second
            if any(name.startswith(prefix) for name in tensors):
                yield methodcaller("removeprefix", prefix), _left_out(prefix)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in own):
            yield prefix.__add__, f"The names in the weights lack {prefix!r} at their beginning, which was added."
    yield _without_parts, "The names in the weights have 'module' or '_orig_mod' in them, which was left out."


def _without_parts(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _left_out(prefix: str) -> str:
    return f"The names in the weights begin with {prefix!r}, which was left out."


def check_tensors(path: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str, hint: str) -> None:
    """Refuses weights that do not fit an architecture; the message describes both.

    Raises:
        HoldfastError: if names, shapes or kinds of numbers differ.
    """
    missing, unexpected = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
    shared = [(n, t, tensors[n]) for n, t in own.items() if n in tensors]
    problems = [*(f"no {n!r}" for n in missing), *(f"unexpected {n!r}" for n in unexpected)]
    problems += [f"{n!r} is {tuple(b.shape)} instead of {tuple(a.shape)}" for n, a, b in shared if a.shape != b.shape]
    # Quantised weights are integers, and useless without their scales, which are stored elsewhere.
    problems += [
        f"{n!r} holds {str(b.dtype).removeprefix('torch.')}, and floating-point numbers were expected"
        for n, a, b in shared
        if a.is_floating_point() and not b.is_floating_point()
    ]
    if not problems:
        return
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    both = ""
    if missing or unexpected:
        both = (
            f" {name} has {len(own)} tensors{_some('which the file lacks', missing)}; the file has {len(tensors)}"
            f"{_some('which the model lacks', unexpected)}."
        )
    raise HoldfastError(f"{path!r} does not fit {name}: {'; '.join(problems[:4])}{more}.{both}{hint}")


def _some(what: str, names: list[str]) -> str:
    shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return f", {len(names)} of {what}: {shown}" if names else ""
