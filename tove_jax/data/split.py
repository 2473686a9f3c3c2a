"""Which pictures train and which are held out: decided by each picture's id alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tove_jax.data.picture import BLANK
from tove_jax.errors import InputError


class Split(NamedTuple):
    """Indices into a source's ``ids``, int32, in the order of the source."""

    train: np.ndarray
    held_out: np.ndarray


def fraction(id: str, salt: str = "") -> float:
    """Returns the place of an id in [0, 1): the first 53 bits of sha256 of salt, a zero byte, id."""
    digest = hashlib.sha256(f"{salt}\0{id}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def spread(count: int, limit: int) -> np.ndarray:
    """Returns at most `limit` indices (0: all) spread evenly over ``range(count)``, int32."""
    if limit <= 0 or limit >= count:
        return np.arange(count, dtype=np.int32)
    return (np.arange(limit, dtype=np.int64) * count // limit).astype(np.int32)


def split(ids: Sequence[str], held_out: float, *, salt: str = "", limit: int = 0) -> Split:
    """Splits a source into training and held-out pictures.

    A picture's side depends on its id, the salt and the share alone, so it stays when pictures are
    added, removed or reordered; with a larger share, held-out pictures stay held out. The black picture `BLANK`
    always trains, beside the limit.

    Args:
      ids: of the source.
      held_out: expected share held out, in [0, 1].
      salt: another salt gives another split.
      limit: use only this many pictures, spread evenly over the source; 0: all.

    Returns:
      The indices of both sides.

    Raises:
      InputError: `held_out` outside [0, 1] or a negative limit.
    """
    if not 0.0 <= held_out <= 1.0:
        raise InputError(f"data.held_out: expected a share from 0 to 1, found {held_out}")
    if limit < 0:
        raise InputError(f"data.limit: expected 0 or more pictures, found {limit}")
    blank = len(ids) > 0 and ids[-1] == BLANK
    chosen = spread(len(ids) - blank, limit)
    if blank:
        chosen = np.append(chosen, np.int32(len(ids) - 1))
    held = np.fromiter((ids[i] != BLANK and fraction(ids[i], salt) < held_out for i in chosen), bool, len(chosen))
    return Split(train=chosen[~held], held_out=chosen[held])
