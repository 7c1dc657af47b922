"""Undo moves: they repair a released model before it is fine-tuned. One file a kind of damage."""
