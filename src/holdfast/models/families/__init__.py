"""Families of models: built in, of timm, of Hugging Face, and networks of the user's code."""
