"""Which files and folders hold images with captions; `holdfast.tasks.captions` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from holdfast.tasks.image_folder import TEST_FOLDERS, TRAIN_FOLDERS

METADATA: Final = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files that list the images of a folder, as Hugging Face's `imagefolder` names them."""


def has_captions(path: Path) -> bool:
    """Returns whether a folder has a list of its images, or a `.parquet` file has a column of them.

    Example:
        >>> has_captions(Path("no-such-folder"))
        False
    """
    if path.suffix == ".parquet" and path.is_file():
        return bool(image_columns(path))
    if not path.is_dir():
        return False
    names = (*TRAIN_FOLDERS, *TEST_FOLDERS)
    try:
        splits = [p for p in path.iterdir() if p.name.lower() in names and p.is_dir()]
        return any((folder / name).is_file() for folder in (path, *splits) for name in METADATA)
    except OSError:  # the loader says that the folder cannot be read
        return False


def image_columns(path: Path) -> list[str]:
    """Returns the columns of a `.parquet` file that hold files of images, as Hugging Face's datasets writes them.

    They are structs with `bytes`. None are found in a file that cannot be read, or without pyarrow: the loader of its
    rows then says what is wrong.
    """
    try:
        from pyarrow import parquet, types

        schema = parquet.read_schema(path)
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ImportError, OSError, ValueError):
        return []
    return [
        field.name
        for field in schema
        if types.is_struct(field.type)
        and field.type.get_field_index("bytes") >= 0
        and types.is_binary(field.type.field("bytes").type)
        and _declared(stored, field.name) in (None, "Image")  # sounds are stored alike
    ]


def _declared(stored: Any, column: str) -> str | None:
    """The type that datasets noted for a column."""
    try:
        return str(stored["info"]["features"][column]["_type"])
    except (KeyError, TypeError):
        return None
