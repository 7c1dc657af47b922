"""What the tests of executors run, in a module that every worker can import without waiting for much."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from holdfast.errors import HoldfastError


def shifted(context, job):
    return context + torch.full((2,), job, dtype=torch.float64)


def first_waits_for_second(folder, job):
    """The job that is begun first ends last."""
    while job == 0 and not (folder / "1-0").exists():
        time.sleep(0.01)
    time.sleep(0.5 if job == 0 else 0)
    recorded(folder, job)


def recorded(folder: Path, job: int) -> int:
    """Leaves a file for each time that a job is begun."""
    begun = len(list(folder.glob(f"{job}-*")))
    (folder / f"{job}-{begun}").write_text(str(os.getpid()))
    return begun


def dies_once(folder, job):
    if recorded(folder, job) == 0 and job == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return job * job


def dies_always(folder, job):
    recorded(folder, job)
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return job * job


class TwoPartsError(Exception):
    """Its pickle cannot be read: unpickling gives it one argument."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def fails(folder, job):
    recorded(folder, job)
    if job == "holdfast":
        raise HoldfastError("learning_rate is -1; expected a number above 0.")
    if job == "two parts":
        raise TwoPartsError(1, 2)
    return {}[job]


def lookup(context, job):
    return context[job]


def surroundings(_, job):
    attention = torch.backends.cuda.flash_sdp_enabled()
    return torch.get_num_threads(), str(torch.get_default_dtype()), torch.get_float32_matmul_precision(), attention


class Shipped:
    """A context that leaves a file each time that it arrives somewhere."""

    def __init__(self, folder):
        self.folder = folder

    def __setstate__(self, state):
        self.__dict__ = state
        recorded(self.folder, 0)


def whereabouts(_, job):
    time.sleep(0.05)
    return os.getpid()


class Unsendable:
    def __reduce__(self):
        raise TypeError("it holds a socket")
