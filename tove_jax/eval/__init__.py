"""Evaluation of features on held-out pictures; the runner sees only predict functions."""
