"""Several processes that share the work, started by `accelerate launch`: ranks, averaged gradients, broadcasts.

Accelerate's process functions are used here only. Every process runs the same program on the same data. In training,
each process draws its own batches, and gradients are averaged before each step, so all processes hold the same weights.
The main process makes all other decisions and writes all files. Without a launcher there is one process, and the
functions here do nothing.

If a process fails, it exits and the launcher stops the others. An error in `on_main_process` or in a shared job is
raised in all processes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.runtime.launcher import processes

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: the longest job that one may do alone. Failures do not take that long: the
launcher stops all processes as soon as one fails."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share the work, seen from one of them.

    All processes must call every method except `own`, in the same order.

    Attributes:
        rank: number of this process, from 0 on.
        count: number of processes.

    Example:
        >>> group = process_group()
        >>> group.count, group.main, group.broadcast_object(0.5), group.gather("a")
        (1, True, 0.5, ['a'])
    """

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the main process, which decides and writes files."""
        return self.rank == 0

    def own(self, *purpose: object) -> tuple[object, ...]:
        """Returns a purpose for `Run.seeded` that is distinct in each process; the main process's is unchanged.

        Example:
            >>> ProcessGroup(0, 2).own("pretrain"), ProcessGroup(1, 2).own("pretrain")
            (('pretrain',), ('pretrain', 'process', 1))
        """
        return purpose if self.main else (*purpose, "process", self.rank)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their mean over all processes: for batches of one size that of the joint batch.

        A gradient that is None in some processes counts as 0 there; one that is None in all of them stays None.

        Args:
            parameters: the same in all processes; those without `requires_grad` are skipped.
        """
        if self.count == 1:
            return
        from accelerate.utils import reduce

        trained = [p for p in parameters if p.requires_grad]
        if not trained:
            return
        has_grad = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
        shared = [p for p, count in zip(trained, reduce(has_grad, "sum").tolist(), strict=True) if count]
        for parameter in shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._flat([p.grad for p in shared if p.grad is not None], lambda flat: reduce(flat, "mean"))

    def sync_buffers(self, module: nn.Module) -> None:
        """Replaces floating-point buffers, such as BatchNorm's statistics, by their mean over all processes."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        self._flat([b for b in module.buffers() if b.is_floating_point()], lambda flat: reduce(flat, "mean"))

    def broadcast_state(self, module: nn.Module) -> None:
        """Copies the main process's weights and buffers to all processes, bit by bit."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        self._flat(list(module.state_dict().values()), broadcast)

    @staticmethod
    @torch.no_grad()
    def _flat(tensors: list[Tensor], change: Callable[[Tensor], Tensor]) -> None:
        """Sends tensors through a collective operation, in place; one message for each dtype."""
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            own = [t for t in tensors if t.dtype == dtype]
            changed = change(torch.cat([t.reshape(-1) for t in own]))
            for tensor, part in zip(own, torch.split(changed, [t.numel() for t in own]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def broadcast_object(self, value: T) -> T:
        """Returns the main process's value, for decisions that rounding could make differ between processes."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        held: list[Any] = [value if self.main else None]
        broadcast_object_list(held)
        return held[0]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes, by rank; they are pickled."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def on_main_process(self, work: Callable[[], T]) -> T:
        """Runs `work` in the main process only, for example to write a file, while the others wait.

        Returns:
            The result of `work`, in all processes.

        Raises:
            Exception: raised by `work`, in all processes.
        """
        if self.count == 1:
            return work()
        with alone():
            result: tuple[bool, Any] = outcome(work) if self.main else (True, None)
        done, value = self.broadcast_object(result)
        if not done:
            raise value
        return value  # type: ignore[no-any-return]

    def share(self, work: Callable[[int], T], jobs: int) -> Iterator[tuple[int, T]]:
        """Distributes independent jobs over the processes and yields all results in all processes.

        Jobs run in waves of one per process, so that finished results can be stored early. Each process works alone.

        Args:
            work: computes the job of an index; its result is pickled.
            jobs: number of jobs.

        Raises:
            Exception: raised by one of the jobs, in all processes.
        """
        if self.count == 1:
            yield from ((index, work(index)) for index in range(jobs))
            return
        for first in range(0, jobs, self.count):
            index, own = first + self.rank, None
            if index < jobs:
                with alone():
                    own = outcome(lambda index=index: work(index))  # type: ignore[misc]
            for i, result in enumerate(self.gather(own)):
                if result is not None:
                    done, value = result
                    if not done:
                        raise value
                    yield first + i, value


def outcome(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Returns (True, result) or (False, exception), both picklable."""
    try:
        return True, work()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # some exception classes can be pickled but not unpickled
        except Exception:
            return False, RuntimeError(f"{type(error).__name__}: {error}")
        return False, error


def process_group() -> ProcessGroup:
    """Returns the processes that this one works with: all that were launched, or inside `alone` only itself."""
    return ProcessGroup() if _alone else _launched()


def speaks() -> bool:
    """Whether this process prints to the terminal, even for a job that it runs alone."""
    return _launched().main


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process works by itself and writes its own files."""
    global _alone  # noqa: PLW0603
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


_alone = 0


@cache
def _launched() -> ProcessGroup:
    if processes() == 1:
        _refuse_a_launcher_that_started_one()
        return ProcessGroup()
    state = _state()
    atexit.register(state.destroy_process_group)  # else its threads may outlive Python and abort it
    return ProcessGroup(state.process_index, state.num_processes)


def _refuse_a_launcher_that_started_one() -> None:
    alone_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if alone_on_cpu and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise HoldfastError(
            "`accelerate launch --cpu --num_processes N` starts a single process, whatever N is, unless it has MPI. "
            "For several on CPUs: accelerate launch --multi_gpu --num_processes N -m holdfast ... (no GPU is needed), "
            "or torchrun --nproc-per-node N -m holdfast ..."
        )


def own_device() -> torch.device:
    """Returns the device that Accelerate assigns to this process: an accelerator if there is one."""
    device = torch.device(_state().device)
    return torch.device("cpu") if device.type == "cpu" else device  # Accelerate numbers CPUs, torch does not


def _state() -> Any:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if processes() == 1:
        return PartialState()
    # torch binds the process group that exists at import time into its functions' defaults, and creating an optimizer
    # imports them. That group would never be destroyed, and threads that outlive Python abort it.
    import torch.distributed.nn.functional

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=PATIENCE)
