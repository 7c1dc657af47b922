"""The error for users: it names the bad value, what was expected and how to correct it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HoldfastError(ValueError):
    """Bad input. The command line prints its message without a traceback and exits with 2."""


def unknown(what: str, name: str, known: Iterable[str]) -> HoldfastError:
    """Returns the error for a name that is not among the known ones; it suggests the nearest.

    Example:
        >>> print(unknown("defense", "sofon", ["sophon"]))
        Unknown defense 'sofon': did you mean 'sophon'? Known: sophon.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return HoldfastError(f"Unknown {what} {name!r}: {hint}Known: {', '.join(names)}.")
