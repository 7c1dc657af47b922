"""Defenses that train the last blocks of a network by a term on its features."""
