"""The path of a name: one rule for data, tokenizers and weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from holdfast.errors import HoldfastError

DATA_VARIABLE = "HOLDFAST_DATA"


def data_folder(data_dir: Path | str | None) -> Path | None:
    """Returns the given data folder, or that of `$HOLDFAST_DATA`; None if neither is set."""
    folder = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE)
    return Path(folder).expanduser() if folder else None


def cache_folder(data_dir: Path | None) -> Path:
    """Returns where downloads and what is computed once are kept: the data folder, or `~/.cache/holdfast`."""
    return data_dir if data_dir is not None else Path("~/.cache/holdfast").expanduser()


def place(
    name: str,
    data_dir: Path | str | None,
    *,
    endings: Sequence[str] = ("",),
    is_there: Callable[[Path], bool] = Path.exists,
) -> Path | None:
    """Returns the path of a name, in the current folder or else in the data folder; None if neither has it.

    A name that begins with `/`, `./`, `../` or `~`, or ends with `/`, is not searched for in the data folder.

    Args:
        name: as the user gave it.
        data_dir: the data folder; None: `$HOLDFAST_DATA`, if it is set.
        endings: appended to the name in the data folder, in this order.
        is_there: whether a path counts.

    Raises:
        HoldfastError: if both folders have it.

    Example:
        >>> place("./no-such-file.npz", "/") is None
        True
    """
    own = Path(name).expanduser()
    here = own if is_there(own) else None
    root = data_folder(data_dir)
    typed = own.is_absolute() or name in (".", "..") or name.startswith(("./", "../", "~")) or name.endswith("/")
    if typed or root is None:
        return here
    there = next((p for p in (root / f"{name}{ending}" for ending in endings) if is_there(p)), None)
    if here is not None and there is not None and not here.samefile(there):
        raise HoldfastError(
            f"{name!r} is both {str(here.absolute())!r} and {str(there)!r} in the data folder; write ./{name} for the "
            f"first, or {there!s} for the second."
        )
    return here if here is not None else there
