"""Executors: independent jobs one after another, in local processes, or on Ray, with the same results.

Jobs share one context, which may be large (models, data): it is pickled once and sent to each worker once. A worker
gets the caller's torch settings, because numbers depend on them. One that dies takes no result with it: its job alone
is begun again, `ATTEMPTS` times in all. What a job itself raises is raised to the caller.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from holdfast.errors import HoldfastError, unknown
from holdfast.runtime.distributed import process_group

Context = TypeVar("Context")
Job = TypeVar("Job")
Result = TypeVar("Result")


MAX_WORKERS = 1024

KINDS = ("serial", "processes", "processes:N", "ray", "ray:N", "ray://HOST:PORT")


@dataclass(frozen=True)
class Executor(ABC):
    """Runs independent jobs.

    Attributes:
        name: as it was asked for.
        workers: how many at a time; None: as many as there are cores for.
        threads: CPU threads of torch in each worker; None: as many as the caller has when it calls `run`.
    """

    name: str
    workers: int | None = None
    threads: int | None = None

    @abstractmethod
    def run(
        self, work: Callable[[Context, Job], Result], context: Context, jobs: Sequence[Job]
    ) -> Iterator[tuple[int, Result]]:
        """Does every job once, and yields its index and result when it is finished, in any order.

        Args:
            work: a function of a module; it must not depend on the order of jobs, nor change the context.
            context: what all jobs need; pickled, so that every worker has a copy.
            jobs: small, picklable; `str` names one in errors.

        Raises:
            HoldfastError: if something cannot be pickled, or workers die of the same job `ATTEMPTS` times.
        """

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Lets workers that one `run` in here has started serve the next one; a new process takes seconds to start.

        Example:
            >>> workers = executor("serial")  # of "processes:2" there would be two processes in all
            >>> with workers.kept():
            ...     squares = sorted(workers.run(pow, 2, [1, 2, 3]))
            ...     cubes = sorted(workers.run(pow, 3, [1, 2, 3]))
            >>> cubes
            [(0, 3), (1, 9), (2, 27)]
        """
        yield


def executor(name: str | Executor, *, threads: int | None = None) -> Executor:
    """Returns an executor by name.

    Args:
        name: `serial`; `processes` or `ray`, with `:N` for N workers; or `ray://HOST:PORT`, a cluster. An executor is
            returned as it is.
        threads: see `Executor`.

    Raises:
        HoldfastError: for an unknown name, a number of workers that is none, if Ray is not installed, or for anything
            but `serial` in one of several processes.

    Example:
        >>> sorted(executor("serial").run(pow, 2, [1, 2, 3]))
        [(0, 2), (1, 4), (2, 8)]
    """
    if isinstance(name, Executor):
        return name
    if not isinstance(name, str):
        raise HoldfastError(f"executor is {name!r}; expected a name such as 'serial' or 'processes:2'.")
    if name == "serial":
        return Serial(name, 1, threads)
    if process_group().count > 1:
        raise HoldfastError(
            f"Executor {name!r}: {process_group().count} processes were launched, and share the trials already. Leave "
            "--executor out, or start a single process."
        )
    from holdfast.runtime.local_processes import Processes
    from holdfast.runtime.ray_cluster import RayCluster

    if name.startswith("ray://"):
        return RayCluster(name, None, threads)
    kind, colon, count = name.partition(":")
    found: type[Executor] | None = {"processes": Processes, "ray": RayCluster}.get(kind)
    if found is None:
        raise unknown("executor", name, KINDS)
    if colon and not (count.isascii() and count.isdigit() and 1 <= int(count) <= MAX_WORKERS):
        raise HoldfastError(f"Executor {name!r}: expected {kind}:N with N from 1 to {MAX_WORKERS}.")
    return found(name, int(count) if colon else None, threads)


@dataclass(frozen=True)
class Serial(Executor):
    """One job after another, here; if several processes were launched for the work, each does its share."""

    def run(
        self, work: Callable[[Context, Job], Result], context: Context, jobs: Sequence[Job]
    ) -> Iterator[tuple[int, Result]]:
        """See `Executor.run`."""
        yield from process_group().share(lambda index: work(context, jobs[index]), len(jobs))
