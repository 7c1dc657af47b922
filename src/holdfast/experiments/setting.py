"""The models and tasks of one setting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from holdfast.experiments.model_store import MadeOf
from holdfast.models import SplitModel
from holdfast.tasks import Task


@dataclass(frozen=True)
class Setting:
    """Models and tasks of one setting.

    Attributes:
        original: the model before immunization, on the CPU.
        benign: its own task.
        restricted: what it must not be fine-tuned to.
        defender_data: the defender's half.
        adversary_data: the adversary's half.
        transfer: a third, harmless task that should stay easy to learn; no defense sees it.
    """

    original: SplitModel
    benign: Task
    restricted: Task
    defender_data: Task
    adversary_data: Task
    transfer: Task | None = None

    @cached_property
    def made_of(self) -> MadeOf:
        """What any model that is immunized here depends on."""
        mean, std = (None if v is None else v.flatten().tolist() for v in (self.original.mean, self.original.std))
        return {
            "model": self.original.facts().sha256,
            "input normalisation": [mean, std],
            "benign": self.benign.facts().sha256,
            "restricted": self.defender_data.facts().sha256,
        }
