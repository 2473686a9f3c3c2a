"""Tables of published names for the experts' encoders, a module a family of names."""
