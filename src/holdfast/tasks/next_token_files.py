"""Files for language models: texts cut into windows, and rows of prompts with answers, become token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.errors import HoldfastError, unknown
from holdfast.tasks.next_token import IGNORED, Measure, NextTokenTask
from holdfast.tasks.next_token_rows import ANSWERS, PROMPTS, LossOn, Row, RowReader, check_language, is_missing
from holdfast.tasks.tokenizers import Tokenizer

WINDOW = 128
"""Default number of tokens that a model sees in a row."""


def windows(
    texts: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Puts texts one after the other, each with an end token, and cuts them into windows; all tokens count.

    The last token of a window is the first of the next one, so that each is predicted once.

    Args:
        texts: documents.
        tokenizer: one of transformers.
        length: tokens of a window that a model sees.

    Returns:
        Ids and targets of shape (windows, length), and how many tokens at the end are left out.
    """
    fast = tokenizer.fast
    stream: list[int] = []
    for ids in fast(list(texts), verbose=False)["input_ids"] if texts else ():
        stream.extend(ids)
        if len(texts) > 1 and fast.eos_token_id is not None and (not ids or ids[-1] != fast.eos_token_id):
            stream.append(fast.eos_token_id)
    count = max(0, len(stream) - 1) // length
    tokens = np.asarray(stream[: count * length + 1], dtype=np.int64)
    shape = (count, length)
    return tokens[:-1].reshape(shape), tokens[1:].reshape(shape), len(stream) - len(tokens)


def text_windows(
    name: str, train: Sequence[str], test: Sequence[str], *, tokenizer: Tokenizer, length: int = WINDOW
) -> NextTokenTask:
    """Returns a task over texts in memory, cut into windows.

    Args:
        name: shown in reports and errors.
        train: documents.
        test: likewise.
        tokenizer: one of transformers.
        length: tokens of a window.

    Raises:
        HoldfastError: if a split is shorter than one window.
    """
    check_language(name, tokenizer)
    parts, notes = {}, []
    for split, texts in (("train", train), ("test", test)):
        x, y, rest = windows(texts, tokenizer, length)
        if not len(x):
            raise HoldfastError(
                f"Task {name!r}: the {split} text is shorter than one window of {length} tokens; add text, or "
                "lower length."
            )
        parts[split] = x, y
        notes.append(f"{split}: {x.size} tokens in {len(x)} windows of {length}; {rest} at the end were left out")
    return NextTokenTask(name, parts["train"], parts["test"], vocabulary=tokenizer.vocabulary).noted(
        "texts in memory", *notes
    )


