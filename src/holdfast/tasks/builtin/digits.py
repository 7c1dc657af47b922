"""scikit-learn's 8x8 digits, which come with the dependencies."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from holdfast.tasks.builtin import TASKS
from holdfast.tasks.classification import ArrayTask


@TASKS.register("digits")
def digits() -> ArrayTask:
    """Returns the 1,797 images; every fourth image of each class is for testing."""
    images, target = _read()
    x = np.round(images * (255 / 16)).astype(np.uint8)
    rank = np.zeros(len(x), dtype=int)
    for c in range(10):
        rank[target == c] = np.arange(np.sum(target == c))
    test = rank % 4 == 3
    names = [str(c) for c in range(10)]
    task = ArrayTask("digits", x[~test], target[~test], x[test], target[test], names)
    return task.noted("embedded data of scikit-learn")


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and their classes as `sklearn.datasets.load_digits` does, without a second for its import."""
    package = find_spec("sklearn")
    assert package is not None  # it is a dependency
    assert package.origin is not None
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(int)
