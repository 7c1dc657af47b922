"""What a protocol measured in each of its settings: rows of scores, and what is known beside them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from holdfast.auditing.statistics import Comparison
from holdfast.experiments.immunization import ImmunizedModel
from holdfast.experiments.setting import ORIGINAL, SCRATCH, role_of
from holdfast.results import Curve, ImmunizationResult
from holdfast.results.tables import Cell
from holdfast.tasks import Task

Printed = float | tuple[float, float]
"""A number of the paper, or (mean, standard deviation); see `PaperSpec`."""


class PaperSpec(BaseModel):
    """What the paper prints of one model: accuracies in percent, errors as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benign: Printed | None = None
    ratio_restricted: Printed | None = Field(None, description="(i) of RIR_theta0.")
    ratio_benign: Printed | None = Field(None, description="(ii) of RIR_theta0.")
    rir: Printed | None = None
    attacks: dict[str, dict[int, Printed]] = {}


@dataclass(frozen=True)
class Measure:
    """How people are shown the scores of a task: accuracies in percent, errors in their own unit.

    Curves hold what an audit compares, of which larger is better. An error is turned back only where it is shown, so
    that models are compared in the same way on every kind of task.

    Attributes:
        name: what is shown.
        scale: the error whose score is 0; None: not an error, the score itself is shown.
        guess: whose error that is.

    Example:
        >>> error = Measure("mean squared error", scale=0.08)
        >>> error.value(0.75), error.difference(0.25), error.text(0.041234)
        (0.02, 0.02, '0.0412')
        >>> accuracy = Measure("accuracy")
        >>> accuracy.value(0.75), accuracy.difference(0.25), accuracy.text(0.75)
        (0.75, 0.25, '75.0%')
    """

    name: str
    scale: float | None = None
    guess: str = "a constant guess"

    @classmethod
    def of(cls, task: Task) -> Measure:
        """Returns how the audit scores of a task are shown."""
        if task.higher_is_better:
            return cls(task.audit_unit)
        return cls("mean squared error", task.chance, task.baseline)

    @property
    def percent(self) -> bool:
        """Whether shares are shown, of which larger is better; else errors, of which smaller is better."""
        return self.scale is None

    def value(self, score: float | None) -> float | None:
        """Returns what is shown of a score."""
        return score if score is None or self.scale is None else (1 - score) * self.scale

    def difference(self, scores: float | None) -> float | None:
        """Returns what is shown of a difference of scores; above 0 the first is the better one, of errors as well."""
        return scores if scores is None or self.scale is None else scores * self.scale

    def printed(self, number: float | None) -> float | None:
        """Returns a number of the paper in the unit of `value`."""
        if number is None or not self.percent:
            return number
        return round(number / 100, 12)  # 96.2 % is 0.962, as it is written

    def text(self, value: float | None) -> str:
        """Returns in words what is shown of a score."""
        if value is None:
            return "no finite score"
        return f"{value:.1%}" if self.percent else f"{value:.3g}"

    def advantage(self, cell: Cell) -> str:
        """Returns in words what is shown of differences over seeds, with their standard error."""
        if cell.mean is None:
            return "a number of points that is not finite" if self.percent else "an advantage that is not finite"
        error = cell.standard_error
        if self.percent:
            return f"{100 * cell.mean:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " points"
        return f"an advantage of {cell.mean:+.3g}" + ("" if error is None else f" ± {error:.2g}")


@dataclass(frozen=True)
class Row:
    """One row of the table of scores: one attack on one model.

    Attributes:
        setting: where.
        model: `scratch`, `original`, or the name of a defense.
        attack: the attack's name.
        covers: attacks that it is compared with, where the model is `scratch`; else the attack itself.
        stands_for: names under which the paper's numbers are found.
        epochs: at which it was scored.
        steps: of an epoch.
        remark: why there are no curves, if there are none.
        curves: one a seed.
    """

    setting: str
    model: str
    attack: str
    covers: tuple[str, ...]
    stands_for: tuple[str, ...]
    epochs: tuple[int, ...]
    steps: int
    remark: str = ""
    curves: tuple[Curve, ...] = ()

    def score(self, epoch: int) -> float | None:
        """Mean score over seeds at one of the epochs; None where one is not finite."""
        return mean_of(self._scores(epoch))

    def cell(self, epoch: int, measure: Measure, paper: PaperSpec | None = None) -> Cell:
        """What is shown of the scores over seeds at one of the epochs, with the paper's."""
        attacks = {} if paper is None else paper.attacks
        found = next((attacks[name][epoch] for name in self.stands_for if epoch in attacks.get(name, {})), None)
        printed = found if isinstance(found, tuple) else (found, None)
        return Cell.of(map(measure.value, self._scores(epoch)), *map(measure.printed, printed))

    def _scores(self, epoch: int) -> list[float | None]:
        k = self.epochs.index(epoch)
        return [curve.scores[k] for curve in self.curves]


