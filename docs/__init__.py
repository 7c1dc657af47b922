"""The documentation; a package, so that its conftest.py is not taken for the one of the tests."""
