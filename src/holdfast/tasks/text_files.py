"""Tables of sentences: a `.parquet` or `.csv` file becomes a task over rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from holdfast.errors import HoldfastError, unknown
from holdfast.tasks.splits import draw_test_rows
from holdfast.tasks.tables import (
    check_learned,
    class_names,
    labels_of,
    named_labels,
    read_csv,
    split_column,
    split_rows,
    stripped,
    texts_of,
    unused_split,
)
from holdfast.tasks.tabular import MAX_CLASSES
from holdfast.tasks.text import LENGTH, TextTask, text_task
from holdfast.tasks.tokenizers import Tokenizer


def load_text(
    path: Path,
    *,
    tokenizer: Tokenizer,
    length: int = LENGTH,
    text: Sequence[str] = (),
    target: str | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> TextTask:
    """Reads a table of sentences: a `.parquet` or `.csv` file.

    A column `split` sets the split: `train` and `test`, or if there is no `test`, the rows for validation (`dev`,
    `val`, ...). Without it, `test_fraction` of every class is drawn by `seed`.

    Args:
        path: the file.
        tokenizer: makes the ids.
        length: tokens a sentence; longer sentences are cut off.
        text: columns with text, which are joined; by default `title`, if there is one, and `text`.
        target: column with the label; its distinct values, sorted, are the classes. By default `label`.
        test_fraction: share of the rows to test on, in (0, 1).
        seed: of the split.

    Raises:
        HoldfastError: if the file cannot be read, a column does not exist, a label is empty, or too many labels differ.
    """
    notes: list[str] = []
    table = read_table(path, notes)
    columns = list(text) or [c for c in ("title", "text") if c in table.columns] or ["text"]
    target = target or "label"
    for column in (*columns, target):
        if column not in table.columns:
            raise unknown(f"column of {path.name}", column, map(str, table.columns))
    test = None
    split = split_column(path, table, target)
    if split is not None and split not in columns:
        learned, held = split_rows(path, table[split], notes)
        table, test = table[learned | held], held[learned | held]
    elif split is None:
        unused = unused_split(table.drop(columns=[*columns, target]))
        notes += [f"column {unused!r} holds the words of a split and was not used; call it split"] if unused else []
    labels = table[target]
    if labels.isna().any():
        raise HoldfastError(f"{str(path)!r}: column {target!r} has {int(labels.isna().sum())} empty labels; drop them.")
    named = class_names(path, target) if path.suffix == ".parquet" else None
    if named is None:
        y, names = labels_of(path, labels, MAX_CLASSES, f"; expected at most {MAX_CLASSES}.", notes)
    else:
        y, names = named_labels(path, labels, named, notes)
    joined = texts_of(path, table, columns, notes)
    drawn = test is None
    rows = draw_test_rows(path, y, test_fraction, seed, names) if test is None else test
    check_learned(path, target, y, rows, names)
    train, tested = ((joined[part].tolist(), y[part]) for part in (~rows, rows))
    made = text_task(path.stem, train, tested, names, tokenizer=tokenizer, length=length)
    return made.noted(f"file {path}", *notes, drawn=drawn)


def read_table(path: Path, notes: list[str]) -> pd.DataFrame:
    """Reads a `.parquet` or `.csv` file; empty cells are NaN.

    Args:
        path: the file.
        notes: gets notes about the file.

    Raises:
        HoldfastError: if it cannot be read.
    """
    if path.suffix != ".parquet":  # "None" is a word, and may be a class
        return read_csv(path, notes, keep_default_na=False, na_values=[""])
    if not path.is_file():
        raise HoldfastError(f"No data at {str(path)!r}: the file does not exist.")
    try:
        table = pd.read_parquet(path)
    except ImportError as error:
        raise HoldfastError(
            f"{str(path)!r} is read by pyarrow, which is not installed: pip install 'holdfast[language]', or give a "
            ".csv file."
        ) from error
    except (ValueError, OSError) as error:
        raise HoldfastError(f"{str(path)!r} cannot be read as parquet: {' '.join(str(error).split())}.") from error
    named = any(name is not None for name in table.index.names)
    return stripped(path, table.reset_index() if named else table, notes)
