"""Options of commands: a command is a dataclass, and its fields are its options."""

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
    """Returns a field that is an option; without a default it must be given."""
    return dataclasses.field(default=default, metadata={"help": text})


def argument(text: str, default: Any = MISSING) -> Any:
    """Returns a field that is the command's positional argument."""
    return dataclasses.field(default=default, metadata={"help": text, "positional": True})


def repeated(text: str, value: str) -> Any:
    """Returns a field that is an option which may be given several times; `value` stands for what it takes."""
    return dataclasses.field(default=(), metadata={"help": text, "repeated": value})


@dataclass(kw_only=True)
class Command(ABC):
    """A command of the command line; its docstring is its help."""

    @abstractmethod
    def __call__(self) -> int:
        """Runs the command and returns its exit code."""

    @classmethod
    def refuse_options(cls, values: Mapping[str, Any], known: Sequence[str]) -> None:
        """Says which option sets what `--set` does not."""
        options = [each.name for each in dataclasses.fields(cls) if each.name != "set"]
        for key in values:
            name = key.replace("-", "_")
            if key not in known and name in options:
                raise HoldfastError(f"--set {key}: it has an option of its own, --{name.replace('_', '-')}.")


@dataclass(kw_only=True)
class ComputeOptions:
    """Where it is computed, and with which data."""

    data_dir: Path | None = option("Where data and weights are looked up (default: $HOLDFAST_DATA).", None)
    device: str = option("auto, cpu, cuda, cuda:1, mps, ...", "auto")
    threads: int | None = option("CPU threads; 1 is best for small networks (default: torch's own choice).", None)


@dataclass(kw_only=True)
class ModelOptions:
    """What a name alone does not say of MODEL."""

    weights: Path | None = option("Weights (.safetensors), where MODEL is a name.", None)
    head: str | None = option(
        "Dotted name of the layer that makes the logits, where another than the one found is meant.", None
    )
    mean: str | None = option(
        "Subtracted from images in [0, 1], such as 0.485,0.456,0.406, where another is meant than MODEL's own.", None
    )
    std: str | None = option("Divides them afterwards, such as 0.229,0.224,0.225.", None)

    def loaded(self, model: str, task: Task, data_dir: Path | None, *, prefix: str = "", **more: Any) -> SplitModel:
        """Returns a model by name, with the options that begin with `prefix`."""
        from holdfast.models import load_released

        weights, head, mean, std = (getattr(self, f"{prefix}{name}") for name in ("weights", "head", "mean", "std"))
        spelled = f"--{prefix.replace('_', '-')}"
        return load_released(
            model, weights, task, head=head, mean=_numbers(mean, f"{spelled}mean"), std=_numbers(std, f"{spelled}std"),
            data_dir=data_dir, **more,
        )  # fmt: skip


def _numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.strip("[]() ").split(","))
    except ValueError as error:
        raise HoldfastError(f"{name} {text!r}: expected numbers with commas, such as 0.485,0.456,0.406.") from error


@dataclass(kw_only=True)
class TrackOption:
    """An experiment tracker."""

    track: str | None = option(
        "Log rounds and trials to tensorboard, wandb, mlflow or trackio, whose package must be installed.", None
    )

    @contextlib.contextmanager
    def callbacks(self, folder: Path) -> Iterator[list[Any]]:
        """Yields the callbacks of a command: a tracker, if one is wanted; it writes below the command's folder."""
        if self.track is None:
            yield []
            return
        from holdfast.runtime.callbacks import Tracker

        with Tracker(self.track, folder.name, folder / "tracking") as tracker:
            yield [tracker]


class HelpFormatter(DefaultHelpFormatter):
    """Leaves out what a person at the terminal does not need: Python types, and defaults that are None."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.option_strings and action.nargs != 0 and action.default not in (None, argparse.SUPPRESS, [])
        return f"{text} (default: {action.default})" if shown else text


def add_arguments(parser: ArgumentParser, command: type[Command]) -> None:
    """Adds the fields of a command: what must be given first, then its own options; flags take no value."""
    types = get_type_hints(command)

    def order(field: dataclasses.Field[Any]) -> tuple[bool, bool]:
        return field.default is not MISSING, field.name not in command.__annotations__

    for field in sorted(dataclasses.fields(command), key=order):
        kind, text = types[field.name], field.metadata["help"]
        name = f"--{field.name.replace('_', '-')}"  # as people spell options; the field's own spelling works as well
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
