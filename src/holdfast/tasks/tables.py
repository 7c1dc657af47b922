"""Reading tables: separators, blanks, splits, and checks of cells whose meaning is unclear."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype as is_numeric

from holdfast.errors import HoldfastError

SPLITS = {"train": ("train", "training"), "test": ("test", "testing"), "held": ("dev", "val", "valid", "validation")}
"""Words of a column `split`; without rows for testing, those for validation are used."""

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_MOSTLY = 0.9
"""Share of numbers from which a column of texts is taken for a numeric one."""

_NO_VALUE = ("?", "-", "--", ".", "*", "na", "n/a", "n.a.", "nan", "null", "none", "unknown", "missing", "(empty)")
"""Words, in lower case, for an unknown number."""

_LARGEST = 1e150
"""The squares of larger numbers, and so the deviation, are not finite."""

_UNNAMED = re.compile(r"|Unnamed: \d+")
_DATE = r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([ T].*)?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}([ T].*)?"
_COMMA = r"[+-]?\d*(,\d+)?"
_THOUSANDS = r"[+-]?\d{1,3}(,\d{3})+"


def read_csv(path: Path, notes: list[str], **options: Any) -> pd.DataFrame:
    """Reads a CSV file; blanks around names and texts are removed.

    Args:
        path: the file; cells are separated by commas, or all by semicolons, tabs or bars.
        notes: gets notes about the file.
        options: of pandas' `read_csv`.

    Raises:
        HoldfastError: if it cannot be read, is empty, or two columns have one name.
    """
    if not path.is_file():
        raise HoldfastError(f"No data at {str(path)!r}: the file does not exist.")
    options = {"encoding": "utf-8-sig", "skipinitialspace": True, "low_memory": False, **options}
    first = {**options, "header": None, "nrows": 1, "dtype": str}
    try:
        header = pd.read_csv(path, **first)
        separator = ","
        if header.shape[1] == 1:
            separator = next((s for s in _SEPARATORS if s in str(header.iloc[0, 0])), ",")
        if separator != ",":
            notes.append(f"cells are separated by {_SEPARATORS[separator]}")
            header = pd.read_csv(path, sep=separator, **first)
        table = pd.read_csv(path, sep=separator, **options)
        if separator != "," and any(_has_decimal_comma(table[c]) for c in table.columns):
            notes.append("numbers are written with a decimal comma")
            table = pd.read_csv(path, sep=separator, decimal=",", **options)
    except UnicodeError as error:
        raise HoldfastError(
            f"{str(path)!r} cannot be read as CSV, as its text is not UTF-8 ({error}); save it as UTF-8."
        ) from error
    except (ValueError, OSError) as error:
        raise HoldfastError(f"{str(path)!r} cannot be read as CSV: {' '.join(str(error).split())}.") from error
    names = [str(n).strip() for n in header.iloc[0].fillna("")]
    twice = sorted({n for n in names if n and names.count(n) > 1})
    if twice:
        raise HoldfastError(f"{str(path)!r} has two columns called {twice[0]!r}; rename or remove one.")
    if len(names) != table.shape[1] or not isinstance(table.index, pd.RangeIndex):
        raise HoldfastError(f"{str(path)!r}: its rows have more cells than its header has names; name each column.")
    return stripped(path, table, notes)


def _has_decimal_comma(cells: pd.Series) -> bool:
    """Whether texts are numbers such as 3,5; numbers such as 1,234 are ambiguous, and do not count."""
    if is_numeric(cells):
        return False
    texts = cells.dropna().astype(str).str.strip()
    with_comma = texts[texts.str.contains(",")]
    return bool(
        len(with_comma) and texts.str.fullmatch(_COMMA).all() and not with_comma.str.fullmatch(_THOUSANDS).all()
    )


def stripped(path: Path, table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Returns a table without blanks around its names and texts, without an index, and without empty columns.

    Raises:
        HoldfastError: if it has no rows, or two columns have one name.
    """
    table = table.rename(columns=lambda c: str(c).strip())
    if not len(table):
        raise HoldfastError(f"{str(path)!r} has no rows, only the names of its columns.")
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()][0]
        raise HoldfastError(f"{str(path)!r} has two columns called {twice!r}; rename or remove one.")
    changed = {}
    for column in table.columns:
        cells = table[column]
        if pd.api.types.is_object_dtype(cells) or pd.api.types.is_string_dtype(cells):
            bare = cells.map(lambda v: v.strip() if isinstance(v, str) else v)
            if not bare.equals(cells):
                changed[column] = bare.where(bare != "", np.nan)
    if changed:
        notes.append(f"blanks around texts were removed in {', '.join(map(str, changed))}")
        table = table.assign(**changed)
    unnamed = [c for c in table.columns if _UNNAMED.fullmatch(c)]
    empty = [c for c in unnamed if table[c].isna().all()]
    if empty:
        notes.append(f"{len(empty)} columns without a name and without values were left out")
    index = [c for c in unnamed if c == table.columns[0] and c not in empty and _is_index(table[c])]
    if index:
        numbers = list(range(len(table) + 1))
        counted = table[index[0]].tolist() in (numbers[:-1], numbers[1:])
        counts = "counts the rows" if counted else "looks like an index"
        notes.append(f"the first column, which has no name and {counts}, was left out")
    return table.drop(columns=[*empty, *index])


