"""Executors: independent jobs one after another, in local processes, or on Ray, with the same results.

Jobs share one context, which may be large (models, data): it is pickled once and sent to each worker once. A worker
gets the caller's torch settings, because results depend on them. If a worker dies, only its current job is run again,
at most `ATTEMPTS` times in all. An exception of a job is raised in the caller.
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
        name: the name that was requested.
        workers: number of workers; None: as many as the cores allow.
        threads: CPU threads of torch in each worker; None: as many as the caller uses when it calls `run`.
    """

    name: str
    workers: int | None = None
    threads: int | None = None

    @abstractmethod
    def run(
        self, work: Callable[[Context, Job], Result], context: Context, jobs: Sequence[Job]
    ) -> Iterator[tuple[int, Result]]:
        """Runs every job once and yields index and result of each as it finishes, in any order.

        Args:
            work: a module-level function; it must not depend on the order of jobs or change the context.
            context: input that all jobs share; pickled, so every worker has a copy.
            jobs: inputs of the jobs, small and picklable; errors name a job by its `str`.

        Raises:
            HoldfastError: if something cannot be pickled, or the workers of one job die `ATTEMPTS` times.
        """

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps workers alive between calls of `run` inside the block; starting a process takes seconds.

        Example:
            >>> workers = executor("serial")  # "processes:2" would start two processes in all
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
            returned unchanged.
        threads: see `Executor`.

    Raises:
        HoldfastError: if the name or the number of workers is not valid, if Ray is not installed, or if several
            processes were launched and the executor is not `serial`.

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
            f"Executor {name!r}: {process_group().count} processes were launched and already share the trials. Leave "
            "--executor out, or start a single process."
        )
    from holdfast.runtime.local_processes import Processes
    from holdfast.runtime.ray_cluster import RayCluster

    if name.startswith("ray://"):
        return RayCluster(name, None, threads)
    kind, colon, count = name.partition(":")
    executor_type: type[Executor] | None = {"processes": Processes, "ray": RayCluster}.get(kind)
    if executor_type is None:
        raise unknown("executor", name, KINDS)
    if colon and not (count.isascii() and count.isdigit() and 1 <= int(count) <= MAX_WORKERS):
        raise HoldfastError(f"Executor {name!r}: expected {kind}:N with N from 1 to {MAX_WORKERS}.")
    return executor_type(name, int(count) if colon else None, threads)


@dataclass(frozen=True)
class Serial(Executor):
    """Runs jobs one after another in this process; if several processes were launched, each runs its share."""

    def run(
        self, work: Callable[[Context, Job], Result], context: Context, jobs: Sequence[Job]
    ) -> Iterator[tuple[int, Result]]:
        """See `Executor.run`."""
        yield from process_group().share(lambda index: work(context, jobs[index]), len(jobs))
