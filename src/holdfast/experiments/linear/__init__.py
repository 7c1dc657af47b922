"""Linear studies: defenses by a linear extractor, on pairs of tasks, laid out as the tables of the ICML 2025 paper."""
