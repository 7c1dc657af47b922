"""Independent jobs one after another, in local processes, or on Ray: the same results whichever.

The only file that knows Ray. Jobs share one context, which may be large (models, data): it is pickled once and sent
to each worker once. A worker gets the caller's torch settings, because numbers depend on them. One that dies takes no
result with it: its job alone is begun anew, `ATTEMPTS` times in all. What a job itself raises is raised to the caller.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
import uuid
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from holdfast.errors import HoldfastError, unknown
from holdfast.runtime.distributed import process_group
from holdfast.runtime.signals import sigterm_kept

Context = TypeVar("Context")
Job = TypeVar("Job")
Result = TypeVar("Result")
Dumps = Callable[[Any], bytes]

ATTEMPTS = 3
"""How often a job is begun before it is blamed for the death of its workers."""

MAX_WORKERS = 1024
IN_FLIGHT = 1000
"""Jobs handed to Ray at a time; it copes badly with many more, and a cluster grows by what it sees waiting."""

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


@dataclass(frozen=True)
class Processes(Executor):
    """Processes of this machine, started afresh: a forked torch may wait for ever for threads that it does not have."""

    _idle: list[_Worker] = field(default_factory=list, init=False, repr=False, compare=False)
    _keepers: list[object] = field(default_factory=list, init=False, repr=False, compare=False)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """See `Executor.kept`."""
        keeper = object()
        self._keepers.append(keeper)
        try:
            yield
        finally:
            self._keepers.remove(keeper)
            while self._idle and not self._keepers:
                self._idle.pop().stop()

    def run(
        self, work: Callable[[Context, Job], Result], context: Context, jobs: Sequence[Job]
    ) -> Iterator[tuple[int, Result]]:
        """See `Executor.run`."""
        threads = self.threads or torch.get_num_threads()
        packed = _pack((_Surroundings.here(threads), work, context), pickle.dumps, "the models and tasks")
        parcels = [_pack(job, pickle.dumps, str(job)) for job in jobs]
        waiting, begun = deque(range(len(jobs))), Counter[int]()
        workers: dict[Connection, _Worker] = {}

        def take() -> int:
            begun[waiting[0]] += 1
            return waiting.popleft()

        try:
            for _ in range(_worker_count(self.workers, threads, len(jobs))):
                if self._idle:
                    worker = self._idle.pop()
                    worker.job = take()
                    workers[worker.connection] = worker
                    worker.send(packed, parcels[worker.job])
                else:
                    worker = _Worker.start(take())
                    workers[worker.connection] = worker
            while workers:
                for connection in wait(list(workers)):
                    assert isinstance(connection, Connection)
                    worker = workers[connection]
                    try:
                        message = connection.recv_bytes()
                    except (EOFError, OSError):
                        del workers[connection]
                        why = worker.died()
                        if begun[worker.job] >= ATTEMPTS:
                            raise _hopeless(jobs[worker.job], why) from None
                        waiting.appendleft(worker.job)
                        worker = _Worker.start(take())
                        workers[worker.connection] = worker
                        continue
                    if not worker.ready:
                        worker.ready = True
                        worker.send(packed, parcels[worker.job])
                        continue
                    index = worker.job
                    if waiting:
                        worker.job = take()
                        worker.send(parcels[worker.job])
                    else:
                        self._done(workers.pop(connection))
                    yield index, _unpack(message)
        finally:
            for worker in workers.values():
                worker.stop()

    def _done(self, worker: _Worker) -> None:
        """Ends a worker that has no more jobs, or keeps it for the next run."""
        if self._keepers:
            worker.send(b"")
            self._idle.append(worker)
        else:
            worker.stop()


@dataclass
class _Worker:
    """A process as its parent sees it: its end of the pipe, and the one job that it has."""

    process: SpawnProcess
    connection: Connection
    job: int
    ready: bool = False

    @classmethod
    def start(cls, job: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        try:
            with _interrupts_blocked():
                process.start()
        except RuntimeError as error:  # this is itself a worker, which imports the script that started it
            raise HoldfastError(f"Processes were to be started while a worker was starting. {_GUARD}") from error
        finally:
            theirs.close()
        return cls(process, ours, job)

    def send(self, *parcels: bytes) -> None:
        with contextlib.suppress(OSError):  # if it is dead, the next look at the pipe says so
            for parcel in parcels:
                self.connection.send_bytes(parcel)

    def stop(self) -> None:
        """Ends it at once: a worker has nothing that is worth keeping."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def died(self) -> str:
        """Says why its end of the pipe is closed.

        Raises:
            HoldfastError: if it failed before it could ask for work, as it would again.
        """
        self.process.join(timeout=10)
        code = self.process.exitcode
        self.stop()
        if code is not None and code >= 0 and not self.ready:
            raise HoldfastError(
                f"A worker process ended before it could begin (exit code {code}); what it said stands above. {_GUARD}"
            )
        if code == -signal.SIGKILL:
            return "killed, as the system does when memory runs out: use fewer workers, such as processes:1"
        if code is not None and code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return "hung" if code is None else f"ended with exit code {code}"


