"""Reading weights that others wrote, and writing files whole or not at all."""
