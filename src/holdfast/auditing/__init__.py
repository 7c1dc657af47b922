"""The audit: trials of a battery against a model and its controls, and the verdict."""
