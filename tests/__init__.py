"""The tests; a package, so that shared fixtures are found by name."""
