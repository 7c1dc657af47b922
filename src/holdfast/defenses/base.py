"""The contract of a defense: it takes a model and returns an immunized copy, with a record of the work."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from holdfast.errors import HoldfastError, unknown
from holdfast.models import SplitModel
from holdfast.results import Event, ImmunizationResult
from holdfast.runtime.run import Run
from holdfast.tasks import Task


@dataclass
class DefenseRecord:
    """What a defense records while it works; it becomes the `immunization` part of the result.

    Attributes:
        history: one value a round for each series, or None where there is none.
        events: what the defense decided by itself, such as a return to an earlier state.
        completed: False if the defense stopped early or did not reach its goal.
        rollbacks: how many times the guard went back to the last good state.
    """

    history: dict[str, list[int | float | None]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    completed: bool = True
    rollbacks: int = 0


class Defense(ABC):
    """Turns a model into an immunized one.

    A subclass is a dataclass: its fields are the hyper-parameters that recipes and the command line set. It checks
    them in `__post_init__`, after `super().__post_init__()`. It never imports an adversary: a defense must not train
    against the adversaries that audit it.
    """

    name: ClassVar[str]
    citation: ClassVar[str]

    def __post_init__(self) -> None:  # noqa: B027 -- not every defense has something to check
        """Checks the hyper-parameters; each subclass adds its own checks."""

    @abstractmethod
    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, *, run: Run
    ) -> tuple[SplitModel, DefenseRecord]:
        """Immunizes a copy of a model.

        Args:
            model: is not changed.
            benign: the task that the model must stay good at; its training split is used.
            restricted: the defender's half of the restricted task.
            run: seed, device, folder.

        Returns:
            The immunized model and the record of how it was made.
        """

    def config(self) -> dict[str, Any]:
        """Returns every hyper-parameter."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def resolved(self, benign: Task) -> Defense:
        """Returns the defense with the values that "auto" stands for on this task, so that results name them."""
        return self

    def attach_result(self, record: DefenseRecord, original: SplitModel, immunized: SplitModel) -> ImmunizationResult:
        """Returns the result of an immunization, and stores it as `immunized.immunization`.

        Args:
            record: the record that `immunize` returned.
            original: the model that it was given.
            immunized: the model that it returned.
        """
        result = ImmunizationResult.model_validate(
            {
                **self.result(record).model_dump(mode="json"),  # as `result.json` will have it
                "changed": immunized.facts().sha256 != original.facts().sha256,
                "finite": all(bool(value.isfinite().all()) for value in immunized.network.state_dict().values()),
            }
        )
        immunized.immunization = result
        return result

    def result(self, record: DefenseRecord) -> ImmunizationResult:
        """Returns the record in the form that `result.json` has."""
        return ImmunizationResult(
            defense=self.name,
            config=self.config(),
            history=record.history,
            events=record.events,
            completed=record.completed,
            rollbacks=record.rollbacks,
        )

    def refuse_without_logits(self, *tasks: Task) -> None:
        """Refuses tasks whose models do not return logits of classes."""
        if any("klu" not in task.suppression_losses for task in tasks):  # KLU is a loss of such logits
            raise HoldfastError(f"{self.name} is for classification; got {' and '.join(t.described for t in tasks)}.")

    def refuse_unknown(self, name: str, known: Collection[str]) -> None:
        """Refuses a field that is not one of the known names."""
        if getattr(self, name) not in known:
            raise unknown(name, str(getattr(self, name)), known)

    def require(self, allowed: Callable[[Any], bool], expected: str, *names: str) -> None:
        """Refuses fields whose values are not allowed, and says what was expected; None is always allowed."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not allowed(value):
                raise HoldfastError(f"{self.name}: {name} is {value}; expected {expected}.")

    def refuse_below_one(self, *names: str) -> None:
        """Refuses fields under 1; None is allowed."""
        self.require(lambda value: value >= 1, "at least 1", *names)

    def refuse_not_above_zero(self, *names: str) -> None:
        """Refuses fields that are not finite numbers above 0; None is allowed."""
        self.require(lambda value: 0 < value < math.inf, "a number above 0", *names)

    def refuse_negative(self, *names: str) -> None:
        """Refuses fields that are not finite numbers of at least 0; None is allowed."""
        self.require(lambda value: 0 <= value < math.inf, "a number of at least 0", *names)

    def refuse_no_share(self, *names: str) -> None:
        """Refuses fields that are not strictly between 0 and 1; None is allowed."""
        self.require(lambda value: 0 < value < 1, "a share between 0 and 1", *names)
