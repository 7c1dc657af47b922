"""Text classification: sentences become rows of token ids once, when they are loaded, and are then arrays as others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor

from holdfast.errors import HoldfastError, unknown
from holdfast.results import TaskFacts
from holdfast.tasks.arrays import Array, ArrayTask
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
from holdfast.tasks.tokenizing import Tokenizer, Vocabulary

LENGTH = 64
"""Tokens a sentence, where a task says nothing else: enough for news with their titles, and for most sentences."""


class TextTask(ArrayTask):
    """Classification of sentences, as token ids of one length.

    A batch's x has shape (N, L) and is int64. Behind a sentence's end stands the vocabulary's padding id; models tell
    from it what to look at.

    Args:
        name: shown in reports and errors.
        x_train: token ids of shape (N, L), integers from 0 on, below the vocabulary's size.
        y_train: integer labels of shape (N,), in [0, classes).
        x_test: like `x_train`.
        y_test: like `y_train`.
        class_names: one name a class; fixes the number of classes (default: largest training label + 1).
        vocabulary: what the ids mean.

    Raises:
        HoldfastError: see `ArrayTask`; and for ids that are no integers or outside of the vocabulary.

    Example:
        >>> from holdfast.tasks.tokenizing import load_tokenizer
        >>> words = load_tokenizer("words")
        >>> x = words.encode(["so good", "so bad"], 3)
        >>> task = TextTask("toy", x, [0, 1], x, [0, 1], ["good", "bad"], vocabulary=words.vocabulary)
        >>> task.input_shape, task.num_outputs, task.vocabulary.size
        ((3,), 2, 1024)
    """

    def __init__(
        self,
        name: str,
        x_train: npt.ArrayLike,
        y_train: npt.ArrayLike,
        x_test: npt.ArrayLike,
        y_test: npt.ArrayLike,
        class_names: Sequence[str] | None = None,
        *,
        vocabulary: Vocabulary,
    ) -> None:
        self.vocabulary: Vocabulary | None = vocabulary
        super().__init__(name, x_train, y_train, x_test, y_test, class_names)

    def _inputs(self, values: npt.ArrayLike, label: str) -> Array:
        a = np.asarray(values)
        assert self.vocabulary is not None
        if a.ndim != 2 or a.dtype.kind not in "ui":
            raise self._bad(f"{label} is {a.dtype} of shape {a.shape}; expected integers of shape (N, L), token ids")
        if a.size and not 0 <= int(a.min()) <= int(a.max()) < self.vocabulary.size:
            bad = int(a.min()) if a.min() < 0 else int(a.max())
            raise self._bad(
                f"{label} holds the id {bad}; the vocabulary {self.vocabulary.name!r} has ids from 0 to "
                f"{self.vocabulary.size - 1}"
            )
        return a.astype(np.int64)

    def with_inputs(self, train: Tensor, test: Tensor) -> Self:
        """See `Task.with_inputs`; what takes the place of ids has no vocabulary."""
        task = super().with_inputs(train, test)
        task.vocabulary = None
        return task

    def facts(self) -> TaskFacts:
        """See `Task.facts`; the hash is also over the vocabulary, and the facts name the tokenizer."""
        facts = super().facts()
        if self.vocabulary is None:
            return facts
        both = hashlib.sha256(f"{facts.sha256} {self.vocabulary.sha256}".encode()).hexdigest()
        return facts.model_copy(update={"sha256": both, "tokenizer": self.vocabulary.name})


def text_task(
    name: str,
    train: tuple[Sequence[str], npt.ArrayLike],
    test: tuple[Sequence[str], npt.ArrayLike],
    class_names: Sequence[str],
    *,
    tokenizer: Tokenizer,
    length: int = LENGTH,
) -> TextTask:
    """Returns a task over sentences that are in memory.

    Args:
        name: shown in reports and errors.
        train: sentences and integer labels.
        test: likewise.
        class_names: one name a class.
        tokenizer: makes the ids.
        length: tokens a sentence; longer ones are cut off.
    """
    x_train, x_test = (tokenizer.encode(part[0], length) for part in (train, test))
    return TextTask(name, x_train, train[1], x_test, test[1], class_names, vocabulary=tokenizer.vocabulary)


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

    A column `split` fixes the split: `train` and `test`, or where there is no `test`, what is for validation (`dev`,
    `val`, ...). Without it, `test_fraction` of every class is drawn by `seed`.

    Args:
        path: the file.
        tokenizer: makes the ids.
        length: tokens a sentence; longer ones are cut off.
        text: columns with text, which are joined; by default `title`, if there is one, and `text`.
        target: column with the label; its distinct values, sorted, are the classes. By default `label`.
        test_fraction: share of the rows to test on, in (0, 1).
        seed: of the split.

    Raises:
        HoldfastError: if the file cannot be read, a column does not exist, a label is empty, or there are too many.
    """
    notes: list[str] = []
    table = _read(path, notes)
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
        notes += [f"column {unused!r} holds words of a split and was not used; call it split"] if unused else []
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


def _read(path: Path, notes: list[str]) -> pd.DataFrame:
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
