"""Where a result comes from: versions, command, commit, machine."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from pydantic import Field

from holdfast.results.tables import ResultModel
from holdfast.runtime.launcher import command_line


class Reading(ResultModel):
    """A summary of a task's data, so that people can check whether it is the intended data."""

    source: str
    task_kind: str = Field(alias="kind", description="Kind of the task.")
    shape: list[int] = Field(description="Shape of an input: channels, height and width of an image; else its length.")
    low: float = Field(description="Smallest value of all inputs, before images are scaled to [0, 1].")
    high: float
    class_names: list[str] = Field(description="Empty where there are no classes.")
    samples: dict[str, list[int]] = Field(description="By split, the number of samples of each class.")
    notes: list[str] = Field([], description="Skipped and converted samples, and unusual facts.")
    warnings: list[str] = Field([], description="Warnings, such as samples that two splits share.")

    def sentence(self, facts: TaskFacts) -> str:
        """Returns sizes, classes, shape and range on one line."""
        parts = [f"{facts.train} training and {facts.test} test samples"]
        if self.class_names:
            shown = ", ".join(self.class_names[:5]) + (", ..." if len(self.class_names) > 5 else "")
            parts.append(f"{len(self.class_names)} classes ({shown})")
        if self.samples.get("train"):
            low, high = min(self.samples["train"]), max(self.samples["train"])
            parts.append(f"{low} training samples each" if low == high else f"{low} to {high} training samples each")
        what = "tokens" if facts.tokenizer else "inputs"
        parts.append(f"{what} {'x'.join(map(str, self.shape))} from {self.low:.4g} to {self.high:.4g}")
        return ", ".join(parts)


class TaskFacts(ResultModel):
    """Facts that identify the data of a task."""

    name: str
    sha256: str
    train: int
    test: int
    classes: int
    tokenizer: str | None = Field(None, description="For text: the tokenizer of the token ids.")
    read: Reading | None = Field(None, description="Summary of the data; None in results of earlier versions.")


class ModelFacts(ResultModel):
    """Facts that identify a model. `sha256` is over names, dtypes, shapes and values; `file_sha256` over the file."""

    name: str
    parameters: int
    sha256: str
    file_sha256: str | None = None
    notes: list[str] = Field([], description="How it was loaded, and what was changed to make it a plain network.")


class Provenance(ResultModel):
    """Origin of the numbers."""

    command: list[str]
    started: str
    holdfast: str
    python: str
    platform: str
    packages: dict[str, str]
    git_commit: str | None
    device: str
    threads: int
    processes: int = Field(1, description="Number of launched processes, which share training and trials.")
    tasks: dict[str, TaskFacts]
    models: dict[str, ModelFacts]


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
        device: the torch device of the computation.
        threads: CPU threads of torch; the last digit of sums depends on it.
        processes: number of processes that shared the job.
        tasks: facts of every dataset, by its role in the run.
        models: facts of every model, by its role in the run.
        command: the command line; None: that of this process.
    """
    names = ["torch", "torchvision", "timm", "accelerate", "safetensors", "scikit-learn", "pandas", "numpy", "plotly"]
    return Provenance(
        command=list(command_line() if command is None else command),
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
    """The commit of Holdfast's checkout, marked if files were modified; None for an installed copy."""
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
