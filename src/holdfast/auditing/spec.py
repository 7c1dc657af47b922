"""The settings of an audit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from holdfast.adversaries import Adversary, Search, battery, battery_config, battery_name, trained_with
from holdfast.auditing.sequential import DEFAULT_BUDGET
from holdfast.results import Thresholds
from holdfast.training import Precision


class AuditSpec(BaseModel):
    """Settings of an audit, as in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    battery: str | tuple[Adversary, ...] = Field(
        "quick-v1", description="Name of the battery; from Python also the adversaries themselves."
    )
    budgets: tuple[int, ...] = Field((0, 5, 10, 20, 50, 100), description="Fine-tuning steps at which to score.")
    seeds: int = Field(5, ge=1, description="Repetitions, each with other samples, batches and fresh weights.")
    decide: bool = Field(False, description="Whether to add seeds in stages until the band decides the verdict.")
    max_seeds: int | None = Field(
        None, ge=1, description="Most seeds with `decide`; null: four times `seeds`. Without it, not allowed."
    )
    trials: int = Field(48, ge=1, description="Trials of a search per model; other batteries ignore it.")
    shots: int | None = Field(None, ge=1, description="Adversary's training samples per class; null: its whole half.")
    reported: float | None = Field(
        None, ge=0, le=1, description="The restricted score after the last budget that the model's publisher claims."
    )
    reported_benign: float | None = Field(
        None,
        le=1,
        description="The benign score of the original that its publisher claims; far below it, the audit is invalid.",
    )
    side_effects: bool = Field(True, description="Whether to measure how well harmless tasks are still learned.")
    stacked: bool = Field(True, description="Train adversaries of small models together; curves agree up to rounding.")
    measures: tuple[str, ...] = Field(
        (),
        description="Further measures of language models, before and after the best attack: lm-eval:TASK, a task of "
        "lm-evaluation-harness, or lm-eval:FILE.yaml.",
    )
    precision: Precision = Field("float32", description="Of the adversaries' training; bf16 is torch.autocast.")
    micro_batch: int = Field(0, ge=0, description="Samples at once in their training; 0: whole batches.")
    thresholds: Thresholds = Thresholds()

    @field_validator("battery")
    @classmethod
    def _known(cls, value: str | tuple[Adversary, ...]) -> str | tuple[Adversary, ...]:
        battery(value)
        return value

    @field_serializer("battery")
    def _battery_settings(self, value: str | tuple[Adversary, ...]) -> Any:
        return value if isinstance(value, str) else battery_config(value)

    @property
    def battery_name(self) -> str:
        """Name of the battery in results."""
        return battery_name(self.battery)

    def plan(self) -> Search | tuple[Adversary, ...]:
        """Returns the battery, whose adversaries train as `precision` and `micro_batch` say."""
        plan = battery(self.battery)
        if not self.training:
            return plan
        if isinstance(plan, Search):
            made = plan.make
            return replace(plan, make=lambda params: trained_with(made(params), self.precision, self.micro_batch))
        return tuple(trained_with(a, self.precision, self.micro_batch) for a in plan)

    @property
    def training(self) -> dict[str, Any]:
        """How adversaries train, as far as it is not the default."""
        return {k: v for k in ("precision", "micro_batch") if (v := getattr(self, k)) not in ("float32", 0)}

    @field_validator("budgets")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) < 2 or value[0] != 0 or any(a >= b for a, b in pairwise(value)):
            raise ValueError(f"budgets are {list(value)}; expected at least two, ascending, the first 0")
        return value

    @model_validator(mode="after")
    def _stages(self) -> Self:
        if self.max_seeds is not None and not self.decide:
            raise ValueError(f"max_seeds is {self.max_seeds}, and decide is off; turn it on, or leave max_seeds out")
        if self.decide and self.seeds < 2:
            raise ValueError(f"seeds is {self.seeds}, and the first look of decide needs 2: one seed shows no spread")
        if self.most_seeds < self.seeds:
            raise ValueError(f"max_seeds is {self.max_seeds}, less than seeds ({self.seeds}), the seeds to begin with")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out `decide` while it is off, so that folders of earlier versions are continued."""
        return {k: v for k, v in handler(self).items() if self.decide or k not in ("decide", "max_seeds")}

    @property
    def most_seeds(self) -> int:
        """Seeds of the last look that is allowed."""
        return self.max_seeds or (DEFAULT_BUDGET * self.seeds if self.decide else self.seeds)
