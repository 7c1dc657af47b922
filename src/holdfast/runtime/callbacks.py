"""Callbacks: user code that is called while a defense or an audit runs; and experiment trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError, unknown

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


class Callback:
    """Receives rounds and trials. Override the methods you need; they must not change their arguments.

    Callbacks run in the process that started the command. The rounds of a defense in a worker process, such as an
    immunization of a protocol with `--executor processes`, are not reported.

    Example:
        >>> class Printer(Callback):
        ...     def on_round(self, defense, round, values):
        ...         print(defense, round, sorted(values))
        >>> Printer().on_round("sophon", 1, {"suppression_loss": 0.5})
        sophon 1 ['suppression_loss']
    """

    def on_round(self, defense: str, round: int, values: Mapping[str, float]) -> None:
        """Called after each round of a defense.

        Args:
            defense: name of the defense.
            round: number of the finished round, from 1 on.
            values: measurements of the round, under the names used in the record's history.
        """

    def on_trial(self, curve: Any) -> None:
        """Called after each newly finished trial of an audit or attack of a protocol.

        Args:
            curve: a `holdfast.results.Curve`.
        """


class Tracker(Callback):
    """Logs rounds and trials to an experiment tracker that Accelerate knows.

    Use it as a context manager: the tracker is closed at the end of the block.

    Args:
        name: one of `TRACKERS`; its package must be installed.
        run_name: name of the run in the tracker.
        folder: where trackers that write files write them.

    Raises:
        HoldfastError: if the name is unknown or its package is not installed.
    """

    def __init__(self, name: str, run_name: str, folder: Path) -> None:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        if importlib.util.find_spec(name) is None:
            raise HoldfastError(f"--track {name} needs a package that is not installed: pip install {name}.")
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # trackers read from it which process writes
        options = {"experiment_name" if name == "mlflow" else "run_name": run_name}
        if name in ("tensorboard", "mlflow"):
            options["logging_dir"] = str(folder)
        self.tracker = LOGGER_TYPE_TO_CLASS[name](**options)
        if hasattr(self.tracker, "start"):  # older versions of Accelerate start trackers themselves
            self.tracker.start()
        self.trials = 0

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.tracker.finish()

    def on_round(self, defense: str, round: int, values: Mapping[str, float]) -> None:
        """See `Callback.on_round`."""
        self.tracker.log({f"{defense}/{name}": value for name, value in values.items()}, step=round)

    def on_trial(self, curve: Any) -> None:
        """Logs the score after the last budget, with the number of finished trials as step; see `Callback.on_trial`."""
        self.trials += 1
        if curve.scores[-1] is not None:
            self.tracker.log({f"{curve.role}/{curve.adversary}": curve.scores[-1]}, step=self.trials)
