"""Regression over feature vectors: one number a sample, scored by the mean squared error."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.runtime.devices import device_of, dtype_of
from holdfast.tasks.arrays import Array
from holdfast.tasks.base import Batch, Kind, Split
from holdfast.tasks.classification import SCORE_BATCH, ArrayTask


class RegressionTask(ArrayTask):
    """Regression of one number from feature vectors.

    Standardise the targets: scores are mean squared errors, and the audit's limits are in the same unit.

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

    kind: Kind = "regression"
    higher_is_better = False

    def __init__(
        self,
        name: str,
        x_train: npt.ArrayLike,
        y_train: npt.ArrayLike,
        x_test: npt.ArrayLike,
        y_test: npt.ArrayLike,
    ) -> None:
        self.name = name
        x: dict[str, Array] = {"train": self._vectors(x_train, "x_train"), "test": self._vectors(x_test, "x_test")}
        y: dict[str, Array] = {"train": self._numbers(y_train, "y_train"), "test": self._numbers(y_test, "y_test")}
        for split, inputs in x.items():
            if len(inputs) != len(y[split]):
                raise self._bad(f"x_{split} has {len(inputs)} samples, y_{split} {len(y[split])} targets")
            if len(inputs) == 0:
                raise self._bad(f"the {split} split is empty; give it at least one sample")
        if x["train"].shape[1:] != x["test"].shape[1:]:
            raise self._bad(f"training inputs are {x['train'].shape[1:]}, test inputs {x['test'].shape[1:]}")
        if not (y["test"] - y["train"].mean()).any():
            raise self._bad("the targets are constant; there is nothing to predict")
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
        self._x, self._y = x, y
        self._resident: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        self.input_shape = tuple(x["train"].shape[1:])
        self.num_outputs = 1
        self.chance = float((y["test"] - y["train"].mean()).square().mean())

    def _by_class(self, seed: int, split: Split = "train") -> list[Tensor]:
        """All samples as one class, shuffled: halves, few-shot samples and held-out parts are of rows."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randperm(len(self._y[split]), generator=generator)]

    def targets(self, y: Tensor) -> Tensor:
        """See `Task.targets`: the values, shape (N, 1)."""
        return y[:, None].to(torch.float64)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the mean squared error over the batch."""
        return self.loss_of(model(_like(model, batch.x)), batch)

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """See `Task.loss_of`."""
        found = outputs.squeeze(-1)
        return F.mse_loss(found, batch.y.to(found.dtype))

    def score_of(self, outputs: Tensor, batch: Batch) -> float:
        """See `Task.score_of`: the mean squared error."""
        return float(self.loss_of(outputs.detach(), batch))

    @torch.no_grad()
    def outcomes(self, model: nn.Module, split: Split = "test") -> Tensor:
        """See `Task.outcomes`: squared errors."""
        training = model.training
        model.eval()
        x, y = self._on(split, device_of(model))
        parts = []
        for start in range(0, len(y), SCORE_BATCH):
            outputs = model(_like(model, x[start : start + SCORE_BATCH])).squeeze(-1)
            parts.append((outputs.to("cpu", torch.float64) - y[start : start + SCORE_BATCH].cpu()).square())
        model.train(training)
        found = torch.cat(parts)
        return found if bool(found.isfinite().all()) else torch.full_like(found, torch.nan)


def _like(model: nn.Module, values: Tensor) -> Tensor:
    return values.to(dtype_of(model))
