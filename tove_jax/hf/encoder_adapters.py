"""MoVE-KD's encoder adapters under the names of the released file ``encoder_adapter.bin``.

There a teacher's adapter is two linears, ``{teacher}_adapter_1`` over channels and ``{teacher}_adapter_2``
over tokens, with the teachers called ``sam``, ``eva``, ``pix2struct`` and ``convnext`` (as copies of the
authors' repository have them). Any other expert keeps its registered name in that place (ours).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tove_jax.errors import InputError
from tove_jax.hf import rules
from tove_jax.hf.rules import Rule

FILE = "encoder_adapter"
"""Name of the file, without its suffix."""

RELEASED = {"sam_l": "sam", "eva02_l": "eva", "pix2struct_l": "pix2struct", "convnext_xxl": "convnext"}
"""Our experts that the released file knows, and what it calls them."""

_PART = {"1": "channel", "2": "token"}
_NAME = re.compile(r"(?:.*\.)?([\w\-]+)_adapter_([12])\.(weight|bias)")


def table(experts: Iterable[str]) -> tuple[Rule, ...]:
    """Returns the rules of some experts' adapters, published names <-> ``{expert}/{channel,token}/{kernel,bias}``.

    Raises:
      InputError: two experts that the file calls the same.
    """
    found: dict[str, str] = {}
    for expert in experts:
        short = RELEASED.get(expert, expert)
        if short in found:
            raise InputError(f"encoder adapters: experts '{found[short]}' and '{expert}' are both called '{short}'")
        found[short] = expert
    return tuple(
        rule
        for short, expert in found.items()
        for number, part in _PART.items()
        for rule in (
            Rule(f"{short}_adapter_{number}.weight", f"{expert}/{part}/kernel", (1, 0)),  # (out, in) -> (in, out)
            Rule(f"{short}_adapter_{number}.bias", f"{expert}/{part}/bias"),
        )
    )


def is_name(name: str) -> bool:
    """Whether a published name is that of an encoder adapter, whatever stands before it."""
    return _NAME.fullmatch(name) is not None


def to_arrays(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns MoVE-KD's method parameters under the published names, float32.

    Raises:
      InputError: something that is no encoder adapter.
    """
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in rules.flatten(params).items()}
    return rules.to_arrays(leaves, table(params))


def to_tree(arrays: Mapping[str, np.ndarray], source: str = "arrays") -> dict[str, Any]:
    """Returns ``{expert: {"channel": ..., "token": ...}}`` of published arrays, float32.

    Args:
      arrays: published name to array, all of encoder adapters.
      source: what they came from, for messages.

    Raises:
      InputError: another name, half of a linear, an adapter without its channel linear, or shapes that do not
        follow each other.
    """
    ours = {short: expert for expert, short in RELEASED.items()}
    renamed: dict[str, np.ndarray] = {}
    experts: dict[str, None] = {}
    for name, array in arrays.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(f"{source}: expected encoder adapters (sam_adapter_1.weight), found {name}")
        bare = f"{match[1]}_adapter_{match[2]}.{match[3]}"
        if bare in renamed:
            raise InputError(f"{source}: two arrays are called {bare!r} once prefixes are taken off")
        renamed[bare] = array
        experts[ours.get(match[1], match[1])] = None
    shapes: dict[str, tuple[int, ...]] = {}
    for expert in experts:
        short = RELEASED.get(expert, expert)
        for number, part in _PART.items():
            weight = renamed.get(f"{short}_adapter_{number}.weight")
            if weight is None and part == "token" and f"{short}_adapter_{number}.bias" not in renamed:
                continue  # interpolated targets have no token linear
            if weight is None or weight.ndim != 2:
                found = "nothing" if weight is None else f"shape {weight.shape}"
                raise InputError(f"{source}: {short}_adapter_{number}.weight: expected two axes, found {found}")
            shapes |= {f"{expert}/{part}/kernel": weight.shape[::-1], f"{expert}/{part}/bias": weight.shape[:1]}
    tree = rules.to_tree(renamed, table(experts), shapes, source=source)
    return rules.unflatten({path: leaf.astype(np.float32) for path, leaf in rules.flatten(tree).items()})
