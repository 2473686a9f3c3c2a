"""The published methods, each a file that reads like its paper.

A method is a module of pure functions and one table:

- ``init_extra(config, contracts, student_tokens, rng) -> params`` that train beside the student;
- ``forward(student, params, pixels, features, config, key) -> outputs``, the student's passes;
- ``objective(params, outputs, features, batch, config) -> (loss, metrics)``;
- ``LOGICAL_AXES``, first-match rules for the parameters that `init_extra` makes.
"""

from __future__ import annotations

from types import ModuleType

from tove_jax.errors import InputError, nearest
from tove_jax.methods import move_kd

METHODS: dict[str, ModuleType] = {"move_kd": move_kd}


def get(name: str) -> ModuleType:
    """Returns a method's module.

    Raises:
      InputError: no such method.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise InputError(f"config.method.name: no method '{name}'{nearest(name, METHODS)}; methods: {known}")
    return METHODS[name]
