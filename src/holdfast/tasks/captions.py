"""Images with a caption each: a folder with a list of its images, or a `.parquet` file that holds them.

The folder is that of Hugging Face's `imagefolder`: `metadata.csv` (or `.jsonl`, `.parquet`) has the columns
`file_name`, relative to its own folder, and `text`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from holdfast.errors import HoldfastError, unknown
from holdfast.tasks.caption_sources import METADATA, image_columns
from holdfast.tasks.image_files import Opener, Stored, stack, suffixes
from holdfast.tasks.image_folder import below, split_folders
from holdfast.tasks.next_token_files import read_records
from holdfast.tasks.splits import draw_test_rows
from holdfast.tasks.tables import SPLITS, class_names, named_labels, read_csv, split_column, split_rows
from holdfast.tasks.text_files import read_table
from holdfast.tasks.text_to_image import TextToImageTask

FILE: Final = "file_name"
"""Column with the path of an image."""

TEXT: Final = "text"
GUESSED: Final = ("caption", "prompt")
"""Columns that are taken for the captions where there is no `text`, if the file has only one of them."""


@dataclass(frozen=True)
class Captioned:
    """An image and its caption."""

    image: Path | Stored
    caption: str


def load_captions(
    path: Path,
    *,
    make: Callable[..., TextToImageTask] = TextToImageTask,
    text: Sequence[str] = (),
    image_size: int | None = None,
    channels: int | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
    limits: tuple[int | None, int | None] = (None, None),
) -> TextToImageTask:
    """Reads images with captions into memory.

    The split is that of two folders (`train` and `test`, each with its list), of a column `split`, or of a list whose
    files are all in such folders. Without any, `test_fraction` of the images is drawn by `seed`. The distinct captions,
    sorted, become the task's `class_names`.

    Args:
        path: a folder with `metadata.csv`, `.jsonl` or `.parquet`, or a `.parquet` file with a column of images.
        make: the task, of its name, arrays and captions.
        text: the column with captions, at most one; by default `text`, else `caption` or `prompt`.
        image_size: pixels a side that every image is resized to (bicubic); None: they must already be equal.
        channels: 1 for grey, 3 for colour; None: 3.
        test_fraction: share of the images to test on, in (0, 1), if the split is drawn.
        seed: of that split, and of the images that `limits` keep.
        limits: how many images to read for training and for testing, if the split is given; None: all.

    Raises:
        HoldfastError: if a list cannot be read, a column, a file or a caption is missing, a file is listed twice or is
            outside of the folder, an image cannot be opened, or sizes differ and no `image_size` is given.
    """
    notes: list[str] = []
    parts = _of_folder(path, text, notes) if path.is_dir() else _split(path, *_of_table(path, text, notes), notes)
    drawn = len(parts) == 1
    if drawn:
        parts = _drawn(path, parts[0], test_fraction, seed)
    else:
        parts = [_some(part, limit, seed) for part, limit in zip(parts, limits, strict=True)]
    train, test = parts
    every = [each.image for each in (*train, *test)]
    opener = Opener("L" if channels == 1 else "RGB", every)
    names, labels = np.unique([each.caption for each in (*train, *test)], return_inverse=True)
    opened = ((repr(str(f)), opener.open(f), int(label)) for f, label in zip(every, labels, strict=True))
    x, y = stack(opened, image_size)
    count = len(train)
    task = make(path.stem if path.is_file() else path.name, x[:count], y[:count], x[count:], y[count:], names.tolist())
    what = "folder" if path.is_dir() else "file"
    return task.noted(f"{what} {path}", *notes, *opener.notes(), drawn=drawn)


def _drawn(path: Path, images: list[Captioned], fraction: float, seed: int) -> list[list[Captioned]]:
    tested = draw_test_rows(path, np.zeros(len(images), int), fraction, seed, ["images with captions"])
    return [_taken(images, ~tested), _taken(images, tested)]


def _taken(images: Sequence[Captioned], kept: npt.NDArray[np.bool_]) -> list[Captioned]:
    return [image for image, wanted in zip(images, kept, strict=True) if wanted]


def _some(images: list[Captioned], limit: int | None, seed: int) -> list[Captioned]:
    if limit is None or limit >= len(images):
        return images
    return [images[i] for i in sorted(np.random.default_rng(seed).permutation(len(images))[:limit])]


def _of_folder(path: Path, text: Sequence[str], notes: list[str]) -> list[list[Captioned]]:
    """The images of a folder: two lists, or one if the split is to be drawn."""
    if any((path / name).is_file() for name in METADATA):
        parts = _split(path, *_listed(path, text, notes), notes)
        _note_unlisted(path, parts, notes)
        return parts
    splits = split_folders(path, labelled=False, notes=notes)
    if splits is None:
        raise HoldfastError(
            f"{str(path)!r} has lists of images in folders for one split, and no folder for the other; expected train "
            f"and test, each with {METADATA[0]}, or {METADATA[0]} beside the images."
        )
    parts = []
    for folder in splits.values():
        part, _ = _listed(folder, text, notes)
        _note_unlisted(folder, [part], notes)
        parts.append(part)
    return parts


def _note_unlisted(folder: Path, parts: Sequence[Sequence[Captioned]], notes: list[str]) -> None:
    listed = {each.image for part in parts for each in part}
    found = [p for p in below(folder) if p.suffix.lower() in suffixes() and p not in listed]
    if found:
        notes.append(f"{folder.name}: {len(found)} images without a caption were left out, such as {found[0].name}")


def _split(path: Path, images: list[Captioned], words: pd.Series | None, notes: list[str]) -> list[list[Captioned]]:
    """The images by split; a single list if nothing says which are for testing."""
    if words is None:
        return [images]
    train, test = split_rows(path, words, notes)
    return [_taken(images, train), _taken(images, test)]


def _listed(folder: Path, text: Sequence[str], notes: list[str]) -> tuple[list[Captioned], pd.Series | None]:
    """The images that a folder's list names, and the word of the split of each."""
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) != 1:
        held = " and ".join(file.name for file in found) or f"none of {', '.join(METADATA)}"
        raise HoldfastError(f"{str(folder)!r} holds {held}; expected one list of its images with captions.")
    (file,) = found
    table = _table(file, notes)
    columns = [str(c) for c in table.columns]
    if FILE not in columns:
        raise HoldfastError(
            f"{str(file)!r} has the columns {', '.join(columns)}; expected {FILE}, with the path of each image from "
            "the folder of the list on, and a column with captions."
        )
    captions = _captions(file, table, _column(file, [c for c in columns if c != FILE], text), notes)
    names = _file_names(file, table[FILE].tolist())
    images = [Captioned(folder / name, caption) for name, caption in zip(names, captions, strict=True)]
    missing = [i for i, each in enumerate(images) if not Path(str(each.image)).is_file()]
    if missing:
        raise HoldfastError(
            f"{_row(file, missing[0])}: there is no file {str(names[missing[0]])!r} in {str(folder)!r}, and "
            f"{len(missing)} of {len(images)} listed files are missing; paths count from the folder of the list on. "
            "Add the files, or remove the rows."
        )
    split = split_column(file, table, "")
    return images, table[split] if split is not None else _folders_of(names)


