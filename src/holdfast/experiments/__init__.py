"""Recipes and what runs them: runs, studies and protocols."""
