"""Tables, figures and sentences: the output of studies and protocols."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


def finite(value: float | None) -> float | None:
    """Returns a number as results hold it: None if it is infinite or undefined."""
    return None if value is None or not math.isfinite(value) else float(value)


def last_known(values: Sequence[float | None]) -> float | None:
    """Returns the last number of a series; None if there is none."""
    return next((v for v in reversed(values) if v is not None), None)


class ResultModel(BaseModel):
    """A part of `result.json`: frozen, and refuses unknown fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )


class Cell(ResultModel):
    """A number in a table: mean and sample standard deviation over `n` seeds, with the paper's values, if any."""

    mean: float | None = Field(description="None where a seed gave a non-finite number or nothing was measured.")
    sd: float | None = Field(description="Sample standard deviation; None for fewer than two seeds.")
    n: int
    paper: float | None = None
    paper_sd: float | None = Field(None, description="The standard deviation that the paper prints.")

    @classmethod
    def of(cls, values: Iterable[float | None], paper: float | None = None, paper_sd: float | None = None) -> Cell:
        """Summarises one value per seed.

        Args:
            values: one number per seed; None marks a non-finite one, and makes mean and sd None.
            paper: the number that the paper prints, in the same unit.
            paper_sd: its standard deviation, if the paper prints one.

        Example:
            >>> Cell.of([0.5, 0.7])
            Cell(mean=0.6, sd=0.1414..., n=2, paper=None, paper_sd=None)
        """
        values = list(values)
        known = [] if None in values else [v for v in values if v is not None]
        mean = statistics.fmean(known) if known else None
        sd = statistics.stdev(known) if len(known) > 1 else None
        return cls(mean=mean, sd=sd, n=len(values), paper=paper, paper_sd=paper_sd)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean; None without a standard deviation."""
        return None if self.sd is None else self.sd / self.n**0.5


class Table(ResultModel):
    """A table of text cells and numeric cells, one mapping a row."""

    title: str
    rows: list[dict[str, str | Cell]]
    percent: bool = Field(False, description="Whether the cells are shares, to be shown in percent.")
    note: str = Field("", description="What the columns mean.")
    standard_error: bool = Field(False, description="Whether to show the standard error instead of `sd`.")


class Lines(ResultModel):
    """A figure of curves over a common x-axis."""

    kind: Literal["lines"] = "lines"
    title: str
    x_title: str
    y_title: str
    log_x: bool = False
    log_y: bool = False
    x: list[float]
    series: dict[str, list[float | None]]


class Map(ResultModel):
    """A figure of named matrices side by side, with common rows and columns; 0 is the neutral value."""

    kind: Literal["map"] = "map"
    title: str
    row_title: str
    column_title: str
    value_title: str
    rows: list[str]
    columns: list[str]
    panels: dict[str, list[list[float | None]]]


class Pictures(ResultModel):
    """A figure of small pictures in a grid of labelled rows."""

    kind: Literal["pictures"] = "pictures"
    title: str
    note: str = Field("", description="What is shown.")
    rows: list[str] = Field(description="Label of each row.")
    lines: int = Field(1, ge=1, description="Lines of tiles in a row.")
    across: int = Field(ge=1, description="Tiles in a line; the last line of a row may have fewer.")
    columns: list[str] = Field([], description="Label of each tile of a line; may be empty.")
    tile: tuple[int, int] = Field(description="Width and height of a tile in pixels of `png`.")
    gap: int = Field(description="Transparent pixels between two tiles.")
    png: str = Field(
        description="The whole grid as PNG, in base64. A crossed-out tile has a number that is not finite."
    )


Figure = Annotated[Lines | Map | Pictures, Field(discriminator="kind")]


@dataclass(frozen=True)
class Outcome:
    """The output of a study or a protocol: tables, figures, sentences."""

    tables: dict[str, Table]
    figures: dict[str, Figure]
    findings: list[str]

    def __add__(self, other: Outcome) -> Outcome:
        """Returns both together; for a name in both, the second counts."""
        return Outcome(self.tables | other.tables, self.figures | other.figures, self.findings + other.findings)