def _table(file: Path, notes: list[str]) -> pd.DataFrame:
    """The rows of a list, as they are written: the file 007 is not 7."""
    if file.suffix == ".csv":
        return read_csv(file, notes, keep_default_na=False, na_values=[""], dtype=str)
    records, columns = read_records(file)
    return pd.DataFrame(records, columns=columns, dtype=object)


def _folders_of(names: Sequence[PurePosixPath]) -> pd.Series | None:
    """The first folder of each path, if these are those of splits."""
    first = pd.Series([name.parts[0].lower() if len(name.parts) > 1 else "" for name in names], name=FILE)
    is_train, is_held = first.isin(SPLITS["train"]), first.isin([*SPLITS["test"], *SPLITS["held"]])
    return first if (is_train | is_held).all() and is_train.any() and is_held.any() else None


def _file_names(file: Path, cells: Sequence[Any]) -> list[PurePosixPath]:
    """The paths of the images, which stay inside of the folder; links in it may lead elsewhere."""
    names: dict[PurePosixPath, int] = {}
    for row, cell in enumerate(cells):
        text = _text(cell)
        if text is None:
            raise HoldfastError(f"{_row(file, row)}: {FILE} is {_shown(cell)}; expected the path of an image.")
        name = PurePosixPath(text)
        if name.is_absolute() or PureWindowsPath(text).drive or ".." in (*name.parts, *PureWindowsPath(text).parts):
            raise HoldfastError(
                f"{_row(file, row)}: {FILE} is {text!r}, which is outside of the folder; expected a path from the "
                "folder of the list on, such as 'images/1.png'. Move the image into the folder."
            )
        if name in names:
            raise HoldfastError(
                f"{_row(file, row)}: {text!r} is listed twice, first in {_row(file, names[name], short=True)}; "
                "expected one caption an image. Remove one of the rows, or copy the file."
            )
        names[name] = row
    return list(names)


