"""What the examples of the documentation run with; see `make test`."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.cli import main

HERE = Path(__file__).parent
_CONSOLE = re.compile(r"```console\n\$ (?P<command>holdfast[^\n]*--help)\n(?P<output>.*?)```", re.DOTALL)


@pytest.fixture(autouse=True)
def _quiet_surroundings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doctest_namespace: dict[str, Any]
) -> Iterator[None]:
    """One thread (fast for small networks), an empty folder for temporary files, and no data folder."""
    threads = torch.get_num_threads()
    monkeypatch.delenv("HOLDFAST_DATA", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    doctest_namespace["stale_help"] = stale_help
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stale_help() -> list[str]:
    """Returns the commands whose help in cli.md is not what they print."""
    shown = {m["command"]: m["output"] for m in _CONSOLE.finditer((HERE / "cli.md").read_text())}
    assert len(shown) == 6, "cli.md shows the help of holdfast and of its five commands"
    return [command for command, output in shown.items() if _words(output) != _words(_printed(command))]


def _printed(command: str) -> str:
    """What a command prints before it exits."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("COLUMNS", "92")
        with contextlib.suppress(SystemExit):
            main(shlex.split(command)[1:])
    return printed.getvalue()


def _words(text: str) -> list[str]:
    """The help without its first paragraph, the usage, which every version of Python lays out in its own way."""
    return text.strip().partition("\n\n")[2].split()
