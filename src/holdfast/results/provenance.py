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
    """What was read of a task's data, for people who want to know whether it is what they meant."""

    source: str
    task_kind: str = Field(alias="kind", description="Kind of the task.")
    shape: list[int] = Field(description="Of one input: channels, height and width of an image; else its length.")
    low: float = Field(description="Smallest value of all inputs, before images are scaled to [0, 1].")
    high: float
    class_names: list[str] = Field(description="Empty where there are no classes.")
    samples: dict[str, list[int]] = Field(description="By split, the samples of each class.")
    notes: list[str] = Field([], description="What was left out or converted, and what is odd.")
    warnings: list[str] = Field([], description="Samples that are where they should not be.")

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
    """Which data it was: enough to recognise the same data."""

    name: str
    sha256: str
    train: int
    test: int
    classes: int
    tokenizer: str | None = Field(None, description="Of text: what made the token ids.")
    read: Reading | None = Field(None, description="What was read; None in results of former versions.")


class ModelFacts(ResultModel):
    """Which model it was. `sha256` is over names, dtypes, shapes and values; `file_sha256` over the saved file."""

    name: str
    parameters: int
    sha256: str
    file_sha256: str | None = None
    notes: list[str] = Field([], description="How it was read, and what was changed to make it a plain network.")


class Provenance(ResultModel):
    """Where the numbers come from."""

    command: list[str]
    started: str
    holdfast: str
    python: str
    platform: str
    packages: dict[str, str]
    git_commit: str | None
    device: str
    threads: int
    processes: int = Field(1, description="How many were launched; batches are drawn and gradients averaged by each.")
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
        device: the torch device that was computed on.
        threads: CPU threads that torch used; sums depend on it in the last digit.
        processes: how many did the job together.
        tasks: facts of every dataset, by its part in the run.
        models: facts of every model, by its part in the run.
        command: the command line; the process's own by default.
    """
    argv = list(command) if command is not None else command_line()
    names = ["torch", "torchvision", "timm", "accelerate", "safetensors", "scikit-learn", "pandas", "numpy", "plotly"]
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