def _of_table(path: Path, text: Sequence[str], notes: list[str]) -> tuple[list[Captioned], pd.Series | None]:
    """The images in a `.parquet` file, and the word of the split of each."""
    table = read_table(path, notes)
    found = image_columns(path)
    image = "image" if "image" in found else found[0] if len(found) == 1 else None
    if image is None:
        held = f"the columns of images {', '.join(found)}" if found else "no column of images"
        raise HoldfastError(
            f"{str(path)!r} has {held}; expected one, called image: structs with the bytes of a file, as Hugging "
            f"Face's datasets writes them. Its columns are {', '.join(map(str, table.columns))}."
        )
    captions = _captions(path, table, _column(path, [c for c in table.columns if c not in found], text), notes)
    images = []
    for row, (cell, caption) in enumerate(zip(table[image], captions, strict=True)):
        data = cell.get("bytes") if isinstance(cell, dict) else None
        if not data:
            only = f"only the path {cell['path']!r}" if isinstance(cell, dict) and cell.get("path") else "no image"
            raise HoldfastError(
                f"{_row(path, row)}: column {image!r} holds {only}; expected the bytes of an image file. Save the "
                "table with its images, or remove the row."
            )
        images.append(Captioned(Stored(f"{path.name}, row {row}", data), caption))
    split = split_column(path, table, "")
    return images, None if split is None else table[split]


def _column(path: Path, columns: Sequence[str], text: Sequence[str]) -> str:
    """The name of the column with captions."""
    if len(text) > 1:
        raise HoldfastError(f"{str(path)!r}: text is {'+'.join(text)}; expected one column, with the captions.")
    if text:
        if text[0] not in columns:
            raise unknown(f"column of {path.name}", text[0], columns)
        return text[0]
    if TEXT in columns:
        return TEXT
    guessed = [c for c in GUESSED if c in columns]
    if len(guessed) != 1:
        held = f"has the columns {', '.join(columns)}" if columns else "has no column for captions"
        raise HoldfastError(
            f"{str(path)!r} {held}; expected captions in {TEXT}, or in one of {' and '.join(GUESSED)}. Name their "
            "column: text=COLUMN."
        )
    return guessed[0]


def _captions(path: Path, table: pd.DataFrame, column: str, notes: list[str]) -> list[str]:
    """The caption of each row; of labels with names in the file, these names."""
    named = class_names(path, column) if path.suffix == ".parquet" else None
    if named is not None:
        numbers, names = named_labels(path, table[column], named, notes)
        return [names[i] for i in numbers]
    cells = table[column].tolist()
    captions = [_text(cell) for cell in cells]
    wrong = [row for row, caption in enumerate(captions) if caption is None]
    if wrong:
        raise HoldfastError(
            f"{_row(path, wrong[0])}: column {column!r} is {_shown(cells[wrong[0]])}, and {len(wrong)} of {len(cells)} "
            "rows have no caption; expected a text in each. Write captions, or remove the rows."
        )
    return [str(caption) for caption in captions]


def _text(cell: Any) -> str | None:
    """The text in a cell; None if it is empty, or holds something else."""
    if isinstance(cell, bool | np.bool_) or not isinstance(cell, str | int | float | np.number) or _is_nan(cell):
        return None
    return str(cell).strip() or None


def _is_nan(cell: Any) -> bool:
    return isinstance(cell, float) and math.isnan(cell)


def _shown(cell: Any) -> str:
    if cell is None or _is_nan(cell) or (isinstance(cell, str) and not cell.strip()):
        return "empty"
    return f"{str(cell)[:40]!r} ({type(cell).__name__})"


def _row(file: Path, row: int, *, short: bool = False) -> str:
    """A row of a file, in messages: the line of a text file; rows of others count from 0."""
    place = f"line {row + {'.csv': 2, '.jsonl': 1}[file.suffix]}" if file.suffix != ".parquet" else f"row {row}"
    return place if short else f"{str(file)!r}, {place}"
