"""Tables: a CSV file with one target column becomes a task over standardised feature vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from holdfast.errors import HoldfastError, unknown
from holdfast.tasks.classification import ArrayTask
from holdfast.tasks.regression import RegressionTask
from holdfast.tasks.splits import draw_test_rows
from holdfast.tasks.tables import (
    check_columns,
    check_learned,
    check_size,
    labels_of,
    read_csv,
    split_column,
    split_rows,
)

Encoding = Literal["onehot", "ordinal"]

MAX_CLASSES = 100


def load_csv(
    path: Path,
    target: str | None,
    *,
    drop: Sequence[str] = (),
    encoding: Encoding = "onehot",
    bins: int | None = None,
    fill: bool = False,
    rows: int | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> ArrayTask:
    """Reads a table for classification.

    Numeric columns are standardised by the training rows; other columns become one 0/1 column a value. A column `split`
    with the words train and test (or val, valid, validation, dev) fixes the split, else `test_fraction` of every class
    is drawn by `seed`.

    Two tasks for one network leave each other's target out, with `drop`, and have the same training rows, with `split`
    or `rows`: then their inputs are the same numbers.

    Args:
        path: the file, with a header line.
        target: the column that holds the label; its distinct values, sorted, are the classes.
        drop: columns to leave out.
        encoding: see `load_csv_regression`.
        bins: number of classes of a numeric target: ranges with about equally many rows.
        fill: empty numeric cells become 0 and empty text cells a value of their own; False: they are refused.
        rows: number of first rows that are for training; all others are for testing.
        test_fraction: share of the rows to test on, in (0, 1).
        seed: of the split.

    Raises:
        HoldfastError: if the file cannot be read, a column does not exist, a cell is empty, the label looks continuous,
            or it cannot be binned.
    """
    notes: list[str] = []
    table, target = _read(path, target, notes)
    table = _without(path, table, drop, target)
    table, split = _split_off(path, table, target, rows, notes)
    if fill:
        table = _filled(table, target, notes)
    empty = table.columns[table.isna().any()]
    if len(empty):
        row = table.index[table[empty[0]].isna()][0] + 2
        remedy = "fill or drop it" if empty[0] == target else "fill or drop it, or set fill"
        raise HoldfastError(
            f"{str(path)!r}: column {empty[0]!r} has an empty cell (line {row}); {remedy}. NA and None count as empty."
        )
    y, names = _classes(path, table.pop(target), bins, notes)
    if not len(table.columns):
        raise HoldfastError(f"{str(path)!r}: there is no column beside the target {target!r} to predict it from.")
    check_columns(path, table, notes, ranked=encoding == "ordinal")
    if rows is None:
        test = _test_rows(path, split, y, test_fraction, seed, names)
    else:
        test = np.arange(len(y)) >= _check_rows(path, rows, len(y))
    if bins is None:
        check_learned(path, target, y, test, names)
    if encoding == "ordinal":
        texts = [c for c in table.columns if not pd.api.types.is_numeric_dtype(table[c])]
        table = table.assign(**{c: table[c].astype(str).rank(method="dense") for c in texts})
    numeric = table.select_dtypes("number").columns
    train = table.loc[~test, numeric]
    parts = [(table[numeric] - train.mean()) / train.std(ddof=0).replace(0, 1)]
    parts += [pd.get_dummies(table[[c]]) for c in table.columns if c not in numeric]
    values = pd.concat(parts, axis=1).astype(float).to_numpy(dtype=np.float32)
    name = path.stem if bins is None else f"{path.stem}:{target}"
    made = ArrayTask(name, values[~test], y[~test], values[test], y[test], names)
    return made.noted(f"file {path}", *notes, drawn=split is None and rows is None)


def _filled(table: pd.DataFrame, target: str, notes: list[str]) -> pd.DataFrame:
    """Gives empty cells of the columns beside the target a value."""
    filled = int(table.drop(columns=target).isna().sum().sum())
    notes += [f"{filled} empty cells were filled"] if filled else []
    texts = [c for c in table.columns if not pd.api.types.is_numeric_dtype(table[c]) and c != target]
    return table.fillna({c: "(empty)" if c in texts else 0 for c in table.columns if c != target})


def _classes(path: Path, labels: pd.Series, bins: int | None, notes: list[str]) -> tuple[np.ndarray, list[str]]:
    """Numbers of the classes, one a row, and their names."""
    if bins is not None:
        return _ranges_of(path, labels, bins)
    hint = f" and looks continuous; classification takes at most {MAX_CLASSES}. Set bins, or kind=regression."
    return labels_of(path, labels, MAX_CLASSES, hint, notes)


def _split_off(
    path: Path, table: pd.DataFrame, target: str, rows: int | None, notes: list[str]
) -> tuple[pd.DataFrame, pd.Series | None]:
    """The table without its column `split`, and which of its rows are for testing; rows of neither are left out."""
    column = split_column(path, table, target)
    if column is None:
        return table, None
    if rows is not None:
        raise HoldfastError(
            f"{str(path)!r} has a column {column!r}, and rows is {rows}; leave rows out, or drop that column "
            f"(drop={column})."
        )
    split = table.pop(column)
    train, test = split_rows(path, split, notes)
    kept = train | test
    return table[kept], pd.Series(test[kept])


def _ranges_of(path: Path, labels: pd.Series, bins: int) -> tuple[np.ndarray, list[str]]:
    if not pd.api.types.is_numeric_dtype(labels):
        raise HoldfastError(f"{str(path)!r}: target {labels.name!r} is text, and bins are of numbers; leave bins out.")
    check_size(path, labels)
    values = labels.to_numpy(dtype=np.float64)
    edges = np.quantile(values, np.arange(1, bins) / bins)
    y = np.searchsorted(edges, values)  # a value on an edge belongs to the range below
    if len(np.unique(y)) < bins:
        raise HoldfastError(
            f"{str(path)!r}: target {labels.name!r} has too many equal values for {bins} bins; expected fewer bins."
        )
    between = [f"{a:g} to {b:g}" for a, b in pairwise(edges)]
    return y, [f"up to {edges[0]:g}", *between, f"above {edges[-1]:g}"]


def _without(path: Path, table: pd.DataFrame, drop: Sequence[str], target: str) -> pd.DataFrame:
    for column in drop:
        if column not in table.columns:
            raise unknown(f"column of {path.name} to drop:", column, map(str, table.columns))
    if target in drop:
        raise HoldfastError(f"{str(path)!r}: {target!r} is the target and cannot be dropped.")
    return table.drop(columns=list(drop))


def _check_rows(path: Path, rows: int, count: int) -> int:
    if not 2 <= rows < count:
        raise HoldfastError(f"{str(path)!r}: rows is {rows}; expected 2 to {count - 1}, as it has {count} rows.")
    return rows


def load_csv_regression(
    path: Path,
    target: str | None,
    *,
    drop: Sequence[str] = (),
    encoding: Encoding = "onehot",
    rows: int | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> RegressionTask:
    """Reads a table for regression; features and target are standardised.

    Empty numeric cells become 0 before standardising, empty text cells a value of their own, as in the published
    preprocessing of the House Prices data. Constant columns become 0. A column `split` is as in `load_csv`.

    Args:
        path: the file, with a header line.
        target: the numeric column to predict.
        drop: columns to leave out.
        encoding: text columns become one 0/1 column a value ("onehot"), or one column of their sorted values' ranks
            ("ordinal"), standardised like the others.
        rows: the first so many rows are for training and all others for testing; mean and deviation are then those of
            the whole table, as in the released code of the condition-number paper. None: see `test_fraction`.
        test_fraction: share of the rows to test on, drawn by `seed`; 0: all rows are for training, and for testing too.
        seed: of the split.

    Raises:
        HoldfastError: if the file cannot be read, a column does not exist, the target is not numeric or constant, or
            there are too few rows.
    """
    notes: list[str] = []
    table, target = _read(path, target, notes)
    table = _without(path, table, drop, target)
    table, split = _split_off(path, table, target, rows, notes)
    y = table.pop(target)
    _check_regression(path, table, y)
    check_columns(path, table, notes, ranked=encoding == "ordinal")
    filled = int(table.isna().sum().sum())
    notes += [f"{filled} empty cells were filled"] if filled else []
    parts = []
    for name in table.columns:
        cells: pd.Series = table[name]
        if pd.api.types.is_numeric_dtype(cells):
            parts.append(cells.fillna(0).astype(float).to_frame())
        elif encoding == "ordinal":
            parts.append(cells.fillna("0").astype(str).rank(method="dense").to_frame())
        else:
            parts.append(pd.get_dummies(cells.fillna("(empty)").astype(str), prefix=name).astype(float))
    x = pd.concat(parts, axis=1).to_numpy(dtype=np.float64)
    values = y.to_numpy(dtype=np.float64)
    if rows is not None:
        _check_rows(path, rows, len(x))
    if split is None:
        train, test = _regression_rows(len(x), rows, test_fraction, seed)
    else:
        held = _test_rows(path, split, values, test_fraction, seed)
        train, test = np.flatnonzero(~held), np.flatnonzero(held)
    basis = slice(None) if rows is not None else train
    x = (x - x[basis].mean(0)) / _spread(x[basis])
    if len(values[basis]) < 2 or np.ptp(values[basis]) == 0:
        raise HoldfastError(
            f"{str(path)!r}: target {target!r} has no two different values to train on; there is nothing to predict."
        )
    values = (values - values[basis].mean()) / values[basis].std(ddof=1)
    made = RegressionTask(f"{path.stem}:{target}", x[train], values[train], x[test], values[test])
    notes += ["the test rows are the training rows"] if test_fraction == 0 and split is None and rows is None else []
    return made.noted(f"file {path}", *notes, drawn=split is None and rows is None)


def _check_regression(path: Path, table: pd.DataFrame, y: pd.Series) -> None:
    target = y.name
    if not len(table.columns):
        raise HoldfastError(f"{str(path)!r}: there is no column beside the target {target!r} to predict it from.")
    bad = y[y.isna()] if pd.api.types.is_numeric_dtype(y) else y[pd.to_numeric(y, errors="coerce").isna()]
    if len(bad) or not pd.api.types.is_numeric_dtype(y):
        where = ""
        if len(bad):
            where = f" (line {bad.index[0] + 2}: {'empty' if pd.isna(bad.iloc[0]) else repr(bad.iloc[0])})"
        raise HoldfastError(
            f"{str(path)!r}: target {target!r} has text or empty cells{where}; regression needs numbers."
        )
    check_size(path, y)


def _spread(x: np.ndarray) -> np.ndarray:
    spread = x.std(0, ddof=1)
    return np.where(spread > 0, spread, 1.0)


def _regression_rows(count: int, rows: int | None, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split  # slow to import, and needed here alone

    everything = np.arange(count)
    if rows is not None:
        return everything[:rows], everything[rows:]
    if fraction == 0:
        return everything, everything
    try:
        train, test = train_test_split(everything, test_size=fraction, random_state=seed)
    except ValueError as error:
        raise HoldfastError(f"A table of {count} rows cannot be split into train and test: {error}") from error
    return np.sort(train), np.sort(test)


def _read(path: Path, target: str | None, notes: list[str]) -> tuple[pd.DataFrame, str]:
    """The table, and the target column's name once it is known to exist."""
    table = read_csv(path, notes)
    if target is None:
        columns = ", ".join(map(str, table.columns[:12]))
        raise HoldfastError(
            f"{str(path)!r} needs `target`, its label column: {path.name}@target=COLUMN, or the recipe's key. "
            f"It has: {columns}."
        )
    if target not in table.columns:
        raise unknown(f"column of {path.name}", target, map(str, table.columns))
    return table, target


def _test_rows(
    path: Path, split: pd.Series | None, y: np.ndarray, fraction: float, seed: int, names: Sequence[str] | None = None
) -> np.ndarray:
    return draw_test_rows(path, y, fraction, seed, names) if split is None else split.to_numpy()
