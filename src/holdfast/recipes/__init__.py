"""Recipes that come with the package: data, not code."""
