"""`.npz` files: four arrays, and optionally the names of the classes, or a caption for each image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from holdfast.errors import HoldfastError
from holdfast.tasks.arrays import UNREADABLE, Array
from holdfast.tasks.classification import ArrayTask

INPUTS: Final = ("x_train", "x_test")
LABELS: Final = ("y_train", "y_test")
CAPTIONS: Final = ("captions_train", "captions_test")


def load_npz(
    path: Path, kind: type[ArrayTask] = ArrayTask, captioned: Callable[..., ArrayTask] | None = None
) -> ArrayTask:
    """Reads `NAME.npz` with `x_train, y_train, x_test, y_test[, class_names]`; it cannot run code.

    With `captioned`, the texts `captions_train` and `captions_test` come before labels; the distinct ones, sorted, are
    then the names.

    Args:
        path: the file.
        kind: of the task; if the task needs no labels, neither does the file.
        captioned: makes the task of a file with captions; None: captions are left out.

    Raises:
        HoldfastError: if the file is missing or damaged, holds Python objects, or lacks an array.
    """
    if not path.is_file():
        raise HoldfastError(f"No data at {str(path)!r}: the file does not exist.")
    try:
        opened = np.load(path, allow_pickle=False)
        if not hasattr(opened, "files"):
            raise HoldfastError(f"{str(path)!r} is a single array; expected an .npz archive of four.")
        with opened as archive:
            told = captioned is not None and any(k in archive.files for k in CAPTIONS)
            labels = CAPTIONS if told else LABELS
            bare = not kind.labelled and not any(k in archive.files for k in labels)
            missing = [k for k in (*INPUTS, *(() if bare else labels)) if k not in archive.files]
            if missing:
                raise HoldfastError(
                    f"{str(path)!r} lacks {', '.join(missing)}; it holds {', '.join(archive.files) or 'nothing'}. "
                    f"Expected {', '.join((*INPUTS, *labels))}{'' if told else ' and optionally class_names'}."
                )
            names = _class_names(path, archive["class_names"]) if "class_names" in archive.files else None
            inputs = [archive[k] for k in INPUTS]
            targets = [np.zeros(x.shape[:1], int) if bare else archive[k] for k, x in zip(labels, inputs, strict=True)]
    except HoldfastError:
        raise
    except UNREADABLE as error:
        raise HoldfastError(f"{str(path)!r} cannot be read as an .npz of plain arrays: {error}.") from error
    if told:
        names, targets = _numbered(path, inputs, targets)
    extra = [k for k in archive.files if k not in (*INPUTS, *labels, "class_names")]
    notes = [f"arrays left out: {', '.join(extra)}"] if extra else []
    make = captioned if told and captioned is not None else kind
    return make(path.stem, inputs[0], targets[0], inputs[1], targets[1], names).noted(f"file {path}", *notes)


def _numbered(path: Path, inputs: list[Array], captions: list[Array]) -> tuple[list[str], list[Array]]:
    """The distinct captions, and the number of each image's."""
    for images, texts, key in zip(inputs, captions, CAPTIONS, strict=True):
        if texts.dtype.kind not in "US" or texts.shape != images.shape[:1]:
            raise HoldfastError(
                f"{str(path)!r}: {key} has dtype {texts.dtype} and shape {texts.shape}; expected one text an image, "
                f"{images.shape[:1]}."
            )
    told = [np.array(_class_names(path, texts), dtype=str) for texts in captions]
    for texts, key in zip(told, CAPTIONS, strict=True):
        empty = np.flatnonzero(texts == "")
        if len(empty):
            raise HoldfastError(
                f"{str(path)!r}: {key} is empty for {len(empty)} images, first in row {empty[0]}; write their "
                "captions, or leave the images out."
            )
    names, numbers = np.unique(np.concatenate(told), return_inverse=True)
    return names.tolist(), np.split(numbers, [len(told[0])])


def _class_names(path: Path, names: Array) -> list[str]:
    if names.ndim != 1:
        raise HoldfastError(f"{str(path)!r}: class_names has shape {names.shape}; expected (C,), one name a class.")
    return [(n.decode(errors="replace") if isinstance(n, bytes) else str(n)).strip() for n in names]
