"""Frozen vision experts: how each is loaded and run, and the store of their features."""
