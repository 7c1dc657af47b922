"""The scores of a protocol, by setting: rows of the tables, and how scores are shown."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from holdfast.auditing.statistics import Comparison
from holdfast.experiments.immunization import ImmunizedModel
from holdfast.experiments.setting import ORIGINAL, SCRATCH, role_of
from holdfast.results import Curve, ImmunizationResult
from holdfast.results.tables import Cell, finite
from holdfast.tasks import Task

Printed = float | tuple[float, float]
"""A number of the paper, or (mean, standard deviation); see `PaperSpec`."""


class PaperSpec(BaseModel):
    """The paper's numbers for one model: accuracies in percent, errors as printed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benign: Printed | None = None
    ratio_restricted: Printed | None = Field(None, description="(i) of RIR_theta0.")
    ratio_benign: Printed | None = Field(None, description="(ii) of RIR_theta0.")
    rir: Printed | None = None
    attacks: dict[str, dict[int, Printed]] = {}


@dataclass(frozen=True)
class Measure:
    """How tables show the scores of a task: accuracies in percent, errors in their own unit.

    Curves hold the scores that an audit compares: larger is better for every kind of task. Only tables and sentences
    turn a score back into an error.

    Attributes:
        name: name of the quantity that is shown.
        scale: the error whose score is 0; None: the score itself is shown.
        guess: the predictor that makes this error.

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
        """Returns how to show the audit scores of a task."""
        if task.higher_is_better:
            return cls(task.audit_unit)
        return cls(task.error_name, task.chance, task.baseline)

    @property
    def percent(self) -> bool:
        """Whether shares are shown (larger is better), or errors (smaller is better)."""
        return self.scale is None

    def value(self, score: float | None) -> float | None:
        """Returns a score as it is shown."""
        return score if score is None or self.scale is None else (1 - score) * self.scale

    def difference(self, scores: float | None) -> float | None:
        """Returns a difference of scores as it is shown; above 0, the first model is better, also for errors."""
        return scores if scores is None or self.scale is None else scores * self.scale

    def printed(self, number: float | None) -> float | None:
        """Returns a number of the paper in the unit of `value`."""
        return number if number is None or not self.percent else round(number / 100, 12)  # 96.2 % is exactly 0.962

    def text(self, value: float | None) -> str:
        """Returns a value of `value` as text."""
        if value is None:
            return "no finite score"
        return f"{value:.1%}" if self.percent else f"{value:.3g}"

    def advantage(self, cell: Cell) -> str:
        """Returns the mean difference over seeds and its standard error as text."""
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
        setting: name of the setting.
        model: `scratch`, `original`, or the name of a defense.
        attack: name of the attack.
        covers: for `scratch`, the attacks to compare it with; else the attack itself.
        stands_for: the attacks whose numbers in the paper belong to this row.
        epochs: epochs after which the model was scored.
        steps: steps of an epoch.
        remark: why there are no curves; empty if there are.
        curves: one curve a seed.
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
        """Mean score over seeds after an epoch; None if one is not finite."""
        return mean_of(self._scores(epoch))

    def cell(self, epoch: int, measure: Measure, paper: PaperSpec | None = None) -> Cell:
        """Scores over seeds after an epoch, as they are shown, with the paper's."""
        attacks = {} if paper is None else paper.attacks
        printed = next((attacks[name][epoch] for name in self.stands_for if epoch in attacks.get(name, {})), None)
        return Cell.of(map(measure.value, self._scores(epoch)), *map(measure.printed, mean_and_sd(printed)))

    def _scores(self, epoch: int) -> list[float | None]:
        k = self.epochs.index(epoch)
        return [curve.scores[k] for curve in self.curves]


@dataclass(frozen=True)
class SettingScores:
    """The scores of one setting beside its rows.

    Attributes:
        name: name of the setting.
        restricted: name of the restricted task.
        measure: how scores on the restricted task are shown.
        benign_measure: how scores on the benign task are shown; errors have another scale there.
        chance: the score of a constant guess on the restricted task.
        original: benign score of the original; None: not finite.
        made: immunized models by label and seed of the defense.
        paper: the paper's numbers by model.
        stands_for: the paper's setting that this one replaces; None: the one of the same name.
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
        """Benign scores over seeds of a defense, as they are shown; empty for scratch, which has no benign task."""
        printed = mean_and_sd(self.paper[model].benign if model in self.paper else None)
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
        """Original's benign score minus the model's, over seeds of the defense; empty for the controls.

        For an error: by how much it rose.
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
    """Compares each model with the controls, by its best attacks at the protocol's epochs."""
    curves: dict[str, list[Curve]] = {}
    for row in rows:
        places = [row.epochs.index(e) for e in epochs]
        for curve in row.curves:
            cut = {k: [getattr(curve, k)[i] for i in places] for k in ("scores", "losses", "folds")}
            own = {"adversary": row.attack, "budgets": list(epochs), **cut}
            curves.setdefault(row.model, []).append(curve.model_copy(update=own))
    controls = curves.get(SCRATCH, []) + curves.get(ORIGINAL, [])
    return {
        model: Comparison.of(controls if model in (SCRATCH, ORIGINAL) else controls + own)
        for model, own in curves.items()
    }


def ahead_of_scratch(model: str, comparison: Comparison, measure: Measure) -> list[list[float | None]] | None:
    """Advantage over scratch of each seed at each epoch, as it is shown; None for scratch, or without it."""
    if model == SCRATCH or SCRATCH not in comparison.batteries:
        return None
    difference = comparison.scores[role_of(model)] - comparison.scores[SCRATCH]
    return [list(map(measure.difference, plain(seed))) for seed in difference]


def largest_jump(losses: Sequence[float | None]) -> float | None:
    """Returns the largest change between two consecutive values; None if no two of them are finite.

    Example:
        >>> largest_jump([0.5, 2.0, None, 9.0, 8.0])
        1.5
    """
    pairs = itertools.pairwise(losses)
    return max((abs(b - a) for a, b in pairs if a is not None and b is not None), default=None)


def first_lost(result: ImmunizationResult) -> int | None:
    """Returns the first round in which the suppression or the reinforcement loss is not finite; None: always finite."""
    both = (result.history.get(f"{name}_loss", []) for name in ("suppression", "reinforcement"))
    return min((i + 1 for losses in both for i, loss in enumerate(losses) if loss is None), default=None)


def plain(values: np.ndarray) -> list[float | None]:
    """Returns the values as a cell takes them: None for those that are not finite."""
    return [finite(v) for v in values]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Returns the mean; None without values, or if one of them is not finite."""
    return Cell.of(values).mean


def mean_and_sd(printed: Printed | None) -> tuple[float | None, float | None]:
    """Returns mean and standard deviation of a number of the paper; None: not printed."""
    return printed if isinstance(printed, tuple) else (printed, None)


def about_paper(settings: Sequence[SettingScores]) -> str:
    """Returns the part of a table's note that explains the paper's numbers; empty without them."""
    if not any(setting.paper for setting in settings):
        return ""
    instead = [f"{each.name} for its {each.stands_for}" for each in settings if each.stands_for and each.paper]
    return " Small: the paper's numbers." + (
        f" The paper's setting is another, and larger: here stands {'; '.join(instead)}." if instead else ""
    )
