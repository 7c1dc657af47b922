"""Commands as dataclasses, whose fields are the options."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from holdfast.models import SplitModel
    from holdfast.tasks import Task


def option(text: str, default: Any = MISSING) -> Any:
    """Returns a field that is an option; required if it has no default."""
    return dataclasses.field(default=default, metadata={"help": text})


def argument(text: str, default: Any = MISSING) -> Any:
    """Returns a field that is the command's positional argument."""
    return dataclasses.field(default=default, metadata={"help": text, "positional": True})


def repeated(text: str, value: str) -> Any:
    """Returns a field that is an option which may be given several times; the help shows `value` as its value."""
    return dataclasses.field(default=(), metadata={"help": text, "repeated": value})


@dataclass(kw_only=True)
class Command(ABC):
    """A command of the command line; its docstring is its help."""

    @abstractmethod
    def __call__(self) -> int:
        """Runs the command and returns its exit code."""

    @classmethod
    def refuse_options(cls, values: Mapping[str, Any], known: Sequence[str]) -> None:
        """Refuses keys of `--set` that have their own option, and names the option."""
        options = [each.name for each in dataclasses.fields(cls) if each.name != "set"]
        for key in values:
            name = key.replace("-", "_")
            if key not in known and name in options:
                raise HoldfastError(f"--set {key}: use the option --{name.replace('_', '-')} instead.")


@dataclass(kw_only=True)
class ComputeOptions:
    """Options for device, threads and data."""

    data_dir: Path | None = option("Folder with data and weights (default: $HOLDFAST_DATA).", None)
    device: str = option("auto, cpu, cuda, cuda:1, mps, ...", "auto")
    threads: int | None = option("CPU threads; 1 is best for small networks (default: torch's own choice).", None)


@dataclass(kw_only=True)
class ModelOptions:
    """Options for MODEL."""

    weights: Path | None = option("Weights (.safetensors), if MODEL is a name.", None)
    head: str | None = option(
        "Dotted name of the layer that makes the logits (default: the one that Holdfast finds).", None
    )
    mean: str | None = option(
        "Subtracted from images in [0, 1], such as 0.485,0.456,0.406 (default: MODEL's own).", None
    )
    std: str | None = option("Divides the images afterwards, such as 0.229,0.224,0.225 (default: MODEL's own).", None)

    def loaded(self, model: str, task: Task, data_dir: Path | None, *, prefix: str = "", **more: Any) -> SplitModel:
        """Loads a model with the options whose names begin with `prefix`."""
        from holdfast.models import load_released
        from holdfast.runtime.argument_checks import split_numbers

        weights, head, mean, std = (getattr(self, f"{prefix}{name}") for name in ("weights", "head", "mean", "std"))
        option_name = f"--{prefix.replace('_', '-')}"
        return load_released(
            model, weights, task, head=head, data_dir=data_dir, **more,
            mean=None if mean is None else split_numbers(mean, f"{option_name}mean", float),
            std=None if std is None else split_numbers(std, f"{option_name}std", float),
        )  # fmt: skip


@dataclass(kw_only=True)
class TrackOption:
    """An experiment tracker."""

    track: str | None = option(
        "Log rounds and trials to tensorboard, wandb, mlflow or trackio, whose package must be installed.", None
    )

    @contextlib.contextmanager
    def callbacks(self, folder: Path) -> Iterator[list[Any]]:
        """Yields the tracker of `--track`, which writes below the command's folder; else no callbacks."""
        if self.track is None:
            yield []
            return
        from holdfast.runtime.callbacks import Tracker

        with Tracker(self.track, folder.name, folder / "tracking") as tracker:
            yield [tracker]


class HelpFormatter(DefaultHelpFormatter):
    """Leaves out Python types, and defaults that are None."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.option_strings and action.nargs != 0 and action.default not in (None, argparse.SUPPRESS, [])
        return f"{text} (default: {action.default})" if shown else text


def add_arguments(parser: ArgumentParser, command: type[Command]) -> None:
    """Adds the fields of a command as options: required ones first, then the command's own; flags take no value."""
    types = get_type_hints(command)

    def order(field: dataclasses.Field[Any]) -> tuple[bool, bool]:
        return field.default is not MISSING, field.name not in command.__annotations__

    for field in sorted(dataclasses.fields(command), key=order):
        kind, text = types[field.name], field.metadata["help"]
        name = f"--{field.name.replace('_', '-')}"  # the spelling of the field works as well
        names = dict.fromkeys([name, f"--{field.name}"])
        given: dict[str, Any] = {"help": text}
        if field.metadata.get("positional"):
            names = dict.fromkeys([field.name])
            given |= {"type": kind} | ({} if field.default is MISSING else {"nargs": "?", "default": field.default})
        elif "repeated" in field.metadata:
            given |= {"action": "append", "default": [], "metavar": field.metadata["repeated"]}
        elif kind is bool:
            given |= {"action": "store_true"}
        else:
            given |= {"type": kind} | ({"required": True} if field.default is MISSING else {"default": field.default})
        added = parser.add_argument(*names, **given)
        added.option_strings = added.option_strings[:1]
