"""`.npz` files: four arrays, and optionally the names of the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from holdfast.errors import HoldfastError
from holdfast.tasks.arrays import UNREADABLE, Array
from holdfast.tasks.classification import ArrayTask


def load_npz(path: Path, kind: type[ArrayTask] = ArrayTask) -> ArrayTask:
    """Reads `NAME.npz` with `x_train, y_train, x_test, y_test[, class_names]`; it cannot run code.

    Args:
        path: the file.
        kind: of the task; if the task needs no labels, neither does the file.

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
            labels = ("y_train", "y_test")
            bare = not kind.labelled and not any(k in archive.files for k in labels)
            missing = [k for k in ("x_train", "x_test", *(() if bare else labels)) if k not in archive.files]
            if missing:
                raise HoldfastError(
                    f"{str(path)!r} lacks {', '.join(missing)}; it holds {', '.join(archive.files) or 'nothing'}. "
                    "Expected x_train, y_train, x_test, y_test and optionally class_names."
                )
            names = _class_names(path, archive["class_names"]) if "class_names" in archive.files else None
            inputs = [archive[k] for k in ("x_train", "x_test")]
            targets = [np.zeros(x.shape[:1], int) if bare else archive[k] for k, x in zip(labels, inputs, strict=True)]
    except HoldfastError:
        raise
    except UNREADABLE as error:
        raise HoldfastError(f"{str(path)!r} cannot be read as an .npz of plain arrays: {error}.") from error
    extra = [k for k in archive.files if k not in ("x_train", "x_test", *labels, "class_names")]
    notes = [f"arrays left out: {', '.join(extra)}"] if extra else []
    return kind(path.stem, inputs[0], targets[0], inputs[1], targets[1], names).noted(f"file {path}", *notes)


def _class_names(path: Path, names: Array) -> list[str]:
    if names.ndim != 1:
        raise HoldfastError(f"{str(path)!r}: class_names has shape {names.shape}; expected (C,), one name a class.")
    return [(n.decode(errors="replace") if isinstance(n, bytes) else str(n)).strip() for n in names]