@dataclass(frozen=True)
class SettingScores:
    """What is known of one setting beside its rows.

    Attributes:
        name: of the setting.
        restricted: name of the restricted task.
        measure: how scores on the restricted task are shown.
        benign_measure: how those on the benign task are shown; an error has another scale there.
        chance: the score of a constant guess on the restricted task.
        original: benign score of the original; None: not finite.
        made: immunized models by label and seed of the defense.
        paper: the paper's numbers by model.
        stands_for: the paper's setting that this one takes the place of, if it is another.
    """

    name: str
    restricted: str
    measure: Measure
    benign_measure: Measure
    chance: float
    original: float | None
    made: Mapping[tuple[str, int], ImmunizedModel]
    paper: Mapping[str, PaperSpec]
    stands_for: str | None

    def benign(self, model: str) -> Cell:
        """Benign score of a model over seeds of its defense, as shown; none for scratch, which has no benign task."""
        found = self.paper[model].benign if model in self.paper else None
        printed = found if isinstance(found, tuple) else (found, None)
        scores = [self.original] if model == ORIGINAL else self._scores(model)
        return Cell.of(map(self.benign_measure.value, scores), *map(self.benign_measure.printed, printed))

    @property
    def labels(self) -> list[str]:
        """The defenses, in order."""
        return list(dict.fromkeys(label for label, _ in self.made))

    def defense(self, label: str) -> str | None:
        """Returns the name of the defense behind a row; None for the controls."""
        return next((made.result.defense for (own, _), made in self.made.items() if own == label), None)

    def lost(self, model: str) -> Cell:
        """What a model lost of the original's benign score, over seeds of its defense; empty for the controls.

        Of an error, by how much it rose.
        """
        own = self._scores(model)
        known = [self.original - score for score in own if score is not None and self.original is not None]
        return Cell.of(map(self.benign_measure.difference, known if len(known) == len(own) else [None]))

    def lost_by(self, made: ImmunizedModel) -> Cell:
        """What one immunized model lost of the original's benign score; of an error, by how much it rose."""
        known = None if made.benign is None or self.original is None else self.original - made.benign
        return Cell.of([self.benign_measure.difference(known)])

    def _scores(self, model: str) -> list[float | None]:
        return [made.benign for (label, _), made in self.made.items() if label == model]


def compare(rows: Sequence[Row], epochs: Sequence[int]) -> dict[str, Comparison]:
    """Each model's best attacks, beside those from scratch and on the original, at the protocol's epochs."""
    curves: dict[str, list[Curve]] = {}
    for row in rows:
        kept = [row.epochs.index(e) for e in epochs]
        for curve in row.curves:
            cut = {k: [getattr(curve, k)[i] for i in kept] for k in ("scores", "losses", "folds")}
            named = {"adversary": row.attack, "budgets": list(epochs), **cut}
            curves.setdefault(row.model, []).append(curve.model_copy(update=named))
    controls = curves.get(SCRATCH, []) + curves.get(ORIGINAL, [])
    return {
        model: Comparison.of(controls if model in (SCRATCH, ORIGINAL) else controls + own)
        for model, own in curves.items()
    }


def ahead_of_scratch(model: str, comparison: Comparison, measure: Measure) -> list[list[float | None]] | None:
    """Advantage over scratch of each seed at each epoch, as it is shown; None where there is none."""
    if model == SCRATCH or SCRATCH not in comparison.batteries:
        return None
    difference = comparison.scores[role_of(model)] - comparison.scores[SCRATCH]
    return [list(map(measure.difference, plain(seed))) for seed in difference]


def largest_jump(losses: Sequence[float | None]) -> float | None:
    """Returns the largest change between two consecutive values; None where no two are finite.

    Example:
        >>> largest_jump([0.5, 2.0, None, 9.0, 8.0])
        1.5
    """
    pairs = itertools.pairwise(losses)
    return max((abs(b - a) for a, b in pairs if a is not None and b is not None), default=None)


def first_lost(result: ImmunizationResult) -> int | None:
    """Returns the first round in which a loss is not finite, if there is one; suppression may ruin the other one."""
    both = (result.history.get(f"{which}_loss", []) for which in ("suppression", "reinforcement"))
    return min((i + 1 for losses in both for i, loss in enumerate(losses) if loss is None), default=None)


def plain(values: np.ndarray) -> list[float | None]:
    """Returns the values as a cell takes them: None where not finite."""
    return [float(v) if math.isfinite(v) else None for v in values]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Returns the mean; None where there is no value, or one of them is not finite."""
    finite = [v for v in values if v is not None]
    return statistics.fmean(finite) if finite and len(finite) == len(values) else None


def about_paper(settings: Sequence[SettingScores]) -> str:
    """Returns what a note says of the paper's numbers beside ours; nothing where there are none."""
    if not any(setting.paper for setting in settings):
        return ""
    instead = [
        f"{setting.name} for its {setting.stands_for}" for setting in settings if setting.stands_for and setting.paper
    ]
    return " Small: what the paper prints." + (
        f" The paper's setting is another, and larger: here stands {'; '.join(instead)}." if instead else ""
    )
