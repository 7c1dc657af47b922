"""Processes that tests start: the same whichever way the tests themselves were started."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def answers_to_signals() -> Iterator[None]:
    """A process inherits that a signal is ignored or blocked, as under `nohup` or after `pytest &` in a script.

    One that is started in here gets the default handlers instead.
    """
    ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "holdfast", *map(str, arguments)]


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Starts `holdfast` with these arguments; what it says is one stream, and nothing is typed to it."""
    with answers_to_signals():
        return subprocess.Popen(
            command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            **options,
        )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"it ended too early:\n{process.communicate()}"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)
