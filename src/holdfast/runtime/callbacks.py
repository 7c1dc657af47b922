"""Callbacks: code of a user's that is told what happens while a defense or an audit runs; and experiment trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError, unknown

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


class Callback:
    """Is told what happens; override what you need. It must not change what it is given.

    Callbacks are called in the process that started the job. Rounds of a defense that runs in a worker process, as
    the immunizations of a protocol with `--executor processes`, are not reported.

    Example:
        >>> class Printer(Callback):
        ...     def on_round(self, defense, round, values):
        ...         print(defense, round, sorted(values))
        >>> Printer().on_round("sophon", 1, {"suppression_loss": 0.5})
        sophon 1 ['suppression_loss']
    """

    def on_round(self, defense: str, round: int, values: Mapping[str, float]) -> None:
        """Is called after each round of a defense.

        Args:
            defense: its name.
            round: that was finished, from 1 on.
            values: what was measured in it, by the names of the record's history.
        """

    def on_trial(self, curve: Any) -> None:
        """Is called after each trial of an audit, and each attack of a protocol, that was not finished before.

        Args:
            curve: a `holdfast.results.Curve`.
        """


class Tracker(Callback):
    """Logs rounds and trials to an experiment tracker that Accelerate knows.

    Use it as a context manager, so that everything is written in the end.

    Args:
        name: one of `TRACKERS`; its package must be installed.
        run_name: what the tracker calls the run.
        folder: where trackers that write files put them.

    Raises:
        HoldfastError: for another name, or a package that is not installed.
    """

    def __init__(self, name: str, run_name: str, folder: Path) -> None:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        if importlib.util.find_spec(name) is None:
            raise HoldfastError(f"--track {name} needs a package that is not installed: pip install {name}.")
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # trackers ask it which process writes
        place = {"tensorboard": {"logging_dir": str(folder)}, "mlflow": {"logging_dir": str(folder)}}.get(name, {})
        named = {"experiment_name": run_name} if name == "mlflow" else {"run_name": run_name}
        self.tracker = LOGGER_TYPE_TO_CLASS[name](**named, **place)
        if hasattr(self.tracker, "start"):  # older versions of Accelerate start by themselves
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
        """Logs the score after the last budget, at the number of trials that were finished; see `Callback.on_trial`."""
        self.trials += 1
        if curve.scores[-1] is not None:
            self.tracker.log({f"{curve.role}/{curve.adversary}": curve.scores[-1]}, step=self.trials)
