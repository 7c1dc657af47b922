"""Journals: one line for each finished job, so that a second call computes only what is missing."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from holdfast.errors import HoldfastError
from holdfast.runtime.distributed import process_group
from holdfast.runtime.documents import read_json
from holdfast.runtime.launcher import command_line
from holdfast.runtime.storage import _explained, write_atomic

T = TypeVar("T")


class Journal:
    """A durable list of finished jobs: one JSON line each, flushed to disk.

    The first line describes what the entries depend on and the command that started the journal. A journal with another
    description is refused. An incomplete last line, left by a kill, is dropped, and its job runs again. With several
    processes, all hold the entries and the main one writes them.

    Args:
        path: the file; None keeps the entries in memory.
        belongs_to: JSON-able description of the battery, data, models and seed that the entries depend on.
        what: kind of computation, for messages: `audit`, `study`, ...

    Raises:
        HoldfastError: if the file has another description; the message names the fields that differ.
    """

    def __init__(self, path: Path | None, belongs_to: Mapping[str, Any], what: str = "job") -> None:
        self.path, self.what = path, what
        head = json.loads(json.dumps(belongs_to, default=str))
        self.entries: dict[str, Any] = (
            {} if path is None else process_group().on_main_process(lambda: self._open(path, head))
        )

    def _open(self, path: Path, head: dict[str, Any]) -> dict[str, Any]:
        lines = self._complete_lines(path)
        if not lines:
            first = {"belongs_to": head, "what": self.what, "command": command_line()}
            write_atomic(path, json.dumps(first) + "\n")
            return {}
        old = lines[0]["belongs_to"]
        if old != head:
            differ = sorted(k for k in {*old, *head} if old.get(k) != head.get(k))
            raise HoldfastError(
                f"{str(path.parent.parent)!r} holds an unfinished {lines[0].get('what', self.what)} with another "
                f"{', '.join(differ)}: results are never mixed. Continue it with {begun_with(lines[0])}, or choose "
                "another folder with --out."
            )
        return {line["key"]: line["value"] for line in lines[1:]}

    def _complete_lines(self, path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        raw = path.read_bytes()
        complete = raw[: raw.rfind(b"\n") + 1]
        if complete != raw:
            write_atomic(path, complete)
        lines: list[dict[str, Any]] = []
        values: dict[str, Any] = {}
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                lines.append(_checked_line(read_json(line), values, first=number == 1))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise self._damaged(path, f"line {number}: {error}") from error
        return lines

    def _damaged(self, path: Path | None, why: str) -> HoldfastError:
        return HoldfastError(
            f"{str(path)!r} is damaged ({why}). Each line holds a finished job of the {self.what}: delete the line, "
            "and the job runs again; or choose another folder with --out."
        )

    def read(self, key: str, reader: Callable[[Any], T]) -> T:
        """Returns an entry after checking it: the file may have been edited.

        Args:
            key: of an existing entry.
            reader: function from the entry to the result; raises a ValueError, TypeError or KeyError on failure.

        Raises:
            HoldfastError: if the reader fails; the message names file and key.
        """
        try:
            return reader(self.entries[key])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise self._damaged(self.path, f"{key}: {why}") from error

    def missing(self, readers: Mapping[str, Callable[[Any], object]]) -> list[str]:
        """Returns the keys without an entry; reads the others, so that damage is found before any computation.

        Args:
            readers: by key; see `read`.
        """
        for key, reader in readers.items():
            if key in self.entries:
                self.read(key, reader)
        return [key for key in readers if key not in self.entries]

    def add(self, key: str, value: Any) -> None:
        """Stores the result of one job durably: it survives a kill once this returns.

        Raises:
            HoldfastError: if the file cannot be written, because the disk is full or the folder is gone.
        """
        if self.path is not None and process_group().main:
            with _explained(self.path), self.path.open("r+b") as handle:  # r+: do not recreate a deleted file
                handle.seek(0, os.SEEK_END)
                handle.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
                handle.flush()
                os.fsync(handle.fileno())
        self.entries[key] = value


def _checked_line(line: Any, values: dict[str, Any], *, first: bool) -> dict[str, Any]:
    """Refuses a line that is not an entry, or that contradicts an earlier entry in `values`."""
    if not isinstance(line, dict):
        raise ValueError("it is not a mapping")
    if first:
        if not isinstance(line["belongs_to"], dict):
            raise ValueError("it does not say what the entries belong to")
        return line
    if not {"key", "value"} <= line.keys() or not isinstance(line["key"], str):
        raise ValueError("it lacks its key or its value")
    if values.setdefault(line["key"], line["value"]) != line["value"]:
        raise ValueError(f"{line['key']} occurs twice, with different values; did two commands write here at once?")
    return line


def begun_with(head: Mapping[str, Any]) -> str:
    """Names the command that started a job, from the first line of its file.

    Example:
        >>> begun_with({"command": ["holdfast", "run", "my recipe.yaml"]})
        "the command that began it (holdfast run 'my recipe.yaml')"
    """
    command = head.get("command")
    if not isinstance(command, list) or not command:
        return "the command that began it"
    return f"the command that began it ({shlex.join(map(str, command))})"
