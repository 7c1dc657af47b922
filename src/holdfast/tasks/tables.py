"""Reading a table so that every cell is what its owner means: separators, blanks, splits, cells of mixed kinds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from holdfast.errors import HoldfastError

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "held": ("dev", "val", "valid", "validation"),
}
"""Words of a column `split`; rows that are held out for validation are tested on where there are none for testing."""

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_MOSTLY = 0.9
"""A column of texts of which so many are numbers is meant to be numeric."""


def read_csv(path: Path, notes: list[str], **options: Any) -> pd.DataFrame:
    """Reads a CSV file; blanks around names and texts are taken off.

    Args:
        path: the file; cells are separated by commas, or all by semicolons, tabs or bars.
        notes: gets what is to be said about it.
        options: of pandas' `read_csv`.

    Raises:
        HoldfastError: if it cannot be read, is empty, or two columns have one name.
    """
    if not path.is_file():
        raise HoldfastError(f"No data at {str(path)!r}: the file does not exist.")
    try:
        header = pd.read_csv(path, header=None, nrows=1, dtype=str, encoding="utf-8-sig")
        separator = ","
        if header.shape[1] == 1:
            found = [s for s in _SEPARATORS if s in str(header.iloc[0, 0])]
            separator = found[0] if found else ","
        if separator != ",":
            notes.append(f"cells are separated by {_SEPARATORS[separator]}")
            header = pd.read_csv(path, header=None, nrows=1, dtype=str, encoding="utf-8-sig", sep=separator)
        table = pd.read_csv(path, sep=separator, encoding="utf-8-sig", **options)
    except (ValueError, OSError) as error:
        raise HoldfastError(f"{str(path)!r} cannot be read as CSV: {error}.") from error
    names = [str(n).strip() for n in header.iloc[0].fillna("")]
    twice = sorted({n for n in names if n and names.count(n) > 1})
    if twice:
        raise HoldfastError(f"{str(path)!r} has two columns called {twice[0]!r}; rename or remove one.")
    if len(names) != table.shape[1] or not isinstance(table.index, pd.RangeIndex):
        raise HoldfastError(f"{str(path)!r}: its rows have more cells than its header has names; name each column.")
    return stripped(table, notes)


def stripped(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Returns a table without blanks around its names and texts, and without a column that counts its rows."""
    table = table.rename(columns=lambda c: str(c).strip())
    changed = {}
    for column in table.columns:
        cells = table[column]
        if pd.api.types.is_object_dtype(cells) or pd.api.types.is_string_dtype(cells):
            bare = cells.map(lambda v: v.strip() if isinstance(v, str) else v)
            if not bare.equals(cells):
                changed[column] = bare.where(bare != "", np.nan)
    if changed:
        notes.append(f"blanks around texts were taken off in {', '.join(map(str, changed))}")
        table = table.assign(**changed)
    first = table.columns[0] if len(table.columns) else ""
    if re.fullmatch(r"|Unnamed: 0", first) and _counts_rows(table[first]):
        notes.append("the first column, which has no name and counts the rows, was left out")
        table = table.drop(columns=first)
    return table


def _counts_rows(cells: pd.Series) -> bool:
    return bool(len(cells)) and cells.tolist() in (list(range(len(cells))), list(range(1, len(cells) + 1)))


def check_columns(path: Path, table: pd.DataFrame, notes: list[str]) -> None:
    """Looks at columns that are inputs.

    Raises:
        HoldfastError: for a column of numbers with a few texts in it.
    """
    for column in table.columns:
        cells = table[column].dropna()
        if pd.api.types.is_numeric_dtype(cells):
            whole = len(cells) > 20 and pd.api.types.is_integer_dtype(cells)
            if whole and cells.is_unique and int(cells.max()) - int(cells.min()) == len(cells) - 1:
                notes.append(f"column {column!r} counts the rows, and is an input; if it is an index, drop it")
            continue
        texts = cells.astype(str)
        numbers = pd.to_numeric(texts.str.replace(r"(?<=\d),(?=\d{3})", "", regex=True), errors="coerce")
        if len(texts) and not pd.api.types.is_bool_dtype(cells) and numbers.notna().mean() >= _MOSTLY:
            bad = [
                v for v, plain in zip(texts, pd.to_numeric(texts, errors="coerce").notna(), strict=True) if not plain
            ]
            if bad:
                raise HoldfastError(
                    f"{str(path)!r}: column {column!r} holds numbers, and also {bad[0]!r}; mend those cells, or drop "
                    "the column."
                )
        if len(texts) > 20 and texts.nunique() > len(texts) // 2:
            notes.append(f"column {column!r} has {texts.nunique()} different texts in {len(table)} rows")


def labels_of(path: Path, cells: pd.Series, limit: int, hint: str) -> tuple[np.ndarray, list[str]]:
    """Returns numbers of the classes, one a row, and their names: the distinct values, sorted.

    Raises:
        HoldfastError: if there are too many, or two values have the same name.
    """
    if not all(np.isscalar(v) or isinstance(v, str) for v in cells):
        raise HoldfastError(f"{str(path)!r}: target {cells.name!r} holds lists or the like; expected one label a row.")
    names = sorted(cells.unique().tolist(), key=lambda v: (isinstance(v, str), v))
    if len(names) > limit:
        raise HoldfastError(f"{str(path)!r}: target {cells.name!r} has {len(names)} distinct values{hint}")
    y = cells.map({v: i for i, v in enumerate(names)}).to_numpy(dtype=np.int64)
    return y, [str(n) for n in names]


def split_rows(path: Path, split: pd.Series, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns which rows are for training and which for testing, by the words of a column.

    Raises:
        HoldfastError: for other words than those of `SPLITS`, or if there are none to train or to test on.
    """
    words = split.astype(str).str.strip().str.lower()
    known = {word for some in SPLITS.values() for word in some}
    wrong = sorted(set(words) - known)
    parts = {part: words.isin(some).to_numpy() for part, some in SPLITS.items()}
    tested = "test" if parts["test"].any() else "held"
    if wrong or not parts["train"].any() or not parts[tested].any():
        missing = "'train'" if not parts["train"].any() else "'test'"
        held = f"holds {wrong[0]!r}" if wrong else f"has no {missing}"
        raise HoldfastError(
            f"{str(path)!r}: column 'split' {held}; expected train, test and perhaps {', '.join(SPLITS['held'])}."
        )
    if tested == "held":
        notes.append(f"tested on the rows whose split is {words[parts['held']].iloc[0]!r}")
    elif parts["held"].any():
        notes.append(f"{int(parts['held'].sum())} rows for validation were left out")
    return parts["train"], parts[tested]


def texts_of(path: Path, table: pd.DataFrame, columns: Sequence[str], notes: list[str]) -> np.ndarray:
    """Returns the texts of some columns, joined by blanks.

    Raises:
        HoldfastError: if a cell holds no text.
    """
    for column in columns:
        strange = [v for v in table[column].dropna() if not isinstance(v, str | int | float | np.number | np.bool_)]
        if strange:
            raise HoldfastError(
                f"{str(path)!r}: column {column!r} holds {type(strange[0]).__name__}, not text; name a column of texts "
                "with `text`."
            )
    joined = table[list(columns)].fillna("").astype(str).agg(" ".join, axis=1).str.strip()
    empty = int((joined == "").sum())
    if empty:
        notes.append(f"{empty} rows have no text at all")
    return np.asarray(joined.to_numpy())
