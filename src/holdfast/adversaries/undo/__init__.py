"""Undo moves, which repair a released model before it is fine-tuned; one file for each kind of damage."""
