"""SIGTERM stops a command as Ctrl-C does: what is finished is kept, and a message says how to continue."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from holdfast.runtime.launcher import processes


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: from `kill`, a container that is stopped, or a queue whose time is over."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raises `Terminated` in here when SIGTERM arrives.

    A caller's own handler is left in place, and so is a SIGTERM that is ignored. One of several launched processes ends
    at once, as without this: it may wait for the others inside a call that no exception can interrupt, and its
    launcher would then wait half a minute before it kills it.

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
    """Puts the handler of SIGTERM back that a library replaces in here, as `ray.init` does."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and _in_main_thread():
            signal.signal(signal.SIGTERM, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # Python sets handlers there alone


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