def _is_index(cells: pd.Series) -> bool:
    """Whether a column may be a data frame's index: integers in any order, or unique names."""
    return bool(pd.api.types.is_integer_dtype(cells) if is_numeric(cells) else cells.is_unique)


def check_columns(path: Path, table: pd.DataFrame, notes: list[str], *, ranked: bool = False) -> None:
    """Checks the columns of the inputs.

    Args:
        path: for messages.
        table: the inputs.
        notes: gets notes about them.
        ranked: texts become one column of ranks, not one column for each value.

    Raises:
        HoldfastError: for a column of numbers with texts in it, or with numbers that are infinite or too large; for
            texts that are words of a split, or differ in every row.
    """
    split = unused_split(table)
    if split is not None:
        raise HoldfastError(
            f"{str(path)!r}: column {split!r} holds {' and '.join(map(repr, table[split].dropna().unique()[:2]))}, the "
            "words of a split; call it split, or drop it."
        )
    constant = [str(c) for c in table.columns if table[c].nunique(dropna=False) == 1]
    if constant:
        notes.append(f"columns with the same value in all rows: {', '.join(constant)}")
    for column in table.columns:
        cells = table[column].dropna()
        if is_numeric(cells):
            check_size(path, cells)
            integers = len(cells) > 20 and pd.api.types.is_integer_dtype(cells)
            if integers and cells.is_unique and int(cells.max()) - int(cells.min()) == len(cells) - 1:
                notes.append(f"column {column!r} counts the rows and is used as an input; if it is an index, drop it")
            continue
        texts = cells.astype(str)
        _check_numbers(path, texts)
        if len(texts) > 20 and texts.nunique() == len(table) and not ranked:
            raise HoldfastError(
                f"{str(path)!r}: column {column!r} has a different text in each of its {len(texts)} rows, such as "
                f"{texts.iloc[0]!r}, and would become as many columns; leave it out (drop={column})."
            )
        if len(texts) and texts.str.fullmatch(_DATE).all():
            notes.append(f"column {column!r} holds dates, each of which is a separate value, not a point in time")
        elif len(texts) > 20 and texts.nunique() > len(texts) // 2:
            notes.append(f"column {column!r} has {texts.nunique()} different texts in {len(table)} rows")


def unused_split(table: pd.DataFrame) -> str | None:
    """Returns the name of a column that holds the words of a split; None if there is none."""
    words = [word for group in SPLITS.values() for word in group]
    for column in table.columns:
        cells = table[column].dropna()
        if is_numeric(cells):
            continue
        texts = cells.astype(str).str.lower()
        if texts.isin(words).all() and texts.nunique() > 1:
            return str(column)
    return None


