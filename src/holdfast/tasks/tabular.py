"""CSV files with one target column become tasks over standardised feature vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype as is_numeric

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
    with the words train and test (or val, valid, validation, dev) sets the split; otherwise `test_fraction` of every
    class is drawn by `seed`.

    Two tasks for one network must drop each other's target, and have the same training rows by `split` or `rows`: then
    their inputs are the same numbers.

    Args:
        path: the file, with a header line.
        target: the label column; its distinct values, sorted, are the classes.
        drop: columns to leave out.
        encoding: see `load_csv_regression`.
        bins: number of classes of a numeric target: ranges with about equally many rows.
        fill: empty numeric cells become 0 and empty text cells a separate value; False: they are refused.
        rows: number of first rows for training; all others are for testing.
        test_fraction: share of the rows to test on, in (0, 1).
        seed: of the split.

    Raises:
        HoldfastError: if the file cannot be read, a column does not exist, a cell is empty, the label looks continuous,
            or it cannot be binned.
    """
    notes: list[str] = []
    table, target, split = _read(path, target, drop, rows, notes)
    if fill:
        table = _filled(table, target, notes)
    empty = table.columns[table.isna().any()]
    if len(empty):
        row = table.index[table[empty[0]].isna()][0] + 2
        remedy = "fill or drop it" if empty[0] == target else "fill or drop it, or set fill"
        raise HoldfastError(
            f"{str(path)!r}: column {empty[0]!r} has an empty cell (line {row}); {remedy}. NA and None count as empty."
        )
    if bins is None:
        hint = f" and looks continuous; classification takes at most {MAX_CLASSES}. Set bins, or kind=regression."
        y, names = labels_of(path, table.pop(target), MAX_CLASSES, hint, notes)
    else:
        y, names = _ranges_of(path, table.pop(target), bins)
    check_columns(path, table, notes, ranked=encoding == "ordinal")
    if rows is not None:
        test = np.arange(len(y)) >= _check_rows(path, rows, len(y))
    else:
        test = draw_test_rows(path, y, test_fraction, seed, names) if split is None else split
    if bins is None:
        check_learned(path, target, y, test, names)
    if encoding == "ordinal":
        texts = [c for c in table.columns if not is_numeric(table[c])]
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
    """Fills the empty cells of all columns except the target."""
    filled = int(table.drop(columns=target).isna().sum().sum())
    notes += [f"{filled} empty cells were filled"] if filled else []
    return table.fillna({c: 0 if is_numeric(table[c]) else "(empty)" for c in table.columns if c != target})


def _ranges_of(path: Path, labels: pd.Series, bins: int) -> tuple[np.ndarray, list[str]]:
    if not is_numeric(labels):
        raise HoldfastError(f"{str(path)!r}: target {labels.name!r} is text, and bins need numbers; leave bins out.")
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

    Empty numeric cells become 0 before standardising, empty text cells a separate value, as in the published
    preprocessing of the House Prices data. Constant columns become 0. A column `split` works as in `load_csv`.

    Args:
        path: the file, with a header line.
        target: the numeric column to predict.
        drop: columns to leave out.
        encoding: text columns become one 0/1 column a value ("onehot"), or one column of their sorted values' ranks
            ("ordinal"), standardised like the others.
        rows: number of first rows for training; all others are for testing. Mean and deviation are then those of the
            whole table, as in the released code of the condition-number paper. None: see `test_fraction`.
        test_fraction: share of the rows to test on, drawn by `seed`; 0: all rows are for training and for testing.
        seed: of the split.

    Raises:
        HoldfastError: if the file cannot be read, a column does not exist, the target is not numeric or constant, or
            there are too few rows.
    """
    notes: list[str] = []
    table, target, split = _read(path, target, drop, rows, notes)
    y = table.pop(target)
    _check_target(path, y)
    check_columns(path, table, notes, ranked=encoding == "ordinal")
    filled = int(table.isna().sum().sum())
    notes += [f"{filled} empty cells were filled"] if filled else []
    parts = []
    for name in table.columns:
        cells: pd.Series = table[name]
        if is_numeric(cells):
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
        train, test = np.flatnonzero(~split), np.flatnonzero(split)
    basis = slice(None) if rows is not None else train
    deviation = x[basis].std(0, ddof=1)
    x = (x - x[basis].mean(0)) / np.where(deviation > 0, deviation, 1.0)
    if len(values[basis]) < 2 or np.ptp(values[basis]) == 0:
        raise HoldfastError(
            f"{str(path)!r}: target {target!r} has the same value in all training rows; there is nothing to predict."
        )
    values = (values - values[basis].mean()) / values[basis].std(ddof=1)
    made = RegressionTask(f"{path.stem}:{target}", x[train], values[train], x[test], values[test])
    notes += ["the test rows are the training rows"] if test_fraction == 0 and split is None and rows is None else []
    return made.noted(f"file {path}", *notes, drawn=split is None and rows is None)


def _check_target(path: Path, y: pd.Series) -> None:
    bad = y[y.isna()] if is_numeric(y) else y[pd.to_numeric(y, errors="coerce").isna()]
    if len(bad) or not is_numeric(y):
        first = ""
        if len(bad):
            first = f" (line {bad.index[0] + 2}: {'empty' if pd.isna(bad.iloc[0]) else repr(bad.iloc[0])})"
        raise HoldfastError(
            f"{str(path)!r}: target {y.name!r} has text or empty cells{first}; regression needs numbers."
        )
    check_size(path, y)


def _regression_rows(count: int, rows: int | None, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split  # slow to import

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


def _read(
    path: Path, target: str | None, drop: Sequence[str], rows: int | None, notes: list[str]
) -> tuple[pd.DataFrame, str, np.ndarray | None]:
    """The table of inputs and target, the target's name, and which rows are for testing by a column `split`."""
    table = read_csv(path, notes)
    if target is None:
        columns = ", ".join(map(str, table.columns[:12]))
        raise HoldfastError(
            f"{str(path)!r} needs `target`, its label column: {path.name}@target=COLUMN, or the recipe's key. "
            f"It has: {columns}."
        )
    if target not in table.columns:
        raise unknown(f"column of {path.name}", target, map(str, table.columns))
    for column in drop:
        if column not in table.columns:
            raise unknown(f"column of {path.name} to drop:", column, map(str, table.columns))
    if target in drop:
        raise HoldfastError(f"{str(path)!r}: {target!r} is the target and cannot be dropped.")
    table = table.drop(columns=list(drop))
    split, test = split_column(path, table, target), None
    if split is not None and rows is not None:
        raise HoldfastError(
            f"{str(path)!r} has a column {split!r}, and rows is {rows}; leave rows out, or drop that column "
            f"(drop={split})."
        )
    if split is not None:
        train, test = split_rows(path, table.pop(split), notes)
        kept = train | test
        table, test = table[kept], test[kept]
    if len(table.columns) == 1:
        raise HoldfastError(f"{str(path)!r}: there is no column beside the target {target!r} to predict it from.")
    return table, target, test
