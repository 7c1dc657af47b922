"""The interface of measurements, which a protocol takes of its models in addition to attack scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from holdfast.experiments.measurements.attack_curves import Attack, AttackContext, AttackTrial
from holdfast.experiments.setting import Setting
from holdfast.experiments.setting_scores import Row, SettingScores
from holdfast.results.tables import Outcome
from holdfast.runtime.executors import Executor
from holdfast.runtime.registry import Registry


@dataclass(frozen=True)
class Measured:
    """A protocol whose models are immunized and attacked.

    Attributes:
        context: settings, immunized models, shots, and the run.
        plan: the attacks.
        rows: rows of the table of scores, with their curves.
        trials: the trials of each row.
        scores: the scores of each setting.
        executor: where further jobs run; it does not change their results.
    """

    context: AttackContext
    plan: Sequence[Attack]
    rows: Sequence[Row]
    trials: Sequence[Sequence[AttackTrial]]
    scores: Sequence[SettingScores]
    executor: Executor


class Measurement(BaseModel, ABC):
    """A measurement; its fields are its settings in a recipe.

    A new measurement is a file in this folder, or a module of another package with an entry point of the group
    `holdfast.experiments.measurements`. A recipe lists it under `measurements`, by its registered name:

        measurements:
          my-measurement: {samples: 100}
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    after_scores: ClassVar[bool] = False
    """Whether its tables follow those of the scores."""

    def check(self, settings: Mapping[str, Setting]) -> None:
        """Refuses settings that it cannot measure, before anything is computed; models may still be untrained.

        Raises:
            HoldfastError: naming the setting.
        """

    @abstractmethod
    def measure(self, protocol: Measured) -> Outcome:
        """Returns tables, figures and sentences.

        Long computations use `holdfast.runtime.jobs.run_jobs`, with a store in the run's folder.
        """


MEASUREMENTS: Registry[type[Measurement]] = Registry("measurement", "holdfast.experiments.measurements")


def list_measurements() -> list[str]:
    """Returns the names of all measurements."""
    return list(MEASUREMENTS)
