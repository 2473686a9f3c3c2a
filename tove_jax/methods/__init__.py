"""The published methods, each a file that reads like its paper.

A method is a module of pure functions and one table, as `tove_jax.methods.protocol.Method` says:
``init_extra``, ``forward``, ``objective``, ``tokens``, ``training_experts``, ``deployed_experts``,
``vocabulary`` and ``LOGICAL_AXES``.

`merge` is the one method that begins from another run: its `initial` makes all parameters, and its
`fold` makes the student's tree of what was trained.
"""

from __future__ import annotations

from tove_jax.errors import InputError, nearest
from tove_jax.methods import hawaii, merge, move_kd, tove
from tove_jax.methods.protocol import Method

METHODS: dict[str, Method] = {"move_kd": move_kd, "hawaii": hawaii, "tove": tove, "merge": merge}


def get(name: str) -> Method:
    """Returns a method's module.

    Raises:
      InputError: no such method.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise InputError(f"config.method.name: no method '{name}'{nearest(name, METHODS)}; methods: {known}")
    return METHODS[name]
