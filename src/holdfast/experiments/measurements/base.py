"""The contract of a measurement: what a protocol measures on its models beside the tables of attack scores."""

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
        rows: of the table of scores, with their curves.
        trials: behind each row.
        scores: what is known of each setting beside its rows.
        executor: where further jobs run; it does not change their results.
    """

    context: AttackContext
    plan: Sequence[Attack]
    rows: Sequence[Row]
    trials: Sequence[Sequence[AttackTrial]]
    scores: Sequence[SettingScores]
    executor: Executor


class Measurement(BaseModel, ABC):
    """A measurement; its fields are its settings, as a recipe writes them.

    A new one is a file in this folder, or a module of another package that an entry point of the group
    `holdfast.experiments.measurements` names. A recipe asks for it under `measurements`, by the name under which it is
    registered:

        measurements:
          my-measurement: {samples: 100}
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    after_scores: ClassVar[bool] = False
    """Whether its tables stand below those of the scores."""

    def check(self, settings: Mapping[str, Setting]) -> None:
        """Refuses settings that it cannot measure, before any work is done; models may still be untrained.

        Raises:
            HoldfastError: naming the setting.
        """

    @abstractmethod
    def measure(self, protocol: Measured) -> Outcome:
        """Returns tables, figures and sentences.

        What takes long goes through `holdfast.runtime.jobs.run_jobs`, with a store in the run's folder.
        """


MEASUREMENTS: Registry[type[Measurement]] = Registry("measurement", "holdfast.experiments.measurements")


def list_measurements() -> list[str]:
    """Returns the names of all measurements that a protocol can ask for."""
    return list(MEASUREMENTS)
