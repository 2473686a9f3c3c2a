"""Flax encoders: pure modules that return an output and the named intermediates one asked for."""
