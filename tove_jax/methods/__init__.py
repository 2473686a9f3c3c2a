"""The published methods, each a file that reads like its paper.

A method is a module of pure functions and one table:

- ``init_extra(config, contracts, student_tokens, rng) -> params`` that train beside the student;
- ``forward(student, params, pixels, features, config, key) -> outputs``, the student's passes;
- ``objective(params, outputs, features, batch, config) -> (loss, metrics)``;
- ``LOGICAL_AXES``, first-match rules for the parameters that `init_extra` makes;
- ``tokens(student, params, pixels, features, config) -> (B, N, D)``, the patch tokens of the encoder as
  it is deployed, from pixels and the features of its deployed experts;
- ``training_experts(config)``, names of the experts whose features training reads, and
  ``deployed_experts(config)``, of those that must run beside the encoder when it is deployed;
- ``vocabulary(config, captions) -> Vocabulary | None``, the words of captions that `objective` reads.

`merge` is the one method that begins from another run: its `initial` makes all parameters, and its
`fold` makes the student's tree of what was trained.
"""

from __future__ import annotations

from types import ModuleType

from tove_jax.errors import InputError, nearest
from tove_jax.methods import hawaii, merge, move_kd, tove

METHODS: dict[str, ModuleType] = {"move_kd": move_kd, "hawaii": hawaii, "tove": tove, "merge": merge}

TITLES = {"move_kd": "MoVE-KD", "hawaii": "HAWAII", "tove": "ToVE", "merge": "merging"}
"""What people read for a method's name."""


def get(name: str) -> ModuleType:
    """Returns a method's module.

    Raises:
      InputError: no such method.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise InputError(f"config.method.name: no method '{name}'{nearest(name, METHODS)}; methods: {known}")
    return METHODS[name]
