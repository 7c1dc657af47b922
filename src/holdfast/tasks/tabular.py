"""Tables: a CSV file with one label column becomes a task over standardised feature vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from holdfast.errors import HoldfastError, unknown
from holdfast.tasks.arrays import ArrayTask

MAX_CLASSES = 100


def load_csv(path: Path, target: str | None, *, test_fraction: float = 0.25, seed: int = 0) -> ArrayTask:
    """Reads a table for classification.

    Numeric columns are standardised by the training rows; other columns become one 0/1 column a value; a column
    `split` with the words train and test fixes the split, else `test_fraction` of every class is drawn by `seed`.

    Args:
        path: the file, with a header line.
        target: the column that holds the label; its distinct values, sorted, are the classes.
        test_fraction: share of the rows to test on, in (0, 1).
        seed: of the split.

    Raises:
        HoldfastError: if the file cannot be read, the column does not exist, a cell is empty, or the label looks
            continuous.
    """
    if not path.is_file():
        raise HoldfastError(f"No data at {str(path)!r}: the file does not exist.")
    try:
        table = pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise HoldfastError(f"{str(path)!r} cannot be read as CSV: {error}.") from error
    if target is None:
        columns = ", ".join(map(str, table.columns[:12]))
        raise HoldfastError(
            f"{str(path)!r} needs `target`, its label column: {path.name}@target=COLUMN, or the recipe's key. "
            f"It has: {columns}."
        )
    if target not in table.columns:
        raise unknown(f"column of {path.name}", target, map(str, table.columns))
    split = table.pop("split") if "split" in table.columns and target != "split" else None
    empty = table.columns[table.isna().any()]
    if len(empty):
        row = int(np.flatnonzero(table[empty[0]].isna())[0]) + 2
        raise HoldfastError(f"{str(path)!r}: column {empty[0]!r} has an empty cell (line {row}); fill or drop it.")
    names = sorted(table[target].unique().tolist(), key=lambda v: (isinstance(v, str), v))
    if len(names) > MAX_CLASSES:
        raise HoldfastError(
            f"{str(path)!r}: target {target!r} has {len(names)} distinct values and looks continuous; "
            f"classification takes at most {MAX_CLASSES}. Bin it first."
        )
    y = table.pop(target).map({v: i for i, v in enumerate(names)}).to_numpy()
    test = _test_rows(path, split, y, test_fraction, seed)
    numeric = table.select_dtypes("number").columns
    train = table.loc[~test, numeric]
    parts = [(table[numeric] - train.mean()) / train.std(ddof=0).replace(0, 1)]
    parts += [pd.get_dummies(table[[c]]) for c in table.columns if c not in numeric]
    x = pd.concat(parts, axis=1).astype(float)
    values = x.to_numpy(dtype=np.float32)
    return ArrayTask(path.stem, values[~test], y[~test], values[test], y[test], [str(n) for n in names])


def _test_rows(path: Path, split: pd.Series | None, y: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    if split is not None:
        wrong = sorted(set(split.astype(str)) - {"train", "test"})
        if wrong:
            raise HoldfastError(f"{str(path)!r}: column 'split' holds {wrong[0]!r}; expected train or test.")
        return (split == "test").to_numpy()
    test = np.zeros(len(y), dtype=bool)
    try:
        _, rows = train_test_split(np.arange(len(y)), test_size=fraction, random_state=seed, stratify=y)
    except ValueError as error:
        raise HoldfastError(f"{str(path)!r} cannot be split into train and test: {error}") from error
    test[rows] = True
    return test
