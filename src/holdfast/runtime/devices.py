"""Where tensors are computed: device, precision, threads."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.runtime.argument_checks import whole_number
from holdfast.runtime.distributed import own_device, process_group

MAX_THREADS = 1024
"""Upper limit, so that a mistyped number does not start thousands of threads."""


def checked_threads(count: Any) -> int | None:
    """Returns a number of CPU threads, or None for torch's own choice.

    Raises:
        HoldfastError: if it is not a whole number from 1 to `MAX_THREADS`.
    """
    return None if count is None else whole_number("threads", count, 1, MAX_THREADS)


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Returns the device to compute on.

    With several processes, each gets the device that the launcher assigned to it.

    Args:
        name: `auto` (the accelerator that Accelerate finds, else the CPU) or a torch device such as `cpu`, `cuda:1`.

    Raises:
        HoldfastError: if torch does not know the device, if this machine lacks it, or if a launcher assigned this
            process another device.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if isinstance(name, torch.device):
        name = str(name)
    if not isinstance(name, str):
        raise HoldfastError(f"Device {name!r} is not a name. Try 'auto' or 'cpu'.")
    if name == "auto":
        return own_device()
    if process_group().count > 1:
        given = own_device()
        if name not in (given.type, str(given)):
            raise HoldfastError(
                f"Device is {name!r}, but the launcher assigned {str(given)!r} to this process. Leave --device out; to "
                "compute on the CPU, set ACCELERATE_USE_CPU=true."
            )
        return given
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise HoldfastError(f"Device {name!r} cannot be used here ({reason}). Try 'auto' or 'cpu'.") from error
    return device


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of a module's tensors, including buffers; the CPU for a module without tensors."""
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def dtype_of(module: nn.Module) -> torch.dtype:
    """Returns the precision of a module's weights, including buffers; torch's default for a module without any.

    Example:
        >>> dtype_of(nn.Linear(2, 2).double()), dtype_of(nn.ReLU())
        (torch.float64, torch.float32)
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def place_of_float64(device: torch.device) -> torch.device:
    """Returns the device for float64 computations on a device's tensors: itself, or the CPU if it lacks float64 (mps).

    Example:
        >>> place_of_float64(torch.device("cuda", 1)), place_of_float64(torch.device("mps"))
        (device(type='cuda', index=1), device(type='cpu'))
    """
    return torch.device("cpu") if device.type == "mps" else device


def widest(device: torch.device) -> torch.dtype:
    """Returns the most precise floating-point type that a device supports."""
    return torch.float64 if place_of_float64(device) == device else torch.float32


def autocast(device: torch.device, bf16: bool, *, cache: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Returns a context of bfloat16 autocast, or one that changes nothing.

    Args:
        device: where the network is.
        bf16: whether to autocast; if False, a caller's own autocast stays in force.
        cache: reuse the bfloat16 copies of weights. Set False if weights change in place inside the block.

    Example:
        >>> with autocast(torch.device("cpu"), bf16=True):
        ...     nn.Linear(2, 2)(torch.zeros(1, 2)).dtype
        torch.bfloat16
    """
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache) if bf16 else contextlib.nullcontext()


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of CPU threads inside the block; None changes nothing.

    Raises:
        HoldfastError: if the number is not from 1 to `MAX_THREADS`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(checked_threads(count) or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