def load_next_token(
    path: Path,
    *,
    tokenizer: Tokenizer,
    length: int | None = None,
    text: Sequence[str] = (),
    target: str | None = None,
    measure: Measure | None = None,
    loss_on: LossOn = "answer",
    test_fraction: float = 0.25,
    seed: int = 0,
) -> NextTokenTask:
    """Reads a file for a language model: `.txt`, `.jsonl`, `.csv` or `.parquet`.

    A table with `messages` holds conversations; one with a prompt and an answer, questions; any other, texts, which are
    cut into windows. A column `split` sets the split; without it, `test_fraction` of the rows is drawn by `seed`. Of a
    single text, the last part is for testing.

    Args:
        path: the file.
        tokenizer: one of transformers.
        length: tokens that a model sees in a row; None: 128.
        text: columns of the prompt, or of the text, which are joined by blanks.
        target: column of the answer.
        measure: see `NextTokenTask`; None: `choices` if there is a column of that name, otherwise `nll`.
        loss_on: whether the answers count, or everything.
        test_fraction: share of the rows, or of a single text, to test on, in (0, 1).
        seed: of the split.

    Raises:
        HoldfastError: if the file cannot be read, a column does not exist, or a row is unusable; naming it.
    """
    size = WINDOW if length is None else length
    reader = RowReader(path, tokenizer, size, loss_on)
    if path.suffix == ".txt":
        return _of_text(path, tokenizer, size, test_fraction)
    rows, columns = read_records(path)
    drawn, tested = _test_rows(path, rows, columns, test_fraction, seed)
    asks, answers, has_choices = _columns(path, columns, text, target)
    if not answers and "messages" not in (asks or columns):
        source = asks or ["text"]
        _refuse_unknown(path, source, columns)
        for value, wanted, key in ((measure, "nll", "measure"), (loss_on, "answer", "loss_on")):
            if value not in (None, wanted):
                raise HoldfastError(f"{str(path)!r}: {key} is {value}, and texts without answers have no other.")
        said = [_document(reader, row, source, n) for n, row in enumerate(rows)]
        train, test = (
            [s for s, held in zip(said, tested, strict=True) if held == part and s] for part in (False, True)
        )
        empty = sum(not s for s in said)
        notes = [f"{empty} rows without text in {', '.join(source)} were left out"] if empty else []
        made = text_windows(path.stem, train, test, tokenizer=tokenizer, length=size)
        return made.noted(f"file {path}", *notes, drawn=drawn)
    parsed = [_row(reader, row, asks, answers, has_choices, n) for n, row in enumerate(rows)]
    task = rows_task(path.stem, reader, parsed, tested, measure or ("choices" if has_choices else "nll"))
    return task.noted(f"file {path}", drawn=drawn)


def rows_task(
    name: str, reader: RowReader, rows: Sequence[Row], tested: Sequence[bool], measure: Measure
) -> NextTokenTask:
    """Returns a task over rows of prompts with answers.

    Args:
        name: shown in reports and errors.
        reader: encodes them.
        rows: of both splits.
        tested: which of them are for testing.
        measure: see `NextTokenTask`.
    """
    whole = measure != "nll"
    parts = [
        reader.arrays([row for row, held in zip(rows, tested, strict=True) if held == part], whole=whole)
        for part in (False, True)
    ]
    train_part, test_part = _same_width(*parts)
    task = NextTokenTask(name, train_part, test_part, vocabulary=reader.tokenizer.vocabulary, measure=measure)
    counted = f"{task.tokens('train')} training and {task.tokens('test')} test tokens count"
    return task.noted("rows in memory", reader.note(), counted)


