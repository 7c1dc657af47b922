"""Several processes that do one job, as `accelerate launch` starts them: who is who, what is averaged, who writes.

The only file that knows Accelerate. Every process runs the same program on the same data. In training each draws
batches of its own, and gradients are averaged before each step, so that all hold the same weights at all times.
Whatever else decides something is decided by the main process, and only the main process writes files. Without a
launcher there is one process, and nothing here does anything.

A process that fails ends: the launcher then ends the others. What `on_main_process` and shared jobs raise is raised
by all.
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
"""How long a process waits for the others: the longest job that one of them may do alone. It is no safety net, the
launcher is: it ends all processes as soon as one has failed."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one job, seen from one of them.

    Every method but `own` is called by all of them, in the same order.

    Attributes:
        rank: which of them this is, from 0 on.
        count: how many there are.

    Example:
        >>> group = process_group()
        >>> group.count, group.main, group.broadcast_object(0.5), group.gather("mine")
        (1, True, 0.5, ['mine'])
    """

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this one decides, and writes files."""
        return self.rank == 0

    def own(self, *purpose: object) -> tuple[object, ...]:
        """Returns a purpose for `Run.seeded` whose draws are this process's own; the main one's are those of one alone.

        Example:
            >>> ProcessGroup(0, 2).own("pretrain"), ProcessGroup(1, 2).own("pretrain")
            (('pretrain',), ('pretrain', 'process', 1))
        """
        return purpose if self.main else (*purpose, "process", self.rank)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their mean over all processes: with batches of one size, that of all batches together.

        A gradient that some processes have and others have not counts as 0 there; one that nobody has stays None.

        Args:
            parameters: the same everywhere; those that need no gradient are passed over.
        """
        if self.count == 1:
            return
        from accelerate.utils import reduce

        moved = [p for p in parameters if p.requires_grad]
        if not moved:
            return
        have = torch.tensor([float(p.grad is not None) for p in moved], device=moved[0].device)
        reached = [p for p, having in zip(moved, reduce(have, "sum").tolist(), strict=True) if having]
        for parameter in reached:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._flat([p.grad for p in reached if p.grad is not None], lambda whole: reduce(whole, "mean"))

    def sync_buffers(self, module: nn.Module) -> None:
        """Replaces floating-point buffers, such as BatchNorm's statistics, by their mean over all processes."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        self._flat([b for b in module.buffers() if b.is_floating_point()], lambda whole: reduce(whole, "mean"))

    def broadcast_state(self, module: nn.Module) -> None:
        """Gives all processes the main one's weights and buffers, to the last bit."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        self._flat(list(module.state_dict().values()), broadcast)

    @staticmethod
    @torch.no_grad()
    def _flat(tensors: list[Tensor], change: Callable[[Tensor], Tensor]) -> None:
        """Sends tensors through a collective operation, in place; one message a precision."""
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            own = [t for t in tensors if t.dtype == dtype]
            changed = change(torch.cat([t.reshape(-1) for t in own]))
            for tensor, part in zip(own, torch.split(changed, [t.numel() for t in own]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def broadcast_object(self, value: T) -> T:
        """Returns the main process's value, for decisions that rounding might turn elsewhere."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        held: list[Any] = [value if self.main else None]
        broadcast_object_list(held)
        return held[0]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Returns everybody's value, by rank; it is pickled."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def on_main_process(self, work: Callable[[], T]) -> T:
        """Lets the main process alone do something, such as writing a file, while the others wait.

        Returns:
            In all processes, what `work` returned.

        Raises:
            Exception: in all processes, what it raised.
        """
        if self.count == 1:
            return work()
        with alone():
            found: tuple[bool, Any] = outcome(work) if self.main else (True, None)
        done, value = self.broadcast_object(found)
        if not done:
            raise value
        return value  # type: ignore[no-any-return]

    def share(self, work: Callable[[int], T], jobs: int) -> Iterator[tuple[int, T]]:
        """Does independent jobs, each in one process as if it were alone, and yields all results in all processes.

        They go in waves of one job a process, so that what is finished can be kept soon.

        Args:
            work: does the job of an index; what it returns is pickled.
            jobs: their number.

        Raises:
            Exception: in all processes, what one of the jobs raised.
        """
        if self.count == 1:
            yield from ((index, work(index)) for index in range(jobs))
            return
        for first in range(0, jobs, self.count):
            index, found = first + self.rank, None
            if index < jobs:
                with alone():
                    found = outcome(lambda index=index: work(index))  # type: ignore[misc]
            for i, told in enumerate(self.gather(found)):
                if told is not None:
                    done, value = told
                    if not done:
                        raise value
                    yield first + i, value


def outcome(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Returns (True, what work returned) or (False, what it raised), in a form that pickle can bring elsewhere."""
    try:
        return True, work()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # some classes of errors can be written and not read
        except Exception:
            return False, RuntimeError(f"{type(error).__name__}: {error}")
        return False, error


def process_group() -> ProcessGroup:
    """Returns the processes that this one works with now: those that were launched, or inside `alone` itself."""
    return ProcessGroup() if _alone else _launched()


def speaks() -> bool:
    """Whether this process speaks to the person at the terminal, even for a job that it does alone."""
    return _launched().main


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process works by itself, and writes its own files; the others do something else."""
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
    atexit.register(state.destroy_process_group)  # else its threads may still run when Python ends, and abort it
    return ProcessGroup(state.process_index, state.num_processes)


def _refuse_a_launcher_that_started_one() -> None:
    alone_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if alone_on_cpu and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise HoldfastError(
            "`accelerate launch --cpu --num_processes N` starts one process, whatever N is, unless it is given MPI. "
            "For several on CPUs: accelerate launch --multi_gpu --num_processes N -m holdfast ... (no GPU is needed), "
            "or torchrun --nproc-per-node N -m holdfast ..."
        )


def own_device() -> torch.device:
    """Returns the device that Accelerate gives to this process: an accelerator of its own if there is one."""
    device = torch.device(_state().device)
    return torch.device("cpu") if device.type == "cpu" else device  # Accelerate numbers CPUs, and tensors do not


def _state() -> Any:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if processes() == 1:
        return PartialState()
    # Its functions' defaults are the group of processes that exists when they are imported, as the first optimizer does
    # somewhere. That group would never end, nor would its threads, which abort Python when they outlive it.
    import torch.distributed.nn.functional

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=PATIENCE)
