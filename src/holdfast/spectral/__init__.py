"""Spectra: singular values, condition numbers, their regularizers, and what a linear extractor can reach."""
