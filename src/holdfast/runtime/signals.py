"""SIGTERM stops a command like Ctrl-C: finished results are kept, and a message says how to continue."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from holdfast.runtime.launcher import processes


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, for example from `kill`, a stopped container, or a queue's time limit."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raises `Terminated` in the block when SIGTERM arrives.

    Does nothing if the caller has a handler or ignores SIGTERM, or if several processes were launched. Those exit at
    once: one may be waiting for the others in a call that no exception can interrupt, and the launcher would wait half
    a minute before killing it.

    Example:
        >>> with contextlib.suppress(Terminated), sigterm_raises():
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print("never printed")
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or processes() > 1:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
    """Restores the SIGTERM handler that a library, such as `ray.init`, replaces in the block."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and _in_main_thread():
            signal.signal(signal.SIGTERM, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # Python allows handlers only there


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
