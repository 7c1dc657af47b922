"""Where and how things run: device, seeds, progress, and the folder that makes a long job resumable.

Every random choice is drawn from a generator whose seed is derived from the
run's seed and the *purpose* of the choice, so that no random state needs saving: a resumed job asks for the same
purposes and gets the same numbers.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import operator
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from holdfast.documents import read_json
from holdfast.errors import HoldfastError
from holdfast.results import command_line
from holdfast.team import own_device, speaks, team

T = TypeVar("T")

MAX_THREADS = 1024
"""More than any network here gains from; a mistyped number should not start so many threads."""


def derive_seed(seed: int, *purpose: object) -> int:
    """Returns a seed in [0, 2**63) for one purpose; different purposes give independent streams.

    Example:
        >>> derive_seed(0, "audit", 3) == derive_seed(0, "audit", 3) != derive_seed(0, "audit", 4)
        True
    """
    text = json.dumps([seed, *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def fingerprint(value: Any) -> str:
    """Returns the SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def whole_number(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """Returns a whole number as Python's own type.

    Args:
        name: of the setting, for the message.
        value: NumPy's integers and floats such as 5.0 are whole numbers; True is not.
        least: the smallest that is allowed.
        most: the largest; None: there is none.

    Raises:
        HoldfastError: if it is not a whole number, or out of range.

    Example:
        >>> whole_number("seeds", 5.0)
        5
        >>> whole_number("threads", 0, 1, 8)
        Traceback (most recent call last):
            ...
        holdfast.errors.HoldfastError: threads is 0; expected a whole number from 1 to 8.
    """
    whole = isinstance(value, float) and value.is_integer()
    if not isinstance(value, bool) and (whole or hasattr(type(value), "__index__")):
        number = int(value) if whole else operator.index(value)
        if least <= number and (most is None or number <= most):
            return number
    upper = f" to {most}" if most is not None else " on"
    raise HoldfastError(f"{name} is {value!r}; expected a whole number from {least}{upper}.")


def checked_threads(count: Any) -> int | None:
    """Returns a number of CPU threads, or None for torch's own choice.

    Raises:
        HoldfastError: for anything but a whole number from 1 to `MAX_THREADS`.
    """
    return None if count is None else whole_number("threads", count, 1, MAX_THREADS)


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Returns the device to compute on.

    Args:
        name: `auto` (the accelerator that Accelerate finds, else the CPU) or a torch device such as `cpu`, `cuda:1`.

    Of several processes, each gets the device that its launcher chose for it.

    Raises:
        HoldfastError: if torch does not know the device or this machine does not have it; or, of several processes, if
            it is another than the launcher's.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if isinstance(name, torch.device):
        name = str(name)
    if not isinstance(name, str):
        raise HoldfastError(f"Device {name!r} is not a name. Try 'auto' or 'cpu'.")
    if name == "auto":
        return own_device()
    if team().count > 1:
        given = own_device()
        if name not in (given.type, str(given)):
            raise HoldfastError(
                f"Device {name!r} was asked for, and the launcher gave this process {str(given)!r}. Leave --device "
                "out; to compute on the CPU, set ACCELERATE_USE_CPU=true."
            )
        return given
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise HoldfastError(f"Device {name!r} cannot be used here ({reason}). Try 'auto' or 'cpu'.") from error
    return device


def device_of(module: nn.Module) -> torch.device:
    """Returns where a module's tensors are, even if they are all buffers; without any, the CPU."""
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def dtype_of(module: nn.Module) -> torch.dtype:
    """Returns the precision of a module's weights, even if they are all buffers; without any, torch's default.

    Example:
        >>> dtype_of(nn.Linear(2, 2).double()), dtype_of(nn.ReLU())
        (torch.float64, torch.float32)
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def place_of_float64(device: torch.device) -> torch.device:
    """Returns where to compute in float64 what is on a device: there, or on the CPU if the device has none (mps).

    Example:
        >>> place_of_float64(torch.device("cuda", 1)), place_of_float64(torch.device("mps"))
        (device(type='cuda', index=1), device(type='cpu'))
    """
    return torch.device("cpu") if device.type == "mps" else device


def widest(device: torch.device) -> torch.dtype:
    """Returns the most precise floating-point type that a device has."""
    return torch.float64 if place_of_float64(device) == device else torch.float32


def autocast(device: torch.device, bf16: bool, *, cache: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which networks compute in bfloat16 where torch deems it safe, or one that changes nothing.

    Args:
        device: where the network is.
        bf16: False changes nothing: weights compute in their own precision, and a caller's autocast stays in force.
        cache: keep weights in bfloat16 from one use to the next; not where they are changed in place in between.

    Example:
        >>> with autocast(torch.device("cpu"), bf16=True):
        ...     nn.Linear(2, 2)(torch.zeros(1, 2)).dtype
        torch.bfloat16
    """
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache) if bf16 else contextlib.nullcontext()


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Lets torch use so many CPU threads inside the block; None changes nothing.

    Raises:
        HoldfastError: for a number that is not from 1 to `MAX_THREADS`.
    """
    count = checked_threads(count)
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Run:
    """One job: its seed, device, folder and progress display, handed to every stage.

    Args:
        seed: all randomness of the job derives from it.
        device: see `resolve_device`.
        folder: where checkpoints go; None keeps everything in memory, and then nothing can be resumed.
        quiet: show no progress.
    """

    seed: int = 0
    device: torch.device = field(default_factory=resolve_device)
    folder: Path | None = None
    quiet: bool = True
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def __post_init__(self) -> None:
        self.seed = whole_number("seed", self.seed)

    def __reduce__(self) -> tuple[type[Run], tuple[int, torch.device, Path | None, bool]]:
        """In another process it is quiet: a terminal has room for one display."""
        return Run, (self.seed, self.device, self.folder, True)

    def generator(self, *purpose: object) -> torch.Generator:
        """Returns a fresh CPU generator for one purpose."""
        return torch.Generator().manual_seed(derive_seed(self.seed, *purpose))

    @contextlib.contextmanager
    def seeded(self, *purpose: object) -> Iterator[torch.Generator]:
        """Seeds torch's global generators (dropout, initialisers) inside the block and restores them after it.

        Yields:
            A generator for the same purpose, for what takes one explicitly.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        cudnn = torch.backends.cudnn
        before = cudnn.deterministic, cudnn.benchmark
        with torch.random.fork_rng(devices=devices):
            seed = derive_seed(self.seed, "global", *purpose)
            # Without a GPU in use, `torch.manual_seed` takes the call stack down for later, which costs a millisecond.
            (torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed)(seed)
            cudnn.deterministic, cudnn.benchmark = True, False
            try:
                yield self.generator(*purpose)
            finally:
                cudnn.deterministic, cudnn.benchmark = before

    def path(self, *parts: str) -> Path | None:
        """Returns a path inside `checkpoints/` of the run's folder, or None without a folder."""
        return None if self.folder is None else self.folder.joinpath("checkpoints", *parts)

    @contextlib.contextmanager
    def progress(self, description: str, total: int, done: int = 0) -> Iterator[Ticker]:
        """Shows a bar with the time left on a terminal, and one line per stage elsewhere."""
        if self.quiet or not speaks():
            yield Ticker()
        elif not self.console.is_terminal:
            self.console.print(f"{description}: {total - done} to do" + (f", {done} done before" if done else ""))
            yield Ticker()
        else:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"),
            )  # fmt: skip
            with Progress(*columns, console=self.console) as bar:
                yield Ticker(bar, bar.add_task(description, total=total, completed=done, note=""))

    def say(self, message: str) -> None:
        """Prints one line to the person at the terminal, unless quiet."""
        if not self.quiet and speaks():
            self.console.print(message, highlight=False, markup=False)


