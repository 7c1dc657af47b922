"""The contract of a defense: a model in, an immunized model out, and a record of how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from holdfast.models import SplitModel
from holdfast.results import Event, ImmunizationResult
from holdfast.runtime.run import Run
from holdfast.tasks import Task


@dataclass
class DefenseRecord:
    """What a defense notes while it works; it becomes the result's `immunization` part."""

    history: dict[str, list[int | float | None]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    completed: bool = True
    rollbacks: int = 0


class Defense(ABC):
    """Turns a model into an immunized one.

    A subclass is a dataclass: its fields are the hyper-parameters that recipes and the command line set. It never
    imports an adversary: a defense must not train on its own examiner.
    """

    name: ClassVar[str]
    citation: ClassVar[str]

    @abstractmethod
    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, *, run: Run
    ) -> tuple[SplitModel, DefenseRecord]:
        """Immunizes a copy of a model.

        Args:
            model: left as it is.
            benign: what the model must stay good at; its training split is used.
            restricted: the defender's half of the restricted task.
            run: seed, device, folder.

        Returns:
            The immunized model and the record of how it was made.
        """

    def config(self) -> dict[str, Any]:
        """Returns every hyper-parameter, resolved."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def resolved(self, benign: Task) -> Defense:
        """Returns itself with what "auto" stands for, for the task of a model, so that results say what was done."""
        return self

    def told(self, record: DefenseRecord, original: SplitModel, immunized: SplitModel) -> ImmunizationResult:
        """Returns the record with what became of the weights, and puts it on the model as `immunization`.

        Args:
            record: of the defense.
            original: what it was given.
            immunized: what it made.
        """
        found = ImmunizationResult.model_validate(
            {
                **self.result(record).model_dump(mode="json"),  # as `result.json` will have it
                "changed": immunized.facts().sha256 != original.facts().sha256,
                "finite": all(bool(value.isfinite().all()) for value in immunized.network.state_dict().values()),
            }
        )
        immunized.immunization = found
        return found

    def result(self, record: DefenseRecord) -> ImmunizationResult:
        """Returns the record as it goes into `result.json`."""
        return ImmunizationResult(
            defense=self.name,
            config=self.config(),
            history=record.history,
            events=record.events,
            completed=record.completed,
            rollbacks=record.rollbacks,
        )