def _of_text(path: Path, tokenizer: Tokenizer, length: int, test_fraction: float) -> NextTokenTask:
    if not path.is_file():
        raise HoldfastError(f"No data at {str(path)!r}: the file does not exist.")
    try:
        whole = path.read_text(encoding="utf-8")
    except UnicodeError as error:
        raise HoldfastError(f"{str(path)!r} is not UTF-8 ({error}); save it as UTF-8.") from error
    cut = round(len(whole) * (1 - test_fraction))
    made = text_windows(path.stem, [whole[:cut]], [whole[cut:]], tokenizer=tokenizer, length=length)
    return made.noted(f"file {path}", f"tested on the last {test_fraction:.0%} of the text", drawn=True)


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the rows of a `.jsonl`, `.csv` or `.parquet` file, and the names of its columns.

    Raises:
        HoldfastError: if it cannot be read; for `.jsonl`, naming the row.
    """
    if path.suffix == ".jsonl":
        rows = _json_rows(path)
        return rows, list(dict.fromkeys(key for row in rows for key in row))
    from holdfast.tasks.text_files import read_table  # with pandas, which most tasks do not need

    table = read_table(path, [])
    records: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    return records, list(map(str, table.columns))


def _json_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise HoldfastError(f"No data at {str(path)!r}: the file does not exist.")
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeError as error:
        raise HoldfastError(f"{str(path)!r} is not UTF-8 ({error}); save it as UTF-8.") from error
    rows = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise HoldfastError(f"{str(path)!r}, row {number}: it is not JSON ({error}); one object a line.") from error
        if not isinstance(row, dict):
            raise HoldfastError(f"{str(path)!r}, row {number}: it is {line[:40]!r}; expected an object, {{...}}.")
        rows.append(row)
    if not rows:
        raise HoldfastError(f"{str(path)!r} has no rows.")
    return rows


def _test_rows(
    path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str], fraction: float, seed: int
) -> tuple[bool, list[bool]]:
    """Whether the split was drawn, and which rows are for testing; rows of a validation split are for testing too."""
    key = next((c for c in columns if c.lower() == "split"), None)
    if key is not None:
        named = [str(row.get(key)).strip().lower() for row in rows]
        wrong = [(n, name) for n, name in enumerate(named) if name not in ("train", "test", "validation", "dev", "val")]
        if wrong or len({name == "train" for name in named}) < 2:
            found = f"row {wrong[0][0]} holds {wrong[0][1]!r}" if wrong else f"all rows are {named[0]!r}"
            raise HoldfastError(f"{str(path)!r}: column {key!r}: {found}; expected train and test, each at least once.")
        return False, [name != "train" for name in named]
    count = round(len(rows) * fraction)
    if not 0 < count < len(rows):
        raise HoldfastError(
            f"{str(path)!r} has {len(rows)} rows, of which {count} would be for testing (test_fraction {fraction:g}); "
            "both splits need at least one."
        )
    held = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    return True, [n in held for n in range(len(rows))]


def _columns(
    path: Path, columns: Sequence[str], text: Sequence[str], target: str | None
) -> tuple[list[str], str | None, bool]:
    """The columns to ask by and to answer with, and whether there are choices."""
    _refuse_unknown(path, [*text, *([target] if target else [])], columns)
    if not text and target is None and "messages" in columns:
        return ["messages"], None, False
    asks = list(text) or [c for c in PROMPTS if c in columns][:1]
    answers = target or (next((c for c in ANSWERS if c in columns), None) if asks else None)
    return asks, answers, answers is not None and "choices" in columns


def _refuse_unknown(path: Path, wanted: Sequence[str], columns: Sequence[str]) -> None:
    for column in wanted:
        if column not in columns:
            raise unknown(f"column of {path.name}", column, columns)


def _row(
    reader: RowReader, row: dict[str, Any], asks: Sequence[str], answers: str | None, has_choices: bool, number: int
) -> Row:
    if answers is None:
        return reader.conversation(row.get("messages"), number)
    prompt = _joined(reader, row, asks, number)
    choices = row.get("choices") if has_choices else None
    if has_choices and choices is None:
        raise reader.bad(number, "choices is missing; expected a list of at least two")
    return reader.question(prompt, row.get(answers), choices, number, " ".join(asks))


def _document(reader: RowReader, row: dict[str, Any], columns: Sequence[str], number: int) -> str:
    """The text of a row; cells may be empty."""
    cells = [row.get(column) for column in columns]
    return " ".join(reader.text(c, number, n) for c, n in zip(cells, columns, strict=True) if not _is_empty(c))


def _is_empty(cell: Any) -> bool:
    return is_missing(cell) or (isinstance(cell, str) and not cell.strip())


def _joined(reader: RowReader, row: dict[str, Any], columns: Sequence[str], number: int) -> str:
    return " ".join(reader.text(row.get(column), number, column) for column in columns)


_Arrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _same_width(train: _Arrays, test: _Arrays) -> tuple[_Arrays, _Arrays]:
    """Both splits with the same number of choices, so that a part of one can stand in for the other."""
    width = max(train[0].shape[1], test[0].shape[1])

    def widened(arrays: _Arrays) -> _Arrays:
        missing = width - arrays[0].shape[1]
        spread = ((0, 0), (0, missing), (0, 0))
        return np.pad(arrays[0], spread), np.pad(arrays[1], spread, constant_values=IGNORED)

    return widened(train), widened(test)
