"""Atomic files: tensors, weights and their hashes, optimizer states."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from holdfast.errors import HoldfastError


def writable_folder(folder: Path) -> Path:
    """Creates a folder and checks that it is writable.

    Raises:
        HoldfastError: if it is not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        if folder.exists() and not folder.is_dir():
            reason = "it is a file, not a folder"
        raise HoldfastError(f"Cannot write to {str(folder)!r}: {reason}. Choose another folder with --out.") from error
    return folder


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes a file atomically: a reader or a resumed run never sees half of it."""
    with _replacing(path) as temporary, temporary.open("wb") as handle:
        handle.write(data.encode() if isinstance(data, str) else data)
        handle.flush()
        os.fsync(handle.fileno())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON-able mapping as one safetensors file, atomically.

    The mapping is stored in the header, so that both are always consistent.
    """
    own, seen = {}, set[int]()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        own[name] = value.clone() if memory in seen else value  # safetensors refuses tensors that share memory
        seen.add(memory)
    with _replacing(path) as temporary:
        save_file(own, temporary, metadata={"holdfast": json.dumps(meta)})
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which replaces `path` unless the block fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _explained(path):
        if path.exists() and not path.is_file():  # a folder or a device, such as /dev/null
            raise OSError(errno.EINVAL, "it exists and is not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote, or any safetensors file; nothing in it can be executed.

    Returns:
        The tensors on the CPU, and the mapping (empty for a file from elsewhere).

    Raises:
        HoldfastError: if the file is missing or is not safetensors; a pickle is named as such and refused.
    """
    if not path.is_file():
        raise HoldfastError(f"No weights at {str(path)!r}: the file does not exist.")
    with path.open("rb") as handle:
        beginning = handle.read(64)
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            meta = json.loads((handle.metadata() or {}).get("holdfast", "{}"))
            if not isinstance(meta, dict):
                raise ValueError("its header is not a mapping")
            return {name: handle.get_tensor(name) for name in handle.keys()}, meta  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        # Only after a failure: a good file begins with a number, which may look like any format.
        if beginning[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise HoldfastError(
                f"{str(path)!r} is a pickle (a torch.save file), which can run code when it is opened; refused. "
                "Convert it once, on a machine you can lose, with safetensors.torch.save_file(model.state_dict(), ...)."
            ) from error
        cut = " (the file ends too early: copy or fetch it again)" if "incomplete" in str(error).lower() else ""
        why = _other_format(beginning) or f"{error}{cut}"
        raise HoldfastError(f"{str(path)!r} is not a readable safetensors file: {why}.") from error


def _other_format(beginning: bytes) -> str | None:
    """Names the format of a file by its first bytes; None if it may be safetensors."""
    text = beginning.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    known = {
        b"version https://git-lfs": "it is a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
        b"<": "it is a web page (HTML or XML), as left by a failed download",
        b"{": "it is JSON; the index of weights in several files is called NAME.safetensors.index.json",
        b"gguf": "it is GGUF, quantised for inference; give the model from before quantisation",
        b"\x89hdf": "it is HDF5 (Keras); expected weights of PyTorch",
        b"\x1f\x8b": "it is compressed (gzip); unpack it first",
    }
    if not beginning:
        return "it is empty (0 bytes)"
    return next((description for magic, description in known.items() if text.startswith(magic)), None)


def tensors_sha256(tensors: Mapping[str, Tensor], also: str = "") -> str:
    """Returns a hash over names, dtypes, shapes and values, which does not depend on the file.

    Example:
        >>> a, b = torch.zeros(2), torch.ones(3)
        >>> tensors_sha256({"a": a, "b": b}) == tensors_sha256({"b": b, "a": a}) != tensors_sha256({"a": a, "b": -b})
        True

    Args:
        tensors: by name.
        also: text to include in the hash.
    """
    digest = hashlib.sha256(also.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns an optimizer's state as named tensors, without settings such as learning rates."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{key}": value for i, entries in state.items() for key, value in entries.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Loads the result of `optimizer_tensors` into an optimizer over the same parameters.

    Fused optimizers read a parameter and its moments in memory order, so each moment gets its parameter's layout.
    Adafactor keeps means over rows and columns, which have one element along the other axis.

    Raises:
        HoldfastError: if a moment matches no parameter, or has another shape.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        if int(index) >= len(parameters) or not _fits(value, parameters[int(index)]):
            raise HoldfastError(
                f"The optimizer's state {name!r} of shape {tuple(value.shape)} does not match any of its parameters."
            )
        like = parameters[int(index)]
        laid_out = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
        state.setdefault(int(index), {})[key] = laid_out
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _fits(moment: Tensor, parameter: Tensor) -> bool:
    """Whether an optimizer may keep this about a parameter: a number, a moment, or its means along some axes."""
    if moment.dim() != parameter.dim():
        return not moment.dim()
    return all(own in (1, full) for own, full in zip(moment.shape, parameter.shape, strict=True))


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns a write error into one that names the file and says how to continue."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise HoldfastError(
            f"Cannot write {str(path)!r}: {reason}. Finished results are kept. When the folder is writable and has "
            "room, the same command continues."
        ) from error
