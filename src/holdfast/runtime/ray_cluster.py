"""Ray, local or on a cluster. No other file uses Ray."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from holdfast.errors import HoldfastError
from holdfast.runtime.executors import Context, Executor, Job, Result
from holdfast.runtime.signals import sigterm_kept
from holdfast.runtime.workers import ATTEMPTS, answer, lost_too_often, open_context, pack_jobs, unpack, worker_count

IN_FLIGHT = 1000
"""Jobs submitted to Ray at a time: it handles many more badly, but a cluster needs waiting jobs in order to grow."""


@dataclass(frozen=True)
class RayCluster(Executor):
    """Runs jobs on a local Ray, which is started and shut down here, or on a cluster."""

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
        from ray import cloudpickle

        threads = self.threads or torch.get_num_threads()
        # cloudpickle also pickles definitions of scripts and notebooks, which other machines cannot import.
        packed, parcels = pack_jobs(work, context, jobs, threads=threads, dumps=cloudpickle.dumps)
        with self._connected(worker_count(self.workers, threads, len(jobs)) * threads):
            # A job that requests more cores than any machine has would wait forever.
            cores = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
            per_job = min(threads, cores) if cores else threads
            remote = ray.remote(_ray_job).options(num_cpus=per_job, max_retries=ATTEMPTS - 1)
            # In a list, so that Ray does not fetch it for workers that hold it already.
            shared, key = [ray.put(packed)], uuid.uuid4().hex
            waiting, running = deque(range(len(jobs))), dict[Any, int]()
            try:
                while waiting or running:
                    while waiting and len(running) < IN_FLIGHT:
                        index = waiting.popleft()
                        running[remote.remote(shared, key, parcels[index])] = index
                    for reference in ray.wait(list(running))[0]:
                        index = running.pop(reference)
                        yield index, unpack(_fetch(reference, jobs[index]))
            finally:
                for reference in running:
                    with contextlib.suppress(Exception):  # the job may have ended, or the cluster may be gone
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
        """Starts or joins Ray, and leaves it afterwards; a Ray started by the caller is used and stays up."""
        import ray

        if not self._keeper:
            with contextlib.nullcontext() if ray.is_initialized() else self._started(cores):
                yield
            return
        if self._cores and self._cores[0] < cores and not self.name.startswith("ray://"):
            self._keeper[0].close()  # it has fewer workers than this run needs
            self._cores.clear()
        if not ray.is_initialized():
            self._keeper[0].enter_context(self._started(cores))
            self._cores.append(cores)
        yield

    @contextlib.contextmanager
    def _started(self, cores: int) -> Iterator[None]:
        import ray

        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        # Local workers import from the same paths, and Ray's usage statistics are off.
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
                f"Executor {self.name!r}: Ray cannot be reached or started ({type(error).__name__}: {error}). For a "
                "cluster, give the client port (ray://HOST:10001), and its token in RAY_AUTH_TOKEN if it has one."
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def _ray_job(shared: list[Any], key: str, parcel: bytes) -> bytes:
    """Runs one job in a Ray worker, which caches the context of the last one."""
    import ray
    from ray import cloudpickle

    if key not in _OPENED:
        _OPENED.clear()
        try:
            _OPENED[key] = open_context(ray.get(shared[0]))
        except Exception as error:
            _OPENED[key] = error
    return answer(_OPENED[key], parcel, cloudpickle.dumps)


_OPENED: dict[str, tuple[Any, Any] | Exception] = {}


def _fetch(reference: Any, job: object) -> bytes:
    import ray

    try:
        return ray.get(reference)  # type: ignore[no-any-return]
    except ray.exceptions.RayTaskError as error:
        # Errors of jobs arrive as messages, so here Holdfast itself failed to start.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise HoldfastError(
            f"A Ray worker cannot run Holdfast ({reason}); every machine of the cluster needs the Python environment "
            "of this one."
        ) from error
    except ray.exceptions.RayError as error:
        why = f"lost ({type(error).__name__}); if memory ran out, use fewer workers, such as ray:1"
        raise lost_too_often(job, why) from error


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
