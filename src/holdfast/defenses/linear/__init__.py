"""Defenses by a linear extractor."""
