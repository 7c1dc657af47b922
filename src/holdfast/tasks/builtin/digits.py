"""scikit-learn's 8x8 digits, which come with the dependencies."""

from __future__ import annotations

import numpy as np

from holdfast.tasks.builtin import TASKS
from holdfast.tasks.classification import ArrayTask


@TASKS.register("digits")
def digits() -> ArrayTask:
    """Returns the 1,797 images; every fourth image of each class is for testing."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = np.round(raw.images * (255 / 16)).astype(np.uint8)
    rank = np.zeros(len(x), dtype=int)
    for c in range(10):
        rank[raw.target == c] = np.arange(np.sum(raw.target == c))
    test = rank % 4 == 3
    names = [str(c) for c in range(10)]
    task = ArrayTask("digits", x[~test], raw.target[~test], x[test], raw.target[test], names)
    return task.noted("embedded data of scikit-learn")
