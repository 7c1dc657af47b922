"""LEACE: the smallest change of the features after which linear probes cannot predict the restricted labels.

Least-squares concept erasure (Belrose et al., *LEACE: Perfect linear concept erasure in closed form*, NeurIPS 2023,
Theorem 4.3) is the standard defense against linear probes. Let features x have mean mu and covariance Sigma, and their
cross-covariance with labels z be Sigma_xz. Among all affine maps r with Cov(r(x), z) = 0, after which no linear probe
does better than a constant,

    r(x) = x - W^+ P W (x - mu),   W = (Sigma^(1/2))^+,   P: orthogonal projection onto the columns of W Sigma_xz

has the least E |r(x) - x|^2, in every norm. With the centred features as U S V', and Q an orthonormal basis of the
columns of U'z (z centred; at most C - 1 for C classes), a row x becomes x - (x - mu) V S^-1 Q Q' S V'.

This holds for the samples that it was fitted on; on others, such as an adversary's, probes may still find something.
The map is a layer before the head: an adversary that removes it has the original's features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.defenses.base import Defense, DefenseRecord
from holdfast.defenses.registry import register_defense
from holdfast.models import SplitModel, check_feature_width, check_fits, feature_precision, features
from holdfast.results import Event
from holdfast.runtime.run import Run
from holdfast.spectral.condition_numbers import EPS
from holdfast.spectral.least_squares import LeastSquares
from holdfast.tasks import Task

LOST = 1e-10
"""Correlations of features and labels below this, on a scale up to 1, are rounding errors."""


@dataclass(frozen=True)
class Eraser:
    """The affine map z -> z projection + shift.

    Attributes:
        projection: shape (D, D), float64, idempotent.
        shift: shape (D,), float64; keeps the mean.
        rank: number of erased directions.
    """

    projection: Tensor
    shift: Tensor
    rank: int

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, *, precision: float = EPS) -> Eraser:
        """Returns the map after which no linear probe explains anything of y.

        Args:
            x: features, shape (N, D).
            y: targets of a least-squares probe (one-hot labels, or values), shape (N, C).
            precision: of the arithmetic that x came from; see `LeastSquares`.

        Raises:
            HoldfastError: if shapes disagree, there is no sample, or a value is not finite.

        Example:
            >>> x = torch.tensor([[0.0, 1.0], [0.0, 3.0], [2.0, 1.0], [2.0, 3.0]])
            >>> Eraser.fit(x, x[:, :1]).projection.round(decimals=9).abs().tolist()
            [[0.0, 0.0], [0.0, 1.0]]
        """
        x, y = x.to(torch.float64), y.to(torch.float64).reshape(len(y), -1)
        mean = x.mean(0)
        problem = LeastSquares.of(x - mean, y - y.mean(0), precision=precision)
        u, s, v = problem.svd
        directions, correlations, _ = torch.linalg.svd(u.T @ problem.target, full_matrices=False)
        energy = (y - y.mean(0)).norm().item()
        q = directions[:, correlations > LOST * energy] if energy else directions[:, :0]
        removed = ((v / s) @ q) @ ((v * s) @ q).T
        identity = torch.eye(x.shape[1]).to(removed)
        return cls(identity - removed, mean @ removed, q.shape[1])


@register_defense
@dataclass
class LEACE(Defense):
    """Erases the restricted labels from a network's features; see the top of this file. Nothing is random.

    Attributes:
        keep_benign: refit the head to its earlier outputs, by least squares on the benign training data; otherwise the
            head does not change, and benign outputs lose everything that was erased.
    """

    name: ClassVar[str] = "leace"
    citation: ClassVar[str] = "Belrose et al., LEACE: Perfect linear concept erasure in closed form, NeurIPS 2023"

    keep_benign: bool = True

    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, *, run: Run
    ) -> tuple[SplitModel, DefenseRecord]:
        """Puts the eraser before the head of a copy of the model; see `Defense.immunize`.

        Raises:
            HoldfastError: if model and tasks do not fit.
        """
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
        check_feature_width(model, benign)
        immunized = model.clone().to(run.device).eval()
        precision = feature_precision(immunized, restricted)
        eraser = Eraser.fit(*features(immunized, restricted, "train"), precision=precision)
        x, _ = features(immunized, benign, "train")
        before = _outputs(immunized, x)
        immunized.insert_eraser(eraser.projection, eraser.shift)
        erased = x @ eraser.projection + eraser.shift
        if self.keep_benign:
            _refit(immunized, erased, before, feature_precision(model, benign))
        change = float((_outputs(immunized, erased) - before).norm() / before.norm())
        message = (
            f"{eraser.rank} of {x.shape[1]} directions of the features were erased; benign outputs changed by "
            f"{change:.1%} of their size"
        )
        history: dict[str, list[int | float | None]] = {"erased": [eraser.rank], "output_change": [change]}
        return immunized, DefenseRecord(history=history, events=[Event(iteration=0, message=message)])


def _outputs(model: SplitModel, x: Tensor) -> Tensor:
    head = model.head
    with torch.no_grad():
        outputs = x @ head.weight.flatten(1).to(x).T
        return outputs if head.bias is None else outputs + head.bias.to(x)


def _refit(model: SplitModel, x: Tensor, outputs: Tensor, precision: float) -> None:
    """Sets the head to the least-squares fit of the outputs by the erased features, of least norm if not unique."""
    head = model.head
    centre = torch.zeros_like(x[0]) if head.bias is None else x.mean(0)
    level = torch.zeros_like(outputs[0]) if head.bias is None else outputs.mean(0)
    # `precision` excludes directions that are only rounding errors: they would get very large weights.
    problem = LeastSquares.of(x - centre, outputs - level, precision=precision)
    u, s, v = problem.svd
    weight = v @ ((u.T @ problem.target) / s[:, None])
    with torch.no_grad():
        head.weight.copy_(weight.T.reshape_as(head.weight))
        if head.bias is not None:
            head.bias.copy_(level - centre @ weight)
