"""A run: seed, device, progress display, and the folder from which it can be resumed.

Every random choice uses a generator seeded by the run's seed and the *purpose* of the choice. No random state needs
saving: a resumed run uses the same purposes and gets the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from holdfast.runtime.argument_checks import whole_number
from holdfast.runtime.callbacks import Callback
from holdfast.runtime.devices import resolve_device
from holdfast.runtime.distributed import speaks


def derive_seed(seed: int, *purpose: object) -> int:
    """Returns a seed in [0, 2**63) for one purpose; different purposes have independent streams.

    Example:
        >>> derive_seed(0, "audit", 3) == derive_seed(0, "audit", 3) != derive_seed(0, "audit", 4)
        True
    """
    text = json.dumps([seed, *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def fingerprint(value: Any) -> str:
    """Returns the SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class Run:
    """Seed, device, folder and progress display, passed to every stage.

    Args:
        seed: source of all randomness.
        device: see `resolve_device`.
        folder: for checkpoints; None keeps everything in memory, and the run cannot be resumed.
        quiet: do not show progress.
        callbacks: called after rounds and trials, in this process only.
    """

    seed: int = 0
    device: torch.device = field(default_factory=resolve_device)
    folder: Path | None = None
    quiet: bool = True
    console: Console = field(default_factory=lambda: Console(stderr=True))
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        self.seed = whole_number("seed", self.seed)

    def __reduce__(self) -> tuple[type[Run], tuple[int, torch.device, Path | None, bool]]:
        """Makes the copy in a worker process quiet, since only one process can draw on the terminal."""
        return Run, (self.seed, self.device, self.folder, True)

    def generator(self, *purpose: object) -> torch.Generator:
        """Returns a fresh CPU generator for one purpose."""
        return torch.Generator().manual_seed(derive_seed(self.seed, *purpose))

    @contextlib.contextmanager
    def seeded(self, *purpose: object) -> Iterator[torch.Generator]:
        """Seeds torch's global generators (dropout, initialisers) inside the block and restores them after it.

        Yields:
            A generator for the same purpose, for functions that take one.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        cudnn = torch.backends.cudnn
        before = cudnn.deterministic, cudnn.benchmark
        with torch.random.fork_rng(devices=devices):
            seed = derive_seed(self.seed, "global", *purpose)
            # While no GPU is in use, `torch.manual_seed` records the call stack for later, which costs a millisecond.
            (torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed)(seed)
            cudnn.deterministic, cudnn.benchmark = True, False
            try:
                yield self.generator(*purpose)
            finally:
                cudnn.deterministic, cudnn.benchmark = before

    def finished_round(self, defense: str, round: int, values: Mapping[str, float]) -> None:
        """Calls `Callback.on_round` of all callbacks."""
        for callback in self.callbacks:
            callback.on_round(defense, round, values)

    def finished_trial(self, curve: Any) -> None:
        """Calls `Callback.on_trial` of all callbacks."""
        for callback in self.callbacks:
            callback.on_trial(curve)

    def path(self, *parts: str) -> Path | None:
        """Returns a path in the run folder's `checkpoints/`, or None without a folder."""
        return None if self.folder is None else self.folder.joinpath("checkpoints", *parts)

    @contextlib.contextmanager
    def progress(self, description: str, total: int, done: int = 0) -> Iterator[Ticker]:
        """Shows a progress bar with the time left on a terminal, else one line per stage."""
        if self.quiet or not speaks():
            yield Ticker()
        elif not self.console.is_terminal:
            self.console.print(f"{description}: {total - done} to do" + (f", {done} done before" if done else ""))
            yield Ticker()
        else:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"),
            )  # fmt: skip
            with Progress(*columns, console=self.console) as bar:
                yield Ticker(bar, bar.add_task(description, total=total, completed=done, note=""))

    def say(self, message: str) -> None:
        """Prints one line, unless quiet."""
        if not self.quiet and speaks():
            self.console.print(message, highlight=False, markup=False)


@dataclass
class Ticker:
    """Advances a progress bar, if there is one."""

    bar: Progress | None = None
    task: TaskID | None = None

    def tick(self, note: str = "") -> None:
        """Counts one unit; `note` replaces the text behind the bar."""
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task)
            if note:
                self.bar.update(self.task, note=note)