def check_size(path: Path, cells: pd.Series) -> None:
    """Checks a column of numbers.

    Raises:
        HoldfastError: if a number is infinite, or so large that its square is not finite.
    """
    largest = float(np.abs(cells.dropna().to_numpy(dtype=np.float64)).max(initial=0))
    if largest == np.inf:
        raise HoldfastError(f"{str(path)!r}: column {cells.name!r} holds an infinite value; drop that row.")
    if largest > _LARGEST:
        raise HoldfastError(
            f"{str(path)!r}: column {cells.name!r} holds {largest:g}, too large to be standardised; give it another "
            "unit, or drop it."
        )


def _check_numbers(path: Path, texts: pd.Series) -> None:
    """Refuses texts that are mostly numbers, with currency signs, commas, or words for unknown values."""
    if texts.isin(["True", "False"]).all():
        return
    known = texts[~texts.str.lower().isin(_NO_VALUE)]
    bare = known.str.replace(r"^[$€£¥]\s*|\s*[%$€£¥]$|,", "", regex=True)
    if not len(known) or pd.to_numeric(bare, errors="coerce").notna().mean() < _MOSTLY:
        return
    bad = texts[pd.to_numeric(texts, errors="coerce").isna()]
    if not len(bad):
        raise HoldfastError(
            f"{str(path)!r}: column {texts.name!r} holds whole numbers of more than 64 bits, such as "
            f"{texts.iloc[0]}; give it another unit, or drop it."
        )
    raise HoldfastError(
        f"{str(path)!r}: column {texts.name!r} holds numbers, and also {bad.iloc[0]!r} (line {bad.index[0] + 2}); "
        "correct those cells (plain numbers with a decimal point; empty for unknown numbers), or drop the column."
    )


