"""Defenses: an open set, one file each; a new one adds its line to `DEFENSES`."""

from typing import Final

from holdfast.defenses.base import Defense, Record
from holdfast.defenses.sophon import Sophon

DEFENSES: Final[dict[str, type[Defense]]] = {
    Sophon.name: Sophon,
}

__all__ = ["DEFENSES", "Defense", "Record", "Sophon"]
