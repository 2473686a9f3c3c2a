"""How patch tokens are stored: pooled or not, on principal axes or not, then quantised.

A codec is written ``pool:24+pca:256+int8``, each part at most once, in this order:

- ``pool:n`` or ``pool:hxw``: area means over the grid, down to n x n cells (`tove_jax.experts.pooling`); they
  are not undone, so the expert's grid is the smaller one from then on
- ``pca:k``: k principal axes of the expert's tokens, fitted once; undone when decoding
- a quantiser of `tove_jax.experts.quantize`: ``float32``, ``bf16`` (when none is named), ``fp8``, ``int8``,
  ``int4`` or ``int4:g`` with groups of g channels

Encoding is NumPy on the host; decoding uses only array operations, so it runs inside jit as well as on
NumPy arrays. Only patches are coded: the summary and CLS attention are small and stay float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from tove_jax.errors import InputError, nearest
from tove_jax.experts import pooling, quantize
from tove_jax.experts.base import ExpertFeatures
from tove_jax.experts.spectrum import Basis

_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "uint8": np.dtype(np.uint8),
}

QUANTIZERS: tuple[str, ...] = tuple(quantize.STORED)
CODED = ("patches",)
"""The fields of `ExpertFeatures` that the codec touches; the others are float32."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """A codec, read from its text by `parse`; `str` gives the text back in one spelling.

    Attributes:
      quantizer: one of `QUANTIZERS`.
      group: channels of an int4 group.
      pool: (h, w), the largest grid that is stored; None: any.
      pca: number of principal axes; None: all channels as they are.
    """

    quantizer: str
    group: int = quantize.GROUP
    pool: tuple[int, int] | None = None
    pca: int | None = None

    def __str__(self) -> str:
        parts = []
        if self.pool:
            high, wide = self.pool
            parts.append(f"pool:{high}" if high == wide else f"pool:{high}x{wide}")
        if self.pca:
            parts.append(f"pca:{self.pca}")
        grouped = self.quantizer == "int4" and self.group != quantize.GROUP
        parts.append(f"int4:{self.group}" if grouped else self.quantizer)
        return "+".join(parts)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the grid that is stored of an expert's grid."""
        if self.pool is None:
            return height, width
        return pooling.pooled_side(height, self.pool[0]), pooling.pooled_side(width, self.pool[1])

    def pooled(self, patches: Any) -> Any:
        """Returns patches (..., H, W, D) on the grid that is stored; NumPy or JAX arrays, also traced."""
        return patches if self.pool is None else pooling.pool(patches, *self.pool)


@functools.cache
def parse(text: str) -> Codec:
    """Reads a codec.

    Raises:
      InputError: a part that does not exist (the nearest one is named), stands twice or in another place, or
        a number that is none or out of range.
    """
    names = ("pool", "pca", *QUANTIZERS)
    rank = {"pool": 0, "pca": 1} | dict.fromkeys(QUANTIZERS, 2)
    found: dict[str, Any] = {}
    last = -1
    for part in text.split("+"):
        name, colon, number = part.partition(":")
        if name not in rank:
            raise InputError(
                f"codec {text!r}: expected parts pool:n, pca:k and one of {', '.join(QUANTIZERS)}, joined by '+', "
                f"found {part!r}{nearest(name, names)}"
            )
        if rank[name] <= last:
            raise InputError(f"codec {text!r}: {part!r}: expected pool, then pca, then one quantiser, each once")
        last = rank[name]
        if name in QUANTIZERS:
            found["quantizer"] = name
            if name != "int4" and colon:
                raise InputError(f"codec {text!r}: {name!r} takes no number, found {part!r}")
            if colon:
                found["group"] = _number(text, part, number)
                if found["group"] % 2:
                    raise InputError(f"codec {text!r}: {part!r}: expected an even group, two values fill a byte")
        elif name == "pool":
            sides = [_number(text, part, side) for side in number.split("x")]
            if len(sides) > 2:
                raise InputError(f"codec {text!r}: expected pool:n or pool:hxw, found {part!r}")
            found["pool"] = (sides[0], sides[-1])
        else:
            found["pca"] = _number(text, part, number)
    return Codec(**{"quantizer": "bf16", **found})


def codec_of(setting: str, expert: str) -> str:
    """Returns an expert's codec from ``features.codec``, in `Codec`'s one spelling.

    Args:
      setting: one codec for all experts, or after it, or alone, ``expert=codec`` for single ones, with
        commas between: ``int8,clip=bf16``.
      expert: registered name.

    Raises:
      InputError: as `parse`; or no codec for this expert, or two.
    """
    chosen: dict[str, str] = {}
    for item in setting.split(","):
        name, equals, text = item.strip().rpartition("=")
        if name in chosen:
            raise InputError(f"features.codec {setting!r}: two codecs for {name or 'all experts'}")
        chosen[name] = str(parse(text.strip()))
        if equals and not name:
            raise InputError(f"features.codec {setting!r}: expected expert=codec, found {item!r}")
    found = chosen.get(expert, chosen.get(""))
    if found is None:
        raise InputError(f"features.codec {setting!r}: no codec for expert {expert!r}, nor one for all experts")
    return found


