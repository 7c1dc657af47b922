"""Regression over feature vectors: one number a sample, scored by the mean squared error."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.runtime.devices import dtype_of
from holdfast.tasks.arrays import Array
from holdfast.tasks.base import Batch
from holdfast.tasks.in_memory import InMemoryTask


class RegressionTask(InMemoryTask):
    """Regression of one number from feature vectors.

    Standardise the targets: scores are mean squared errors, and an audit's limits have the same unit.

    Args:
        name: shown in reports and errors.
        x_train: feature vectors of shape (N, D); kept in float64 for exact spectra.
        y_train: numbers of shape (N,).
        x_test: like `x_train`.
        y_test: like `y_train`.

    Raises:
        HoldfastError: naming the array and the value, if shapes disagree, a split is empty, or data is not finite.

    Example:
        >>> task = RegressionTask("toy", np.eye(4), [0.0, 0.0, 1.0, 1.0], np.eye(4), [0.0, 0.0, 1.0, 1.0])
        >>> task.kind, task.num_outputs, task.chance  # chance: the error of always predicting the training mean
        ('regression', 1, 0.25)
    """

    kind = "regression"
    higher_is_better = False

    def __init__(
        self, name: str, x_train: npt.ArrayLike, y_train: npt.ArrayLike, x_test: npt.ArrayLike, y_test: npt.ArrayLike
    ) -> None:
        self.name = name
        x: dict[str, Array] = {"train": self._vectors(x_train, "x_train"), "test": self._vectors(x_test, "x_test")}
        y: dict[str, Array] = {"train": self._numbers(y_train, "y_train"), "test": self._numbers(y_test, "y_test")}
        self._check_lengths(x, y, "targets")
        if not (y["test"] - y["train"].mean()).any():
            raise self._bad("the targets are constant, so there is nothing to predict")
        self.class_names = ["value"]
        self._set({s: torch.from_numpy(a) for s, a in x.items()}, {s: torch.from_numpy(a) for s, a in y.items()})

    def _vectors(self, values: npt.ArrayLike, label: str) -> Array:
        self._inputs(values, label)  # for its checks
        a: Array = np.asarray(values).astype(np.float64)
        if a.ndim != 2:
            raise self._bad(f"{label} has shape {a.shape}; expected (N, D)")
        return a

    def _numbers(self, values: npt.ArrayLike, label: str) -> Array:
        a: Array = np.asarray(values).astype(np.float64)
        if a.ndim != 1:
            raise self._bad(f"{label} has shape {a.shape}; expected (N,), one number a sample")
        if not np.isfinite(a).all():
            raise self._bad(f"{label} has a value that is NaN or infinite at row {int(np.argmax(~np.isfinite(a)))}")
        return a

    def _set(self, x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
        super()._set(x, y)
        self.num_outputs = 1
        self.chance = float((y["test"] - y["train"].mean()).square().mean())

    def _entered(self, model: nn.Module, x: Tensor) -> Tensor:
        return x.to(dtype_of(model))

    def targets(self, y: Tensor) -> Tensor:
        """See `Task.targets`: the values, shape (N, 1)."""
        return y[:, None].to(torch.float64)

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """See `Task.loss_of`: the mean squared error."""
        return F.mse_loss(outputs.squeeze(-1), batch.y.to(outputs.dtype))

    def score_of(self, outputs: Tensor, batch: Batch) -> float:
        """See `Task.score_of`: the mean squared error."""
        return float(self.loss_of(outputs.detach(), batch))

    def outcomes_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns squared errors."""
        return (outputs.squeeze(-1).to("cpu", torch.float64) - batch.y.cpu()).square()
