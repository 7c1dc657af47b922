"""SOPHON (Deng et al., IEEE S&P 2024)."""
