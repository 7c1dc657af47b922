"""What crosses to a worker process and back: the context, a job, its result; and what numbers depend on beside them."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from holdfast.errors import HoldfastError

Dumps = Callable[[Any], bytes]


ATTEMPTS = 3
"""How often a job is begun before it is blamed for the death of its workers."""


@dataclass(frozen=True)
class Surroundings:
    """What a job's numbers depend on beside the job."""

    threads: int
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    matmul_precision: str = field(default_factory=torch.get_float32_matmul_precision)
    deterministic: int = field(default_factory=torch.get_deterministic_debug_mode)
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in ("holdfast", "torch")})

    @classmethod
    def here(cls, threads: int) -> Surroundings:
        """Returns this process's, with another number of threads."""
        return cls(threads)

    def apply(self) -> None:
        """Makes this process like the one that it works for.

        Raises:
            HoldfastError: if it cannot be, because it has other versions.
        """
        for name, wanted in self.versions.items():
            if version(name) != wanted:
                raise HoldfastError(
                    f"The worker on {socket.gethostname()} has {name} {version(name)}, and {wanted} is needed: results "
                    "must not depend on where they were computed. Install the same versions everywhere."
                )
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.set_deterministic_debug_mode(self.deterministic)


def worker_count(asked: int | None, threads: int, jobs: int) -> int:
    """Returns how many workers to start: as many as asked for, or as there are cores for, and not more than jobs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(asked or max(1, cores // threads), jobs)


def pack(value: Any, dumps: Dumps, what: str) -> bytes:
    """Pickles to bytes: torch's own way to share tensors between processes runs out of file descriptors."""
    try:
        return dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise HoldfastError(
            f"Another process cannot get {what}: {error}. Define classes and functions at the top of a module (no "
            "lambda, no inner function), or use the executor 'serial'."
        ) from error


def open_context(packed: bytes) -> tuple[Any, Any]:
    """Makes this process like the one that it works for, and returns the function and its context."""
    surroundings, work, context = pickle.loads(packed)
    surroundings.apply()
    return work, context


def answer(shared: tuple[Any, Any] | Exception, parcel: bytes, dumps: Dumps) -> bytes:
    """Does one job; returns a pickle of (True, result), or of (False, what was raised)."""
    try:
        if isinstance(shared, Exception):
            raise shared
        work, context = shared
        return dumps((True, work(context, pickle.loads(parcel))))
    except BaseException as error:
        # The traceback stays behind, so its text goes along.
        note = "In a worker: " + "".join(traceback.format_exception(error))
        error.add_note(note)
        try:
            message = dumps((False, error))
            pickle.loads(message)  # some classes of errors can be written and not read
        except Exception:
            stand_in = RuntimeError(f"{type(error).__name__}: {error}")
            stand_in.add_note(note)
            message = dumps((False, stand_in))
        return message


def unpack(message: bytes) -> Any:
    """Returns the result in a message of `answer`, or raises what the job raised."""
    done, value = pickle.loads(message)
    if not done:
        raise value
    return value


def lost_too_often(job: object, why: str) -> HoldfastError:
    """Returns the error for a job whose workers died `ATTEMPTS` times."""
    return HoldfastError(
        f"Job {str(job)!r} was begun {ATTEMPTS} times, and each time its worker was lost; the last one was {why}. "
        "What is finished is kept."
    )
