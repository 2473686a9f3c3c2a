"""How values are stored: floats, or small integers with a scale for each token or group of channels.

Encoding is NumPy on the host; decoding uses only array operations, so it runs inside jit as well as on
NumPy arrays.

Largest error of a finite float32 value x in a token with largest magnitude m, or in a group of channels
from l to h:

- float32, 4 bytes a value: none
- bf16, 2 bytes: ``abs(x) / 2**8``
- int8, 1 byte: ``m / 254``
- fp8 (e4m3), 1 byte: the larger of ``abs(x) / 16`` and ``m / (448 * 2**10)``
- int4, half a byte: ``((h - l) + abs(l) / 2**7) / 29``, for magnitudes up to 2**125

each up to float32 rounding, and up to the smallest normal float32. The scale of int8 and fp8 is a float32 a
token: half precision would overflow above 8.3e6 and lose the small tokens, to save two bytes of some hundreds.
A group of int4 has a lower end and a step, both bfloat16: features behind a ReLU use all sixteen levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

STORED = {"float32": "float32", "bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn", "int4": "uint8"}
"""Quantizer -> dtype of its codes."""
GROUP = 64
"""Channels of an int4 group where none are named."""

# The largest code of each scaled quantizer: absmax of a token is mapped onto it.
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_LEVELS = 15.0
_TINY = np.finfo(np.float32).tiny
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# int4's ends stay well inside the range, so that no sum of a lower end and fifteen steps overflows.
_INT4_LIMIT = np.float32(2.0**125)


def groups(width: int, group: int) -> tuple[int, int]:
    """Returns number and width of the groups that `width` channels are cut into; the last may be padded."""
    group = min(group, width + width % 2)
    return (-(-width // group) if group else 0), group


def arrays(quantizer: str, shape: Sequence[int], group: int, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns payload array -> (shape, dtype name) of values of a shape (..., D)."""
    shape = tuple(int(side) for side in shape)
    if quantizer == "int4":
        count, group = groups(shape[-1], group)
        ends = ((*shape[:-1], count), "bfloat16")
        return {name: ((*shape[:-1], count, group // 2), "uint8"), f"{name}.low": ends, f"{name}.step": ends}
    found = {name: (shape, STORED[quantizer])}
    if quantizer in _LARGEST:
        found[f"{name}.scale"] = ((*shape[:-1], 1), "float32")
    return found


def encode(quantizer: str, values: np.ndarray, group: int, name: str) -> dict[str, np.ndarray]:
    """Encodes finite float32 values (..., D); see `arrays` for what comes out."""
    if quantizer == "float32":
        return {name: values}
    if quantizer == "bf16":
        # Rounding up from beyond the largest bfloat16 would give infinity.
        limit = np.float32(ml_dtypes.finfo(_BFLOAT16).max)
        return {name: np.clip(values, -limit, limit).astype(_BFLOAT16)}
    if quantizer == "int4":
        return _encode_int4(values, group, name)
    largest = np.float32(_LARGEST[quantizer])
    absmax = np.max(np.abs(values), axis=-1, keepdims=True, initial=0.0)
    # Bounded above so that the largest code times the scale stays finite.
    ceiling = np.nextafter(np.finfo(np.float32).max / largest, np.float32(0))
    scale = np.minimum(absmax / largest, ceiling).astype(np.float32)
    # Devices flush subnormal numbers to zero, so a token that small is stored as zero outright.
    scale[scale < _TINY] = 0.0
    codes = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    codes = np.clip(np.rint(codes) if quantizer == "int8" else codes, -largest, largest)
    dtype = np.int8 if quantizer == "int8" else ml_dtypes.float8_e4m3fn
    return {name: codes.astype(dtype), f"{name}.scale": scale}


def decode(quantizer: str, payload: Mapping[str, Any], width: int | None, name: str) -> Any:
    """Decodes what `encode` gave to float32 (..., D); NumPy or JAX arrays, also traced.

    Args:
      quantizer: one of `STORED`.
      payload: holds what `arrays` names; any leading axes.
      width: D, where int4's last group may be padded; None: it is not.
      name: key of the codes.
    """
    codes = payload[name]
    if quantizer == "int4":
        space = codes.__array_namespace__()
        levels = space.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.float32)
        low, step = (payload[f"{name}.{end}"].astype(np.float32)[..., None] for end in ("low", "step"))
        values = low + levels * step
        return values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1])[..., :width]
    values = codes.astype(np.float32)
    return values * payload[f"{name}.scale"] if quantizer in _LARGEST else values


def _encode_int4(values: np.ndarray, group: int, name: str) -> dict[str, np.ndarray]:
    width = values.shape[-1]
    count, group = groups(width, group)
    values = np.clip(values, -_INT4_LIMIT, _INT4_LIMIT)
    if count * group != width:
        # The last channel again: it widens no group.
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, count * group - width)], mode="edge")
    values = values.reshape(*values.shape[:-1], count, group)
    lowest = values.min(axis=-1, keepdims=True, initial=np.inf) if values.size else np.zeros((*values.shape[:-1], 1))
    highest = values.max(axis=-1, keepdims=True, initial=-np.inf) if values.size else lowest
    # A step toward minus infinity in bfloat16's own grid, so that the lower end lies below every value.
    low = _toward(lowest.astype(np.float32), -np.inf)
    step = _toward((highest - low.astype(np.float32)) / np.float32(_LEVELS), np.inf)
    steps = step.astype(np.float32)
    codes = np.divide(values - low.astype(np.float32), steps, out=np.zeros_like(values), where=steps > 0)
    codes = np.clip(np.rint(codes), 0, _LEVELS).astype(np.uint8)
    first, second = codes[..., : group // 2], codes[..., group // 2 :]
    return {name: first | second << 4, f"{name}.low": low[..., 0], f"{name}.step": step[..., 0]}


def _toward(values: np.ndarray, end: float) -> np.ndarray:
    """Rounds float32 to bfloat16 toward an end, subnormal numbers to zero or the smallest normal one."""
    rounded = values.astype(_BFLOAT16)
    wide = rounded.astype(np.float32)
    missed = wide > values if end < 0 else wide < values
    rounded = np.where(missed, np.nextafter(rounded, _BFLOAT16.type(end)), rounded)
    # Devices flush subnormal numbers to zero.
    small = np.abs(rounded.astype(np.float32)) < _TINY
    outward = np.where(values != 0, np.float32(np.sign(end) * _TINY), np.float32(0)).astype(_BFLOAT16)
    toward_end = values < 0 if end < 0 else values > 0
    return np.where(small, np.where(toward_end, outward, _BFLOAT16.type(0)), rounded)
