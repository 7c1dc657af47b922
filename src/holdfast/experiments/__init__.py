"""Recipes, and the runs, studies and protocols that they describe."""
