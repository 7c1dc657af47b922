"""What the examples of the documentation run with; see `make test`."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch

import holdfast
from holdfast.adversaries import BATTERIES, KINDS
from holdfast.cli.main import main
from holdfast.defenses import DEFENSES
from holdfast.tasks import TASKS

collect_ignore = ["docstrings.py"]  # for the build of the site; the tests do without what it imports

HERE = Path(__file__).parent
_CONSOLE = re.compile(r"```console\n\$ (?P<command>holdfast[^\n]*--help)\n(?P<output>.*?)```", re.DOTALL)
_FILE = re.compile(r"```python\n# src/(?P<path>[\w/]+)\.py\n(?P<code>.*?)```", re.DOTALL)


@pytest.fixture(autouse=True)
def _quiet_surroundings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doctest_namespace: dict[str, Any]
) -> Iterator[None]:
    """One thread (fast for small networks), an empty folder for temporary files, and no data folder."""
    threads = torch.get_num_threads()
    monkeypatch.delenv("HOLDFAST_DATA", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    doctest_namespace |= {f.__name__: f for f in (stale_help, undocumented_names, files_in_contributing)}
    torch.set_num_threads(1)
    with contextlib.ExitStack() as registered:  # what an example registers ends with it
        for registry in (DEFENSES, KINDS, BATTERIES, TASKS):
            len(registry)  # loaded before the copy is made
            registered.enter_context(patch.dict(registry._members))
        yield
    torch.set_num_threads(threads)


def stale_help() -> list[str]:
    """Returns the commands whose help in cli.md is not what they print."""
    shown = {m["command"]: m["output"] for m in _CONSOLE.finditer((HERE / "cli.md").read_text())}
    assert len(shown) == 11, "cli.md shows the help of holdfast and of its ten commands"
    return [command for command, output in shown.items() if _words(output) != _words(_printed(command))]


def undocumented_names() -> list[str]:
    """Returns the public names that have no entry in api.md."""
    entries = re.findall(r"^::: [\w.]+\.(\w+)$", (HERE / "api.md").read_text(), re.MULTILINE)
    known = {*entries, "__version__", "run"} if "run_recipe" in entries else {*entries}  # its name in the package
    return [name for name in holdfast.__all__ if name not in known]


def files_in_contributing() -> dict[str, ModuleType]:
    """Returns the modules whose files stand in CONTRIBUTING.md, by name, each made from its text there."""
    blocks = _FILE.finditer((HERE.parent / "CONTRIBUTING.md").read_text())
    return {name: _module(name, m["code"]) for m in blocks if (name := m["path"].replace("/", "."))}


def _module(name: str, code: str) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)  # dataclasses look their module up
    exec(compile(code, name, "exec"), module.__dict__)
    return module


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
