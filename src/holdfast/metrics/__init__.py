"""Measurements without an attack: feasibility, condition numbers, diagnostics, generated samples."""
