"""Worker processes on this machine.

Each worker has its own pipe. If one is killed, for example because memory ran out, no result is lost, the others go on,
and its current job is run again.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from holdfast.errors import HoldfastError
from holdfast.runtime.executors import Context, Executor, Job, Result
from holdfast.runtime.workers import ATTEMPTS, answer, lost_too_often, open_context, pack_jobs, unpack, worker_count


@dataclass(frozen=True)
class Processes(Executor):
    """Worker processes, spawned and not forked: a forked torch may wait for threads that its child lacks."""

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
        packed, parcels = pack_jobs(work, context, jobs, threads=threads, dumps=pickle.dumps)
        waiting, begun = deque(range(len(jobs))), Counter[int]()
        workers: dict[Connection, _Worker] = {}

        def assign(worker: _Worker, *first: bytes) -> None:
            """Gives a worker the next job, after `first`; a new worker receives it when it is ready."""
            worker.job = waiting.popleft()
            begun[worker.job] += 1
            workers[worker.connection] = worker
            if worker.ready:
                worker.send(*first, parcels[worker.job])

        try:
            for _ in range(worker_count(self.workers, threads, len(jobs))):
                assign(self._idle.pop() if self._idle else _Worker.start(), packed)
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
                            raise lost_too_often(jobs[worker.job], why) from None
                        waiting.appendleft(worker.job)
                        assign(_Worker.start())
                        continue
                    if not worker.ready:
                        worker.ready = True
                        worker.send(packed, parcels[worker.job])
                        continue
                    index = worker.job
                    if waiting:
                        assign(worker)
                    elif self._keepers:
                        worker.send(b"")
                        self._idle.append(workers.pop(connection))
                    else:
                        workers.pop(connection).stop()
                    yield index, unpack(message)
        finally:
            for worker in workers.values():
                worker.stop()


@dataclass
class _Worker:
    """A worker process, seen from its parent: one end of the pipe, and the current job."""

    process: SpawnProcess
    connection: Connection
    job: int = -1
    ready: bool = False

    @classmethod
    def start(cls) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        try:
            with _interrupts_blocked():
                process.start()
        except RuntimeError as error:  # this is itself a worker, importing the script that started it
            raise HoldfastError(f"A worker that was still starting tried to start processes. {_GUARD}") from error
        finally:
            theirs.close()
        return cls(process, ours)

    def send(self, *parcels: bytes) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed at the next read
            for parcel in parcels:
                self.connection.send_bytes(parcel)

    def stop(self) -> None:
        """Kills the worker; it has no state to save."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def died(self) -> str:
        """Returns why the worker closed its pipe.

        Raises:
            HoldfastError: if it failed before its first job, since a new one would fail again.
        """
        self.process.join(timeout=10)
        code = self.process.exitcode
        self.stop()
        if code is not None and code >= 0 and not self.ready:
            raise HoldfastError(
                f"A worker process ended before its first job (exit code {code}); its output is above. {_GUARD}"
            )
        if code == -signal.SIGKILL:
            return "killed, as the system does when memory runs out: use fewer workers, such as processes:1"
        if code is not None and code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return "hung" if code is None else f"ended with exit code {code}"


_GUARD = (
    "A worker imports the script that started it, so the script's own actions belong under "
    "`if __name__ == \"__main__\":`; or use the executor 'serial'."
)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Blocks Ctrl-C while a worker starts: workers never receive it, and the parent only later."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing would start it later, and unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection) -> None:
    """Main loop of a worker: receives a context, runs its jobs one after another, and waits for the next context.

    An empty message ends the jobs of a context. The parent kills the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent has exited
        connection.send_bytes(b"ready")
        while True:
            _serve_one_context(connection)
            gc.collect()
            torch.cuda.empty_cache()  # free GPU memory for the others while this worker waits


def _serve_one_context(connection: Connection) -> None:
    packed = connection.recv_bytes()
    parcel = connection.recv_bytes()
    try:
        shared: tuple[Any, Any] | Exception = open_context(packed)
    except Exception as error:
        shared = error
    del packed
    while parcel:
        connection.send_bytes(answer(shared, parcel, pickle.dumps))
        parcel = connection.recv_bytes()


def _end_with_parent() -> None:
    """Exits when the parent has exited, for whatever reason: its job is no longer needed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
