"""Undo moves: they repair a released model before it is fine-tuned. One file for each kind of damage."""
