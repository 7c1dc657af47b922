"""Where a result comes from: versions, command, commit, machine."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from holdfast.results.schema import ModelFacts, Provenance, TaskFacts
from holdfast.runtime.launcher import command_line


def provenance(
    *,
    started: str,
    device: str,
    threads: int,
    processes: int = 1,
    tasks: Mapping[str, TaskFacts],
    models: Mapping[str, ModelFacts],
    command: Sequence[str] | None = None,
) -> Provenance:
    """Collects where a result comes from: versions, commit, machine, hashes.

    Args:
        started: ISO 8601 time.
        device: the torch device that was computed on.
        threads: CPU threads that torch used; sums depend on it in the last digit.
        processes: how many did the job together.
        tasks: facts of every dataset, by its part in the run.
        models: facts of every model, by its part in the run.
        command: the command line; the process's own by default.
    """
    argv = list(command) if command is not None else command_line()
    names = [
        "torch",
        "torchvision",
        "timm",
        "accelerate",
        "safetensors",
        "scikit-learn",
        "pandas",
        "numpy",
        "plotly",
    ]
    return Provenance(
        command=argv,
        started=started,
        holdfast=metadata.version("holdfast"),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages={name: metadata.version(name) for name in names},
        git_commit=_git_commit(),
        device=device,
        threads=threads,
        processes=processes,
        tasks=dict(tasks),
        models=dict(models),
    )


def _git_commit() -> str | None:
    """The commit of the checkout that Holdfast runs from, marked if files differ; None for an installed copy."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=5, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit} (modified)" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
