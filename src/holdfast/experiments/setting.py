"""A setting of a protocol: an original model, its tasks, and the roles of its models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from holdfast.experiments.model_store import CacheKey
from holdfast.models import SplitModel
from holdfast.results import Role
from holdfast.tasks import Task

SCRATCH: Final = "scratch"
ORIGINAL: Final = "original"


def role_of(model: str) -> Role:
    """Returns the role of a model: `scratch` and `original` are the controls, every other model is immunized."""
    return "scratch" if model == SCRATCH else "original" if model == ORIGINAL else "immunized"


@dataclass(frozen=True)
class Setting:
    """Model and tasks of one setting.

    Attributes:
        original: the model before immunization, on the CPU.
        benign: its own task.
        restricted: the task that it must not be fine-tuned to.
        defender_data: the defender's half of the restricted task.
        adversary_data: the adversary's half.
        transfer: a harmless task that should stay easy to learn; no defense sees it.
    """

    original: SplitModel
    benign: Task
    restricted: Task
    defender_data: Task
    adversary_data: Task
    transfer: Task | None = None

    @property
    def transfer_task(self) -> Task:
        """The transfer task of a setting that has one."""
        assert self.transfer is not None
        return self.transfer

    @cached_property
    def cache_key(self) -> CacheKey:
        """Everything in the setting that an immunized model depends on."""
        mean, std = (None if v is None else v.flatten().tolist() for v in (self.original.mean, self.original.std))
        return {
            "model": self.original.facts().sha256,
            "input normalisation": [mean, std],
            "benign": self.benign.facts().sha256,
            "restricted": self.defender_data.facts().sha256,
        }
