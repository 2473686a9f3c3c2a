"""How patch tokens are stored: float32, bf16, int8 or fp8, the last two with a scale a token.

Encoding is NumPy on the host; decoding uses only array methods, so it runs inside jit as well as
on NumPy arrays. Only patches are coded: the summary and CLS attention are small and stay float32.

Largest error of a finite float32 value x in a token with largest magnitude m:

- float32, 4 bytes a value: none
- bf16, 2 bytes: ``abs(x) / 2**8``
- int8, 1 byte: ``m / 254``
- fp8 (e4m3), 1 byte: the larger of ``abs(x) / 16`` and ``m / (448 * 2**10)``

each up to float32 rounding, and up to the smallest normal float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from tove_jax.errors import InputError, nearest
from tove_jax.experts.base import ExpertFeatures

if TYPE_CHECKING:
    from tove_jax.experts.manifest import Manifest

_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
_STORED = {"float32": "float32", "bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}
# The largest code of each scaled codec: absmax of a token is mapped onto it.
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_TINY = np.finfo(np.float32).tiny

CODECS: tuple[str, ...] = tuple(_STORED)
CODED = ("patches",)
"""The fields of `ExpertFeatures` that the codec touches; the others are float32."""


def dtype_of(name: str) -> np.dtype:
    """Returns the NumPy dtype of a stored dtype's name.

    Raises:
      InputError: a dtype that no codec writes.
    """
    if name not in _DTYPES:
        raise InputError(f"stored dtype: expected one of {', '.join(_DTYPES)}, found {name!r}")
    return _DTYPES[name]


def _check(codec: str) -> None:
    if codec not in _STORED:
        raise InputError(f"codec: expected one of {', '.join(CODECS)}, found {codec!r}{nearest(codec, CODECS)}")


def payload_arrays(codec: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns what one record holds.

    Args:
      codec: one of `CODECS`.
      shapes: field of `ExpertFeatures` -> its shape without the batch axis.

    Returns:
      payload array -> (shape, dtype name), in the order in which a record stores them.
    """
    _check(codec)
    arrays: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in shapes.items():
        shape = tuple(int(side) for side in shape)
        if name not in CODED:
            arrays[name] = (shape, "float32")
            continue
        arrays[name] = (shape, _STORED[codec])
        if codec in _LARGEST:
            arrays[f"{name}.scale"] = ((*shape[:-1], 1), "float32")
    return arrays


def encode(codec: str, array: Any, name: str = "patches", where: str = "array") -> dict[str, np.ndarray]:
    """Encodes tokens; leading axes are kept, the last one is the channel.

    The scale of int8 and fp8 is a float32 a token: half precision would overflow above 8.3e6 and
    lose the small tokens, to save two bytes of some hundreds.

    Args:
      codec: one of `CODECS`.
      array: (..., D) of any float dtype.
      name: key of the codes; the scale's is ``<name>.scale``.
      where: what the array is, for the error.

    Returns:
      ``{name: (..., D)}`` and, for int8 and fp8, ``{"<name>.scale": float32 (..., 1)}``.

    Raises:
      InputError: a value that is not finite in float32, or an unknown codec.
    """
    _check(codec)
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))
        first = tuple(int(i) for i in bad[0])
        raise InputError(
            f"{where}: expected finite values, found {values[first]} at {first} and {len(bad) - 1} more like it"
        )
    dtype = _DTYPES[_STORED[codec]]
    if codec == "float32":
        return {name: values}
    if codec == "bf16":
        # Rounding up from beyond the largest bfloat16 would give infinity.
        limit = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
        return {name: np.clip(values, -limit, limit).astype(dtype)}
    largest = np.float32(_LARGEST[codec])
    absmax = np.max(np.abs(values), axis=-1, keepdims=True, initial=0.0)
    # Bounded above so that the largest code times the scale stays finite.
    ceiling = np.nextafter(np.finfo(np.float32).max / largest, np.float32(0))
    scale = np.minimum(absmax / largest, ceiling).astype(np.float32)
    # Devices flush subnormal numbers to zero, so a token that small is stored as zero outright.
    scale[scale < _TINY] = 0.0
    codes = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    codes = np.clip(np.rint(codes) if codec == "int8" else codes, -largest, largest)
    return {name: codes.astype(dtype), f"{name}.scale": scale}


