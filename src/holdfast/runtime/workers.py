"""Messages to and from worker processes, and the settings that results depend on."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from holdfast.errors import HoldfastError

Dumps = Callable[[Any], bytes]

ATTEMPTS = 3
"""How often a job is tried before it is blamed for the deaths of its workers."""


ATTENTION = ("flash", "mem_efficient", "math", "cudnn")
"""torch's implementations of attention, which round differently and can be switched off."""


def _attention() -> tuple[bool, ...]:
    return tuple(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ATTENTION)


@dataclass(frozen=True)
class Surroundings:
    """Process-wide settings that a job's results depend on; by default those of this process."""

    threads: int
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    matmul_precision: str = field(default_factory=torch.get_float32_matmul_precision)
    deterministic: int = field(default_factory=torch.get_deterministic_debug_mode)
    attention: tuple[bool, ...] = field(default_factory=_attention)
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in ("holdfast", "torch")})

    def apply(self) -> None:
        """Applies the settings to this process.

        Raises:
            HoldfastError: if this process has other versions of packages.
        """
        for name, wanted in self.versions.items():
            if version(name) != wanted:
                raise HoldfastError(
                    f"The worker on {socket.gethostname()} has {name} {version(name)} instead of {wanted}, and results "
                    "must not depend on the machine. Install the same versions everywhere."
                )
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.set_deterministic_debug_mode(self.deterministic)
        for name, enabled in zip(ATTENTION, self.attention, strict=True):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)


def worker_count(asked: int | None, threads: int, jobs: int) -> int:
    """Returns the number of workers to start: as requested, or as the cores allow; never more than jobs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(asked or max(1, cores // threads), jobs)


def pack_jobs(
    work: Callable[[Any, Any], Any], context: Any, jobs: Sequence[Any], *, threads: int, dumps: Dumps
) -> tuple[bytes, list[bytes]]:
    """Returns the pickles of the function with its context and this process's settings, and of each job."""
    shared = _pack((Surroundings(threads), work, context), dumps, "the models and tasks")
    return shared, [_pack(job, dumps, str(job)) for job in jobs]


def _pack(value: Any, dumps: Dumps, what: str) -> bytes:
    """Pickles to bytes, since torch's sharing of tensors between processes runs out of file descriptors."""
    try:
        return dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise HoldfastError(
            f"Cannot send {what} to another process: {error}. Define classes and functions at the top of a module (no "
            "lambda, no inner function), or use the executor 'serial'."
        ) from error


def open_context(packed: bytes) -> tuple[Any, Any]:
    """Applies the caller's settings, and returns the function and its context."""
    surroundings, work, context = pickle.loads(packed)
    surroundings.apply()
    return work, context


def answer(shared: tuple[Any, Any] | Exception, parcel: bytes, dumps: Dumps) -> bytes:
    """Runs one job; returns a pickle of (True, result) or (False, exception)."""
    try:
        if isinstance(shared, Exception):
            raise shared
        work, context = shared
        return dumps((True, work(context, pickle.loads(parcel))))
    except BaseException as error:
        # Tracebacks cannot be pickled, so their text is sent.
        note = "In a worker: " + "".join(traceback.format_exception(error))
        error.add_note(note)
        try:
            message = dumps((False, error))
            pickle.loads(message)  # some exception classes can be pickled but not unpickled
        except Exception:
            stand_in = RuntimeError(f"{type(error).__name__}: {error}")
            stand_in.add_note(note)
            message = dumps((False, stand_in))
        return message


def unpack(message: bytes) -> Any:
    """Returns the result in a message of `answer`, or raises the job's exception."""
    done, value = pickle.loads(message)
    if not done:
        raise value
    return value


def lost_too_often(job: object, why: str) -> HoldfastError:
    """Returns the error for a job whose workers died `ATTEMPTS` times."""
    return HoldfastError(
        f"Job {str(job)!r} was tried {ATTEMPTS} times, and each time its worker died; the last one was {why}. "
        "Finished results are kept."
    )
