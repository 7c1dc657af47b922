"""The codes of a verdict: its decision and its reasons, each with figures."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from holdfast.results.tables import ResultModel

Role = Literal["immunized", "original", "scratch"]

InvalidCode = Literal[
    "no-finite-score",
    "unskilled-original",
    "original-below-reported",
    "benign-not-finite",
    "benign-dropped",
    "scratch-does-not-learn",
    "no-original-advantage",
    "uncertain-original-advantage",
    "battery-lost",
    "fine-tuning-broke",
    "not-attacked",
    "critical-flag",
]
"""Causes of `invalid`; the last three count only if no adversary succeeded."""

DecisionCode = Literal["worthless", "exceeds", "unproven", "undecided", "bounded"]
"""Decisions: nothing to compare with, a successful attack, failures that prove nothing, a wide band, a bound."""

ReasonCode = Literal[InvalidCode, DecisionCode, "compared", "data-warning", "text"]
"""Every code; `text` stands for a sentence of an earlier version."""


class Reason(ResultModel):
    """One reason as a code and its figures.

    Example:
        >>> Reason.model_validate("The benign score fell.")  # as earlier versions wrote it
        Reason(code='text', measured=None, needed=None, ..., text='The benign score fell.')
    """

    code: ReasonCode
    measured: float | None = Field(None, description="Measured value; None: not finite, or not a number.")
    needed: float | None = Field(None, description="The limit for `measured`.")
    guess: float | None = Field(None, description="The score of a constant guess, if it matters.")
    reported: float | None = Field(None, description="The score that the publisher claims, if it matters.")
    low: float | None = Field(None, description="Lower end of the 95 % band around `measured`.")
    high: float | None = Field(None, description="Upper end of the band, or the highest of all bands.")
    retained: float | None = Field(None, description="Share of the original's advantage that is left.")
    budget: int | None = Field(None, description="Fine-tuning steps that the figures belong to.")
    seeds: int | None = Field(None, description="Repetitions, if their number matters.")
    members: int | None = Field(None, description="Number of adversaries, of which `names` are some.")
    names: list[str] = Field([], description="Roles, adversaries, or a red flag that the reason is about.")
    scores: dict[Role, float | None] = Field({}, description="Best of the battery on each model.")
    lost: dict[Role, tuple[int, int]] = Field(
        {}, description="Adversaries without a score, and all adversaries, by control."
    )
    text: str = Field("", description="A flag's finding and remedy, or the sentence of an earlier version.")

    @model_serializer(mode="wrap")
    def _only_own_figures(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value not in (None, [], {}, "")}

    @model_validator(mode="before")
    @classmethod
    def _sentence_of_an_earlier_version(cls, raw: Any) -> Any:
        return {"code": "text", "text": raw} if isinstance(raw, str) else raw


class ThreatModel(ResultModel):
    """The threat model of an audit, in figures."""

    battery: str
    strategies: int = Field(description="Adversaries that could start.")
    scored: int = Field(description="Adversaries with a score on any model.")
    searched: int = Field(description="Trials of the search on each model; 0: no search.")
    samples: int
    steps: int = Field(description="The largest budget.")
    seeds: int
