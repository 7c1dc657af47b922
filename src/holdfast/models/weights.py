"""Files of weights: one or several, with names as wrappers make them; and whether they are an architecture's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.models.wrappers import HALF, WRAPPERS
from holdfast.runtime.storage import load_tensors

INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")
_PREFIXES = (*(f"{name}." for name in WRAPPERS), "model.", "network.", "net.", "backbone.", "base_model.model.")
"""What wrappers, training loops and adapters put before the names of the network inside."""


@dataclass(frozen=True)
class Weights:
    """What was read.

    Attributes:
        tensors: by name, on the CPU.
        meta: what Holdfast wrote beside them; empty for a file of another origin.
        notes: how it was read, in sentences.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_weights(path: Path) -> Weights:
    """Reads weights from a safetensors file; of a model in several files, from all of them.

    Args:
        path: the file; or the index of several (`model.safetensors.index.json`), or any one of them.

    Raises:
        HoldfastError: if a file is missing or unreadable, or lacks what the index says is in it.
    """
    if path.name.endswith(INDEX):
        return _indexed(path)
    match = _SHARD.match(path.name)
    if match is None or int(match["count"]) == 1:
        tensors, meta = load_tensors(path)
        return Weights(tensors, meta, _stored(path, tensors))
    count = int(match["count"])
    files = [f"{match['stem']}-{i:05d}-of-{match['count']}.safetensors" for i in range(1, count + 1)]
    return _together(path, files)


def _indexed(path: Path) -> Weights:
    if not path.is_file():
        raise HoldfastError(f"No weights at {str(path)!r}: the file does not exist.")
    try:
        said = json.loads(path.read_bytes())["weight_map"]
        places = {str(name): str(file) for name, file in said.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HoldfastError(
            f"{str(path)!r} is no index of weights: {type(error).__name__}: {error}. Expected JSON with a weight_map "
            "from names of tensors to files."
        ) from error
    files = list(dict.fromkeys(places.values()))
    outside = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
    if outside or not files:
        raise HoldfastError(
            f"{str(path)!r} names {outside[0] if outside else 'no file'!r}; expected .safetensors files beside it."
        )
    found = _together(path, files)
    missing = [name for name in places if name not in found.tensors]
    if missing:
        raise HoldfastError(
            f"{str(path)!r}: {places[missing[0]]!r} has no {missing[0]!r}, which the index says is in it"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}; the files are not of one model."
        )
    return found


def _together(path: Path, files: list[str]) -> Weights:
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        shown = f"{', '.join(map(repr, missing[:3]))}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}"
        raise HoldfastError(
            f"{str(path)!r} is a part of weights in {len(files)} files, and of these {shown} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it."
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        more, _ = load_tensors(path.parent / file)
        twice = [name for name in more if name in tensors]
        if twice:
            raise HoldfastError(f"{str(path.parent / file)!r} holds {twice[0]!r}, which another of the files has too.")
        tensors |= more
    return Weights(tensors, {}, (f"The weights were read from {len(files)} files.", *_stored(path, tensors)))


def _stored(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    half = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.dtype in HALF)
    return (f"{path.name} is stored in {' and '.join(half)}; the model computes in float32.",) if half else ()


def fitted(found: Weights, own: Mapping[str, Tensor]) -> Weights:
    """Returns weights under an architecture's names, where they fit it but for what a wrapper puts before the names.

    Nothing is guessed: names are changed only if then all of them are the architecture's. Of tensors that share their
    values (tied weights), one need be there; counters of BatchNorm, which old files lack, stay as they are.

    Example:
        >>> import torch
        >>> own = {"fc.weight": torch.zeros(1)}
        >>> fitted(Weights({"module.fc.weight": torch.ones(1)}, {}), own).notes
        ("The names in the weights begin with 'module.', which was left out.",)
    """
    whole = _completed(found, own)
    if whole.tensors.keys() == own.keys():
        return whole
    for rename, note in _renamings(found.tensors, own):
        renamed = {rename(name): tensor for name, tensor in found.tensors.items()}
        if len(renamed) != len(found.tensors):
            continue
        candidate = _completed(replace(found, tensors=renamed), own)
        if candidate.tensors.keys() == own.keys():
            return replace(candidate, notes=(*candidate.notes, note))
    return found


def without_wrappers(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns weights without what DataParallel and torch.compile put before all names, and a note on it."""
    taken = ""
    while prefix := next((f"{w}." for w in WRAPPERS if tensors and all(n.startswith(f"{w}.") for n in tensors)), ""):
        tensors, taken = {n.removeprefix(prefix): t for n, t in tensors.items()}, taken + prefix
    return tensors, (_left_out(taken),) if taken else ()


def _completed(found: Weights, own: Mapping[str, Tensor]) -> Weights:
    """With what weights may lack, and without what an averaged model has beside them."""
    tensors, notes = dict(found.tensors), found.notes
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
    return replace(found, tensors=tensors, notes=notes)


def _renamings(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[tuple[Callable[[str], str], str]]:
    for first in _PREFIXES:
        for second in ("", *_PREFIXES):
            prefix = first + second
            if any(name.startswith(prefix) for name in tensors):
                yield _cutter(prefix), _left_out(prefix)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in own):
            yield prefix.__add__, f"The names in the weights lack {prefix!r} at their beginning, which was added."
    yield _without_parts, "The names in the weights have 'module' or '_orig_mod' in them, which was left out."


def _cutter(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def _without_parts(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _left_out(prefix: str) -> str:
    return f"The names in the weights begin with {prefix!r}, which was left out."


def check_tensors(path: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str, hint: str) -> None:
    """Refuses weights that are not an architecture's, and shows both sides.

    Raises:
        HoldfastError: if names, shapes or kinds of numbers differ.
    """
    problems = [f"no {n!r}" for n in own if n not in tensors]
    problems += [f"unexpected {n!r}" for n in tensors if n not in own]
    problems += [
        f"{n!r} is {tuple(tensors[n].shape)} instead of {tuple(own[n].shape)}"
        for n in own
        if n in tensors and own[n].shape != tensors[n].shape
    ]
    # Quantised weights are integers that mean something only with their scales, which are stored elsewhere.
    problems += [
        f"{n!r} holds {str(tensors[n].dtype).removeprefix('torch.')}, and floating-point numbers were expected"
        for n in own
        if n in tensors and own[n].is_floating_point() and not tensors[n].is_floating_point()
    ]
    if not problems:
        return
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    both = ""
    if tensors.keys() != own.keys():
        missing, unexpected = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
        both = (
            f" {name} has {len(own)} tensors{_some('which the file lacks', missing)}; the file has {len(tensors)}"
            f"{_some('which the model lacks', unexpected)}."
        )
    raise HoldfastError(f"{path!r} does not fit {name}: {'; '.join(problems[:4])}{more}.{both}{hint}")


def _some(what: str, names: list[str]) -> str:
    shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return f", {len(names)} of {what}: {shown}" if names else ""
