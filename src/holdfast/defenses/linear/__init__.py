"""Defenses by a linear extractor. One file each."""
