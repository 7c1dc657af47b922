"""Undo moves."""

UNDO: dict[str, object] = {}