def dtype_of(name: str) -> np.dtype:
    """Returns the NumPy dtype of a stored dtype's name.

    Raises:
      InputError: a dtype that no codec writes.
    """
    if name not in _DTYPES:
        raise InputError(f"stored dtype: expected one of {', '.join(_DTYPES)}, found {name!r}")
    return _DTYPES[name]


def stored_shapes(codec: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of decoded fields, of those that the expert gives; both without the batch axis."""
    found = {name: tuple(int(side) for side in shape) for name, shape in shapes.items()}
    for name in CODED:
        if name in found:
            found[name] = (*parse(codec).grid(*found[name][:2]), *found[name][2:])
    return found


def payload_arrays(codec: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns what one record holds.

    Args:
      codec: see `parse`.
      shapes: field of `ExpertFeatures` -> its decoded shape without the batch axis (`stored_shapes`).

    Returns:
      payload array -> (shape, dtype name), in the order in which a record stores them.
    """
    parsed = parse(codec)
    arrays: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in shapes.items():
        shape = tuple(int(side) for side in shape)
        if name not in CODED:
            arrays[name] = (shape, "float32")
            continue
        if parsed.pca:
            shape = (*shape[:-1], parsed.pca)
        arrays |= quantize.arrays(parsed.quantizer, shape, parsed.group, name)
    return arrays


def encode(
    codec: str, array: Any, name: str = "patches", where: str = "array", *, basis: Basis | None = None
) -> dict[str, np.ndarray]:
    """Encodes tokens; leading axes are kept, the last one is the channel, the two before it the grid.

    Args:
      codec: see `parse`.
      array: (..., D) of any float dtype, (..., H, W, D) for a codec that pools.
      name: key of the codes; further arrays' begin with ``<name>.``.
      where: what the array is, for the error.
      basis: of a codec with PCA.

    Returns:
      What `payload_arrays` names, with the leading axes.

    Raises:
      InputError: a value that is not finite in float32, an unknown codec, or no basis for one with PCA.
    """
    parsed = parse(codec)
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))
        first = tuple(int(i) for i in bad[0])
        raise InputError(
            f"{where}: expected finite values, found {values[first]} at {first} and {len(bad) - 1} more like it"
        )
    values = parsed.pooled(values)
    if parsed.pca:
        values = _basis(parsed, basis, where).project(values)
    return quantize.encode(parsed.quantizer, values, parsed.group, name)


def decode(
    codec: str,
    payload: Mapping[str, Any],
    name: str = "patches",
    dtype: Any = np.float32,
    *,
    width: int | None = None,
    basis: Basis | None = None,
) -> Any:
    """Decodes what `encode` gave; NumPy arrays or JAX arrays, also traced.

    Args:
      codec: see `parse`.
      payload: holds what `payload_arrays` names; any leading axes.
      name: key of the codes.
      dtype: of the result; computes in float32.
      width: channels D; read by int4 without PCA where its groups do not divide D.
      basis: of a codec with PCA.

    Returns:
      (..., D) of ``dtype``, on the pooled grid.
    """
    parsed = parse(codec)
    values = quantize.decode(parsed.quantizer, payload, parsed.pca or width, name)
    if parsed.pca:
        values = _basis(parsed, basis, name).restore(values)
    return values.astype(dtype)


def encode_features(
    codec: str, features: ExpertFeatures, ids: Sequence[str], expert: str, basis: Basis | None = None
) -> list[dict[str, np.ndarray]]:
    """Encodes a batch into one payload a record.

    Args:
      codec: see `parse`.
      features: leading axis at least ``len(ids)``; rows beyond are padding and ignored.
      ids: record ids, for the rows in order.
      expert: its name, for errors.
      basis: of a codec with PCA.

    Raises:
      InputError: a value that is not finite; names the record, the expert and the field.
    """
    rows = len(ids)
    coded: dict[str, np.ndarray] = {}
    for name, value in _fields(features):
        value = np.asarray(value)[:rows]
        codec_here = codec if name in CODED else "float32"
        try:
            coded.update(encode(codec_here, value, name, basis=basis))
        except InputError:
            for row, id in enumerate(ids):
                encode(codec_here, value[row], name, f"record {id!r}, expert {expert!r}, {name}", basis=basis)
            raise
    return [{name: value[row] for name, value in coded.items()} for row in range(rows)]


def _number(text: str, part: str, digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
        raise InputError(f"codec {text!r}: {part!r}: expected a number of 1 or more behind the colon, found {digits!r}")
    return int(digits)


def _basis(codec: Codec, basis: Basis | None, where: str) -> Basis:
    if basis is None or len(basis.components) != codec.pca:
        found = "none" if basis is None else f"one of {len(basis.components)}"
        raise InputError(f"{where}: codec {codec} needs a basis of {codec.pca} axes, found {found}")
    return basis


def _fields(features: ExpertFeatures) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in features._asdict().items() if value is not None]