def decode(codec: str, payload: Mapping[str, Any], name: str = "patches", dtype: Any = np.float32) -> Any:
    """Decodes what `encode` gave; NumPy arrays or JAX arrays, also traced.

    Args:
      codec: one of `CODECS`.
      payload: holds ``name`` and, for int8 and fp8, ``<name>.scale``; any leading axes.
      name: key of the codes.
      dtype: of the result; the product with the scale is taken in float32.

    Returns:
      (..., D) of ``dtype``.
    """
    _check(codec)
    values = payload[name].astype(np.float32)
    if codec in _LARGEST:
        values = values * payload[f"{name}.scale"]
    return values.astype(dtype)


def encode_features(
    codec: str, features: ExpertFeatures, ids: Sequence[str], expert: str
) -> list[dict[str, np.ndarray]]:
    """Encodes a batch into one payload a record.

    Args:
      codec: one of `CODECS`.
      features: leading axis at least ``len(ids)``; rows beyond are padding and ignored.
      ids: record ids, for the rows in order.
      expert: its name, for errors.

    Raises:
      InputError: a value that is not finite; names the record, the expert and the field.
    """
    rows = len(ids)
    coded: dict[str, np.ndarray] = {}
    for name, value in _fields(features):
        value = np.asarray(value)[:rows]
        codec_here = codec if name in CODED else "float32"
        try:
            coded.update(encode(codec_here, value, name))
        except InputError:
            for row, id in enumerate(ids):
                encode(codec_here, value[row], name, f"record {id!r}, expert {expert!r}, {name}")
            raise
    return [{name: value[row] for name, value in coded.items()} for row in range(rows)]


def decode_features(manifest: Manifest, payload: Mapping[str, Any], dtype: Any = np.float32) -> ExpertFeatures:
    """Decodes a batch of payloads, inside jit or outside.

    Args:
      manifest: of the store the payload comes from.
      payload: payload array -> (B, ...), as a loader stacks them.
      dtype: of the patches; the other fields stay float32.

    Returns:
      ExpertFeatures with leading axis B; fields that the store lacks are None.
    """
    fields = {}
    for name in manifest.shapes:
        if name in CODED:
            fields[name] = decode(manifest.codec, payload, name, dtype)
        else:
            fields[name] = payload[name]
    return ExpertFeatures(**fields)


@dataclasses.dataclass(frozen=True)
class CodecError:
    """What a codec costs and loses on some tokens.

    Attributes:
      bytes: stored bytes a record of these tokens.
      relative: root of (sum of squared errors / sum of squares).
      largest: largest absolute error.
    """

    bytes: float
    relative: float
    largest: float


def reconstruction_errors(tokens: Any) -> dict[str, CodecError]:
    """Returns, for each codec, its cost and its error on ``tokens`` (records, ..., D) float32."""
    tokens = np.asarray(tokens, np.float32)
    power = float(np.sum(np.square(tokens, dtype=np.float64)))
    result = {}
    for codec in CODECS:
        payload = encode(codec, tokens)
        error = decode(codec, payload).astype(np.float64) - tokens
        result[codec] = CodecError(
            bytes=sum(value.nbytes for value in payload.values()) / max(1, len(tokens)),
            relative=float(np.sqrt(np.sum(np.square(error)) / power)) if power else 0.0,
            largest=float(np.max(np.abs(error), initial=0.0)),
        )
    return result


def _fields(features: ExpertFeatures) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in features._asdict().items() if value is not None]
