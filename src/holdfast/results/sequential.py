"""The record of a sequential audit: its looks, what each of them spent, and why it stopped."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from holdfast.results.reason_codes import DecisionCode
from holdfast.results.tables import ResultModel

Stop = Literal["decided", "budget ended", "not by seeds"]
"""Why a sequential audit stopped: the band decided, no seed was left, or more seeds cannot change the result."""


class Look(ResultModel):
    """One look of a sequential audit: the verdict of all seeds so far."""

    seeds: int = Field(description="All seeds up to this look.")
    level: float = Field(description="Spent here: the probability that the band of this look misses the truth.")
    decision: DecisionCode = Field(description="What the verdict of this look was decided by.")


class Sequential(ResultModel):
    """The looks of an audit that adds seeds until the band decides.

    Example:
        >>> looks = [Look(seeds=5, level=0.018, decision="undecided"), Look(seeds=10, level=0.013, decision="bounded")]
        >>> round(Sequential(max_seeds=20, looks=looks, stopped="decided", reported=False).level, 3)
        0.031
    """

    max_seeds: int = Field(description="The budget: seeds of the last look that was allowed.")
    looks: list[Look]
    stopped: Stop
    reported: bool = Field(
        description="Whether the first look was reported before, as an audit with a fixed number of seeds; then it "
        "has the full level, and the levels of later looks are added to it."
    )

    @property
    def level(self) -> float:
        """Level spent at all looks: the bands of all of them hold with 1 minus this."""
        return sum(look.level for look in self.looks)
