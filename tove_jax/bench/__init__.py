"""Measurements of the package itself, which users can repeat."""
