"""What a protocol measured in each of its settings: rows of scores, and what is known beside them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict

from holdfast.comparison import Comparison
from holdfast.immunizing import Made
from holdfast.results import Cell, Curve, ImmunizationResult, Role

SCRATCH: Final = "scratch"
ORIGINAL: Final = "original"

Printed = float | tuple[float, float]
"""A number of the paper in percent, or (mean, standard deviation)."""


class PaperSpec(BaseModel):
    """What the paper prints of one model, in percent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benign: float | None = None
    attacks: dict[str, dict[int, Printed]] = {}


@dataclass(frozen=True)
class Row:
    """One row of the table of accuracies: one attack on one model.

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

    def cell(self, epoch: int, paper: PaperSpec | None = None) -> Cell:
        """Scores over seeds at one of the epochs, with the paper's."""
        k = self.epochs.index(epoch)
        return Cell.of((curve.scores[k] for curve in self.curves), *self._printed(epoch, paper))

    def _printed(self, epoch: int, paper: PaperSpec | None) -> tuple[float | None, float | None]:
        attacks = {} if paper is None else paper.attacks
        found = next((attacks[name][epoch] for name in self.stands_for if epoch in attacks.get(name, {})), None)
        mean, sd = found if isinstance(found, tuple) else (found, None)
        return _share(mean), _share(sd)


@dataclass(frozen=True)
class Scene:
    """What is known of one setting beside its rows.

    Attributes:
        name: of the setting.
        restricted: name of the restricted task.
        unit: what scores are.
        chance: the score of a constant guess.
        original: benign score of the original; None: not finite.
        made: immunized models by label and seed of the defense.
        paper: the paper's numbers by model.
        stands_for: the paper's setting that this one takes the place of, if it is another.
    """

    name: str
    restricted: str
    unit: str
    chance: float
    original: float | None
    made: Mapping[tuple[str, int], Made]
    paper: Mapping[str, PaperSpec]
    stands_for: str | None

    def benign(self, model: str) -> Cell:
        """Benign score of a model over seeds of its defense; empty for scratch, which has no benign task."""
        printed = _share(self.paper[model].benign) if model in self.paper else None
        own = [made.benign for (label, _), made in self.made.items() if label == model]
        return Cell.of([self.original] if model == ORIGINAL else own, printed)

    def drop(self, model: str) -> Cell:
        """What a model lost of the original's benign score, over seeds of its defense; empty for the controls."""
        own = [made.benign for (label, _), made in self.made.items() if label == model]
        known = [self.original - score for score in own if score is not None and self.original is not None]
        return Cell.of(known if len(known) == len(own) else [None])


def _share(percent: float | None) -> float | None:
    return None if percent is None else round(percent / 100, 12)  # 96.2 % is 0.962, as it is written


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


def role_of(model: str) -> Role:
    """Returns the part that a model plays in a comparison."""
    return "scratch" if model == SCRATCH else "original" if model == ORIGINAL else "immunized"


def ahead_of_scratch(model: str, comparison: Comparison) -> list[list[float | None]] | None:
    """Advantage over scratch of each seed at each epoch; None where there is none."""
    if model == SCRATCH or SCRATCH not in comparison.batteries:
        return None
    difference = comparison.scores[role_of(model)] - comparison.scores[SCRATCH]
    return [[float(v) if math.isfinite(v) else None for v in seed] for seed in difference]


def largest_jump(losses: Sequence[float | None]) -> float | None:
    """Returns the largest change between two consecutive values; None where no two are finite.

    Example:
        >>> largest_jump([0.5, 2.0, None, 9.0, 8.0])
        1.5
    """
    pairs = itertools.pairwise(losses)
    return max((abs(b - a) for a, b in pairs if a is not None and b is not None), default=None)


def first_lost(result: ImmunizationResult) -> int | None:
    """Returns the first round whose suppression loss is not finite, if there is one."""
    losses = result.history.get("suppression_loss", [])
    return next((i + 1 for i, loss in enumerate(losses) if loss is None), None)


def plain(values: np.ndarray) -> list[float | None]:
    """Returns the values as a cell takes them: None where not finite."""
    return [float(v) if math.isfinite(v) else None for v in values]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Returns the mean; None where there is no value, or one of them is not finite."""
    finite = [v for v in values if v is not None]
    return statistics.fmean(finite) if finite and len(finite) == len(values) else None