def class_names(path: Path, column: str) -> list[str] | None:
    """Returns the names of a label's values from 0 on, if Hugging Face's datasets wrote them into a `.parquet`."""
    from pyarrow.parquet import read_schema

    try:
        stored = json.loads((read_schema(path).metadata or {}).get(b"huggingface", b"{}"))
        names = stored["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return [str(n).strip() for n in names] if isinstance(names, list) else None


def named_labels(path: Path, cells: pd.Series, names: Sequence[str], notes: list[str]) -> tuple[np.ndarray, list[str]]:
    """Returns numbers of the classes, one a row, and their names, from the names in the file.

    Raises:
        HoldfastError: if a label has no name; -1 marks rows without a label.
    """
    wrong = sorted(set(cells.unique().tolist()) - set(range(len(names))), key=str)
    if wrong:
        count = int((cells == wrong[0]).sum())
        remedy = "these rows have no label; remove them" if wrong[0] == -1 else f"expected 0 to {len(names) - 1}"
        raise HoldfastError(
            f"{str(path)!r}: {count} rows have the label {wrong[0]}, and the file has names for {len(names)} labels "
            f"({', '.join(names[:8])}); {remedy}."
        )
    values, y = np.unique(cells.to_numpy(dtype=np.int64), return_inverse=True)
    absent = [name for i, name in enumerate(names) if i not in values]
    if absent:
        notes.append(f"classes without rows were left out: {', '.join(absent[:8])}")
    return y, [names[v] for v in values]


def check_learned(path: Path, target: str, y: np.ndarray, test: np.ndarray, names: Sequence[str]) -> None:
    """Checks that training rows have all labels of the test rows.

    Raises:
        HoldfastError: for a label that no training row has; the message names the most similar one.
    """
    learned = {names[i] for i in np.unique(y[~test])}
    for i in np.unique(y[test]):
        if names[i] in learned:
            continue
        is_number = names[i].removeprefix("-").replace(".", "").isdigit()
        near = [] if is_number else difflib.get_close_matches(names[i], sorted(learned), n=1, cutoff=0.6)
        remedy = f"if it means {near[0]!r}, write both alike" if near else "add some to train on, or remove those rows"
        if names[i] == "-1":
            remedy = "-1 often marks rows without a label: remove them"
        raise HoldfastError(
            f"{str(path)!r}: class {names[i]!r} of {target!r} has no training samples, and {int((y[test] == i).sum())} "
            f"test samples; {remedy}."
        )


def labels_of(path: Path, cells: pd.Series, limit: int, hint: str, notes: list[str]) -> tuple[np.ndarray, list[str]]:
    """Returns numbers of the classes, one a row, and their names: the distinct values, sorted.

    Raises:
        HoldfastError: if there are too many, or two values have the same name.
    """
    if not all(np.isscalar(v) or isinstance(v, str) for v in cells):
        raise HoldfastError(f"{str(path)!r}: target {cells.name!r} holds lists or objects; expected one label a row.")
    names = sorted(cells.unique().tolist(), key=lambda v: (isinstance(v, str), v))
    if len(names) > limit:
        raise HoldfastError(f"{str(path)!r}: target {cells.name!r} has {len(names)} distinct values{hint}")
    if names[0] == -1 and len(names) > 2:
        notes.append("-1 is a class; if it marks rows without a label, remove them")
    y = cells.map({v: i for i, v in enumerate(names)}).to_numpy(dtype=np.int64)
    return y, [str(n) for n in names]


def split_column(path: Path, table: pd.DataFrame, target: str) -> str | None:
    """Returns the name of the column `split`, in any case; None if there is none.

    Raises:
        HoldfastError: if there are two.
    """
    columns = [str(c) for c in table.columns if str(c).lower() == "split" and c != target]
    if len(columns) > 1:
        raise HoldfastError(
            f"{str(path)!r} has the columns {' and '.join(columns)}; expected one column for the split."
        )
    return columns[0] if columns else None


def split_rows(path: Path, split: pd.Series, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns which rows are for training and which for testing, by the words of a column.

    Raises:
        HoldfastError: for words that are not in `SPLITS`, or if there are no rows to train or to test on.
    """
    if split.isna().any():
        row = split.index[split.isna()][0]
        raise HoldfastError(f"{str(path)!r}: column {split.name!r} has an empty cell (line {row + 2}).")
    words = split.astype(str).str.strip().str.lower()
    wrong = sorted(set(words) - {word for group in SPLITS.values() for word in group})
    parts = {part: words.isin(group).to_numpy() for part, group in SPLITS.items()}
    tested = "test" if parts["test"].any() else "held"
    if wrong or not parts["train"].any() or not parts[tested].any():
        missing = "'train'" if not parts["train"].any() else "'test'"
        problem = f"holds {wrong[0]!r}" if wrong else f"has no {missing}"
        raise HoldfastError(
            f"{str(path)!r}: column {split.name!r} {problem}; expected train, test and perhaps "
            f"{', '.join(SPLITS['held'])}."
        )
    if tested == "held":
        tested_on = " or ".join(map(repr, sorted(words[parts["held"]].unique())))
        notes.append(f"tested on the rows whose split is {tested_on}")
    elif parts["held"].any():
        notes.append(f"{int(parts['held'].sum())} rows for validation were left out")
    return parts["train"], parts[tested]


def texts_of(path: Path, table: pd.DataFrame, columns: Sequence[str], notes: list[str]) -> np.ndarray:
    """Returns the texts of some columns, joined by blanks.

    Raises:
        HoldfastError: if a cell does not hold text.
    """
    for column in columns:
        wrong = [v for v in table[column].dropna() if not isinstance(v, str | int | float | np.number | np.bool_)]
        if wrong:
            raise HoldfastError(
                f"{str(path)!r}: column {column!r} holds {type(wrong[0]).__name__}, not text; name a column of texts "
                "with `text`."
            )
    rows = table[list(columns)].fillna("").astype(str).itertuples(index=False, name=None)
    joined = pd.Series([" ".join(row) for row in rows]).str.strip()
    empty = int((joined == "").sum())
    if empty == len(table):
        raise HoldfastError(
            f"{str(path)!r}: no row has a text in {', '.join(columns)}; name other columns with `text`."
        )
    if empty:
        notes.append(f"{empty} rows have no text at all")
    notes += [f"column {c!r} holds numbers, read as texts" for c in columns if is_numeric(table[c])]
    return np.asarray(joined.to_numpy())