@dataclass
class Ticker:
    """Advances a progress bar, if there is one."""

    bar: Progress | None = None
    task: TaskID | None = None

    def tick(self, note: str = "") -> None:
        """Counts one unit of work; `note` replaces the text behind the bar."""
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task)
            if note:
                self.bar.update(self.task, note=note)


def writable_folder(folder: Path) -> Path:
    """Makes a folder and proves that it can be written to.

    Raises:
        HoldfastError: if it cannot, before any work is spent.
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
    """Writes a whole file or nothing: a reader, or a resumed job, never sees half of it."""
    with _replacing(path) as temporary, temporary.open("wb") as handle:
        handle.write(data.encode() if isinstance(data, str) else data)
        handle.flush()
        os.fsync(handle.fileno())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON-able mapping as one safetensors file, atomically.

    The mapping travels in the header, so that both are of the same moment.
    """
    own, seen = {}, set[int]()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        own[name] = value.clone() if memory in seen else value  # safetensors writes no two tensors of one memory
        seen.add(memory)
    with _replacing(path) as temporary:
        save_file(own, temporary, metadata={"holdfast": json.dumps(meta)})
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`; what the block leaves there replaces it, unless the block fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _explained(path):
        if path.exists() and not path.is_file():  # a folder, or a device: replacing /dev/null would break the machine
            raise OSError(errno.EINVAL, "it is there, and is not a regular file")
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
        The tensors on the CPU, and the mapping (empty for a file of another origin).

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
                raise ValueError("its header is no mapping")
            return {name: handle.get_tensor(name) for name in handle.keys()}, meta  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        # Only now: the first bytes of a good file are a number, and may look like anything.
        if beginning[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise HoldfastError(
                f"{str(path)!r} is a pickle (a torch.save file), which can run code when it is opened; refused. "
                "Convert it once, on a machine you can lose, with safetensors.torch.save_file(model.state_dict(), ...)."
            ) from error
        cut = " (the file ends too early: copy or fetch it again)" if "incomplete" in str(error).lower() else ""
        why = _other_format(beginning) or f"{error}{cut}"
        raise HoldfastError(f"{str(path)!r} is not a readable safetensors file: {why}.") from error


def _other_format(beginning: bytes) -> str | None:
    """What a file is that is not safetensors, by its first bytes; None if it may be safetensors."""
    text = beginning.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    known = {
        b"version https://git-lfs": "it is a Git LFS pointer, a few lines in the place of the weights; fetch them with "
        "`git lfs pull`",
        b"<": "it is a web page (HTML or XML), such as a download leaves that failed",
        b"{": "it is JSON; of weights in several files, the index is called NAME.safetensors.index.json",
        b"gguf": "it is GGUF, weights that were quantised for inference; give the model as it was before",
        b"\x89hdf": "it is HDF5 (Keras), and weights of PyTorch are expected",
        b"\x1f\x8b": "it is compressed (gzip); unpack it first",
    }
    if not beginning:
        return "it is empty (0 bytes)"
    return next((said for magic, said in known.items() if text.startswith(magic)), None)


def tensors_sha256(tensors: Mapping[str, Tensor], also: str = "") -> str:
    """Returns a hash over names, dtypes, shapes and values: the same however often they are written anew.

    Example:
        >>> a, b = torch.zeros(2), torch.ones(3)
        >>> tensors_sha256({"a": a, "b": b}) == tensors_sha256({"b": b, "a": a}) != tensors_sha256({"a": a, "b": -b})
        True

    Args:
        tensors: by name.
        also: text that is hashed with them.
    """
    digest = hashlib.sha256(also.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns an optimizer's state as named tensors, for `save_tensors`; settings such as rates are not in it."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{key}": value for i, entries in state.items() for key, value in entries.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts what `optimizer_tensors` returned into an optimizer over the same parameters.

    Fused optimizers walk a parameter and its moments in memory order, so each moment gets its parameter's layout.

    Raises:
        HoldfastError: if a moment is of no parameter, or of another shape.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        if int(index) >= len(parameters) or (value.dim() and value.shape != parameters[int(index)].shape):
            raise HoldfastError(
                f"The optimizer's state {name!r} of shape {tuple(value.shape)} fits none of its parameters."
            )
        like = parameters[int(index)]
        laid_out = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
        state.setdefault(int(index), {})[key] = laid_out
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Journal:
    """A durable list of finished pieces of work: one JSON line each, written through to the disk.

    The first line names what the work belongs to, and the command that began it. A journal of other work is refused,
    not mixed; a last line torn by a kill is dropped, and its piece of work done again. Of several processes all hold
    the entries, and the main one writes them.

    Args:
        path: the file; None keeps the entries in memory.
        belongs_to: JSON-able description of the battery, data, models and seed that the entries depend on.
        what: what kind of work it is, for messages: `audit`, `study`, ...

    Raises:
        HoldfastError: if the file belongs to other work; the message names the fields that differ.
    """

    def __init__(self, path: Path | None, belongs_to: Mapping[str, Any], what: str = "job") -> None:
        self.path, self.what = path, what
        head = json.loads(json.dumps(belongs_to, default=str))
        self.entries: dict[str, Any] = {} if path is None else team().by_main(lambda: self._open(path, head))

    def _open(self, path: Path, head: dict[str, Any]) -> dict[str, Any]:
        lines = self._whole_lines(path)
        if not lines:
            first = {"belongs_to": head, "what": self.what, "command": command_line()}
            write_atomic(path, json.dumps(first) + "\n")
            return {}
        found = lines[0]["belongs_to"]
        if found != head:
            differ = sorted(k for k in {*found, *head} if found.get(k) != head.get(k))
            raise HoldfastError(
                f"{str(path.parent.parent)!r} holds an unfinished {lines[0].get('what', self.what)} with another "
                f"{', '.join(differ)}: results are never mixed. Continue it with {begun_with(lines[0])}, or choose "
                "another folder with --out."
            )
        return {line["key"]: line["value"] for line in lines[1:]}

    def _whole_lines(self, path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole != raw:
            write_atomic(path, whole)
        lines: list[dict[str, Any]] = []
        values: dict[str, Any] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                lines.append(_checked_line(read_json(line), values, first=number == 1))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise self._damaged(path, f"line {number}: {error}") from error
        return lines

    def _damaged(self, path: Path | None, why: str) -> HoldfastError:
        return HoldfastError(
            f"{str(path)!r} is damaged ({why}). It holds finished pieces of the {self.what}, one a line: take out the "
            "line, and that piece is done again; or choose another folder with --out."
        )

    def read(self, key: str, reader: Callable[[Any], T]) -> T:
        """Reads an entry back; another program, or a person, may have written to the file.

        Args:
            key: of an entry that is there.
            reader: makes what is wanted from the entry, and raises a ValueError, TypeError or KeyError if it cannot.

        Raises:
            HoldfastError: if the reader refuses the entry; the message names file and key.
        """
        try:
            return reader(self.entries[key])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise self._damaged(self.path, f"{key}: {why}") from error

    def missing(self, readers: Mapping[str, Callable[[Any], object]]) -> list[str]:
        """Returns the keys without an entry. The other entries are read, so that damage is found before any work.

        Args:
            readers: see `read`, by key.
        """
        for key, reader in readers.items():
            if key in self.entries:
                self.read(key, reader)
        return [key for key in readers if key not in self.entries]

    def add(self, key: str, value: Any) -> None:
        """Stores one finished piece of work; when this returns, it survives a kill.

        Raises:
            HoldfastError: naming the file, if it cannot be written: the disk is full, or the folder is gone.
        """
        if self.path is not None and team().main:
            with _explained(self.path), self.path.open("r+b") as handle:  # does not make a file that was taken away
                handle.seek(0, os.SEEK_END)
                handle.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
                handle.flush()
                os.fsync(handle.fileno())
        self.entries[key] = value


def _checked_line(line: Any, values: dict[str, Any], *, first: bool) -> dict[str, Any]:
    """Refuses a line that is no entry, and an entry that contradicts an earlier one, which `values` holds."""
    if not isinstance(line, dict):
        raise ValueError("it is no mapping")
    if first:
        if not isinstance(line["belongs_to"], dict):
            raise ValueError("it should say what the work belongs to")
        return line
    if not {"key", "value"} <= line.keys() or not isinstance(line["key"], str):
        raise ValueError("it lacks its key or its value")
    if values.setdefault(line["key"], line["value"]) != line["value"]:
        raise ValueError(f"{line['key']} is there twice, with different values; did two commands write here at once?")
    return line


def begun_with(head: Mapping[str, Any]) -> str:
    """Names the command that began a piece of work, as its file says.

    Example:
        >>> begun_with({"command": ["holdfast", "run", "my recipe.yaml"]})
        "the command that began it (holdfast run 'my recipe.yaml')"
    """
    command = head.get("command")
    if not isinstance(command, list) or not command:
        return "the command that began it"
    return f"the command that began it ({shlex.join(map(str, command))})"


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Says which file could not be written, and what is kept; the system's own error often does not."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise HoldfastError(
            f"Cannot write {str(path)!r}: {reason}. What was finished before is kept: when there is room, and the "
            "folder is there and writable, the same command continues."
        ) from error
