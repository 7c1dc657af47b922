"""Splits: defender's and adversary's half of a task, and test samples for sources without a test split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from holdfast.tasks.base import Task

HALVES_SEED = 0
"""Seed of the split into defender's and adversary's half. It is the same in every run, whatever the run's seed, so that
independent defenders and auditors do not share restricted training data, even if their classes differ."""


def halves(restricted: Task) -> tuple[Task, Task]:
    """Returns the defender's and the adversary's half of a restricted task's training data."""
    return restricted.halves(HALVES_SEED)


def draw_rows(
    path: Path, y: npt.ArrayLike, fraction: float, seed: int, names: Sequence[str] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draws a share of every class for testing.

    Args:
        path: for the message.
        y: labels, shape (N,).
        fraction: in (0, 1).
        seed: of the draw.
        names: of the classes, for messages; None: their labels.

    Returns:
        Indices of the training and of the test samples, in random order.

    Raises:
        HoldfastError: if a class has too few samples.
    """
    from sklearn.model_selection import train_test_split  # slow to import, and most data have a test split

    labels = np.asarray(y)
    values, counts = np.unique(labels, return_counts=True)
    if len(counts) and counts.min() < 2:
        few = int(np.argmin(counts))
        name = str(values[few]) if names is None else names[int(values[few])]
        raise HoldfastError(
            f"{str(path)!r} cannot be split into train and test: class {name!r} has 1 sample, and each class needs at "
            "least one for training and one for testing. Add samples, or leave the class out."
        )
    try:
        train, test = train_test_split(np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels)
    except ValueError as error:
        least = len(counts) / max(1, len(labels))
        remedy = f", or a test_fraction from {least:.3g} to {1 - least:.3g}" if 0 < least <= 0.5 else ""
        raise HoldfastError(
            f"{str(path)!r} cannot be split into train and test: of {len(labels)} samples in {len(counts)} classes "
            f"each class needs one on both sides, and test_fraction is {fraction:g}. Add samples{remedy}."
        ) from error
    return train, test


def draw_test_rows(
    path: Path, y: npt.ArrayLike, fraction: float, seed: int, names: Sequence[str] | None = None
) -> npt.NDArray[np.bool_]:
    """Returns which samples `draw_rows` takes for testing: shape (N,).

    Example:
        >>> int(draw_test_rows(Path("t.csv"), [0, 0, 0, 0, 1, 1, 1, 1], 0.25, seed=0).sum())
        2
    """
    test = np.zeros(len(np.asarray(y)), dtype=bool)
    test[draw_rows(path, y, fraction, seed, names)[1]] = True
    return test
