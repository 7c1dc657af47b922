"""Spectra: singular values, condition numbers, their regularizers, and the limits of linear extractors."""