_GUARD = (
    "A worker imports the script that it serves, so what a script does must stand under "
    "`if __name__ == \"__main__\":`; or use the executor 'serial'."
)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that is started here never sees Ctrl-C, which is for the parent; the parent's own is only delayed."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing starts it with its first process, and unblocks SIGINT then
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection) -> None:
    """What a worker process does: asks for a context, does one job after another, and waits for the next context.

    An empty message says that a context has no more jobs; it is ended from outside.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        connection.send_bytes(b"ready")
        while True:
            _serve_one_context(connection)
            gc.collect()
            torch.cuda.empty_cache()  # others need the memory while this one waits; nothing where no GPU is in use


def _serve_one_context(connection: Connection) -> None:
    packed = connection.recv_bytes()
    parcel = connection.recv_bytes()
    try:
        shared: tuple[Any, Any] | Exception = _open(packed)
    except Exception as error:
        shared = error
    del packed
    while parcel:
        connection.send_bytes(_answer(shared, parcel, pickle.dumps))
        parcel = connection.recv_bytes()


def _end_with_parent() -> None:
    """Ends this process when its parent has ended, however that came: nobody waits for its job any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclass(frozen=True)
class RayCluster(Executor):
    """Ray: a local one that is started and shut down here, or a cluster."""

    _keeper: list[contextlib.ExitStack] = field(default_factory=list, init=False, repr=False, compare=False)
    _cores: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        needed = ("ray", "grpc") if self.name.startswith("ray://") else ("ray",)
        if any(importlib.util.find_spec(module) is None for module in needed):
            raise HoldfastError(f"Executor {self.name!r} needs Ray: pip install holdfast[cluster].")

    def run(
        self, work: Callable[[Context, Job], Result], context: Context, jobs: Sequence[Job]
    ) -> Iterator[tuple[int, Result]]:
        """See `Executor.run`."""
        import ray
        from ray import cloudpickle  # also takes what a script or a notebook defines, which no other machine can import

        threads = self.threads or torch.get_num_threads()
        packed = _pack((_Surroundings.here(threads), work, context), cloudpickle.dumps, "the models and tasks")
        parcels = [_pack(job, cloudpickle.dumps, str(job)) for job in jobs]
        with self._connected(_worker_count(self.workers, threads, len(jobs)) * threads):
            # A job that asks for more cores than any machine has would wait for ever.
            cores = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
            remote = ray.remote(_ray_job).options(
                num_cpus=min(threads, cores) if cores else threads, max_retries=ATTEMPTS - 1
            )
            # In a list, so that a worker asks for it only if it has not seen it before.
            shared, key = [ray.put(packed)], uuid.uuid4().hex
            waiting, running = deque(range(len(jobs))), dict[Any, int]()
            try:
                while waiting or running:
                    while waiting and len(running) < IN_FLIGHT:
                        index = waiting.popleft()
                        running[remote.remote(shared, key, parcels[index])] = index
                    for reference in ray.wait(list(running))[0]:
                        index = running.pop(reference)
                        yield index, _unpack(_fetch(reference, jobs[index]))
            finally:
                for reference in running:
                    with contextlib.suppress(Exception):  # it may have ended, or the cluster may be gone
                        ray.cancel(reference, force=True)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """See `Executor.kept`."""
        if self._keeper:
            yield
            return
        with contextlib.ExitStack() as stack:
            self._keeper.append(stack)
            try:
                yield
            finally:
                self._keeper.clear()
                self._cores.clear()

    @contextlib.contextmanager
    def _connected(self, cores: int) -> Iterator[None]:
        """Starts or joins Ray, and leaves it afterwards; one that the caller has started is used and left alone."""
        import ray

        if not self._keeper:
            with contextlib.nullcontext() if ray.is_initialized() else self._started(cores):
                yield
            return
        if self._cores and self._cores[0] < cores and not self.name.startswith("ray://"):
            self._keeper[0].close()  # it has fewer workers than this run has work for
            self._cores.clear()
        if not ray.is_initialized():
            self._keeper[0].enter_context(self._started(cores))
            self._cores.append(cores)
        yield

    @contextlib.contextmanager
    def _started(self, cores: int) -> Iterator[None]:
        import ray

        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        # Local workers should import what can be imported here; and nobody is asked, or told, about usage statistics.
        path = os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
        environment = {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        try:
            with sigterm_kept():
                if self.name.startswith("ray://"):
                    ray.init(self.name, **quiet)
                else:
                    with _environment(**environment):
                        ray.init("local", num_cpus=cores, include_dashboard=False, **quiet)
        except (ConnectionError, ImportError, RuntimeError, OSError, ValueError) as error:
            raise HoldfastError(
                f"Executor {self.name!r}: Ray cannot be reached or started ({type(error).__name__}: {error}). Of a "
                "cluster, give the client port (ray://HOST:10001), and its token in RAY_AUTH_TOKEN if it has one."
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def _ray_job(shared: list[Any], key: str, parcel: bytes) -> bytes:
    """What a Ray worker does for one job; it keeps the context of the last one."""
    import ray
    from ray import cloudpickle

    if key not in _OPENED:
        _OPENED.clear()
        try:
            _OPENED[key] = _open(ray.get(shared[0]))
        except Exception as error:
            _OPENED[key] = error
    return _answer(_OPENED[key], parcel, cloudpickle.dumps)


_OPENED: dict[str, tuple[Any, Any] | Exception] = {}


def _fetch(reference: Any, job: object) -> bytes:
    import ray

    try:
        message: bytes = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # jobs' own errors come as messages: this is Holdfast not starting
        raise HoldfastError(
            f"A Ray worker cannot run Holdfast ({_last_line(error)}); every machine of the cluster needs the Python "
            "environment of this one."
        ) from error
    except ray.exceptions.RayError as error:
        why = f"lost ({type(error).__name__}); if memory ran out, use fewer workers, such as ray:1"
        raise _hopeless(job, why) from error
    return message


def _last_line(error: Exception) -> str:
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class _Surroundings:
    """What a job's numbers depend on beside the job."""

    threads: int
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    matmul_precision: str = field(default_factory=torch.get_float32_matmul_precision)
    deterministic: int = field(default_factory=torch.get_deterministic_debug_mode)
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in ("holdfast", "torch")})

    @classmethod
    def here(cls, threads: int) -> _Surroundings:
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


def _worker_count(asked: int | None, threads: int, jobs: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(asked or max(1, cores // threads), jobs)


def _pack(value: Any, dumps: Dumps, what: str) -> bytes:
    """Pickles to bytes: torch's own way to share tensors between processes runs out of file descriptors."""
    try:
        return dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise HoldfastError(
            f"Another process cannot get {what}: {error}. Define classes and functions at the top of a module (no "
            "lambda, no inner function), or use the executor 'serial'."
        ) from error


def _open(packed: bytes) -> tuple[Any, Any]:
    surroundings, work, context = pickle.loads(packed)
    surroundings.apply()
    return work, context


def _answer(shared: tuple[Any, Any] | Exception, parcel: bytes, dumps: Dumps) -> bytes:
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


def _unpack(message: bytes) -> Any:
    done, value = pickle.loads(message)
    if not done:
        raise value
    return value


def _hopeless(job: object, why: str) -> HoldfastError:
    return HoldfastError(
        f"Job {str(job)!r} was begun {ATTEMPTS} times, and each time its worker was lost; the last one was {why}. "
        "What is finished is kept."
    )
