"""Parts of published arrays, read without the rest, and safetensors written array by array.

Models that do not fit one host's memory go through here: nothing is held beyond the part that is asked for and
one chunk. The format is that of the safetensors library (https://github.com/huggingface/safetensors): eight bytes
with the length of a JSON header, the header with dtype, shape and place of every array, the arrays' bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from tove_jax.errors import InputError
from tove_jax.files.torch_pickle import locate_tensors
from tove_jax.files.weights import TORCH_SUFFIXES, find_weights

CHUNK = 16 << 20
"""Bytes read at once."""

_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
    "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as the library has it


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one array lies.

    Attributes:
      path: its file.
      dtype: as stored.
      shape: of the whole array.
      offset: of its first byte in the file.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self, index: Sequence[slice] = (), *, out: np.ndarray | None = None) -> np.ndarray:
        """Reads a part of the array; rows that are not wanted are not read.

        Args:
          index: a slice (of step 1) an axis; those missing at the end are whole.
          out: where it goes, of the part's shape and any dtype and layout; None: a new array as stored.

        Returns:
          `out`.

        Raises:
          InputError: the file has become shorter.
          ValueError: a slice with a step.
        """
        wanted = [slice(*s.indices(n)) for s, n in zip(index, self.shape, strict=False)]
        wanted += [slice(0, n, 1) for n in self.shape[len(wanted) :]]
        if any(part.step != 1 for part in wanted):
            raise ValueError(f"{self.path}: slices need a step of 1, found {index}")
        shape = tuple(max(part.stop - part.start, 0) for part in wanted)
        result = np.empty(shape, self.dtype) if out is None else out
        if result.shape != shape:
            raise ValueError(f"{self.path}: expected room for {shape}, found {result.shape}")
        if not math.prod(shape):
            return result
        target = result.reshape(1) if not shape else result
        rows = self.shape[1:] if shape else ()
        begin, end = (wanted[0].start, wanted[0].stop) if shape else (0, 1)
        row_bytes = math.prod(rows) * self.dtype.itemsize
        step = max(1, CHUNK // row_bytes)
        with open(self.path, "rb", buffering=0) as stream:
            for first in range(begin, end, step):
                count = min(step, end - first)
                stream.seek(self.offset + first * row_bytes)
                piece = np.empty((count, *rows), self.dtype)
                self._fill(stream, piece)
                target[first - begin : first - begin + count] = piece[(slice(None), *wanted[1:])]
        return result

    def _fill(self, stream: Any, piece: np.ndarray) -> None:
        view = piece.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            found = stream.readinto(view[done:])
            if not found:
                raise InputError(f"{self.path}: ends before its arrays do")
            done += found


class Readable(Protocol):
    """What can be read in parts: an array in a file, or one in memory."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, index: Sequence[slice] = (), *, out: np.ndarray | None = None) -> np.ndarray:
        """See `Stored.read`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """An array in memory, read as `Stored` is."""

    array: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    def read(self, index: Sequence[slice] = (), *, out: np.ndarray | None = None) -> np.ndarray:
        """See `Stored.read`."""
        part = self.array[tuple(index)]
        if out is None:
            return part
        out[...] = part
        return out


def index_arrays(path: Path | str) -> dict[str, Stored]:
    """Finds every array of a file, a folder, or an index of shards; reads headers alone.

    Args:
      path: ``.safetensors``; ``.bin``, ``.pt`` or ``.pth`` in PyTorch's zip container, of which no code is run;
        ``*.index.json`` of such; or a folder (see `tove_jax.files.weights.find_weights`).

    Raises:
      InputError: nothing there, a damaged or truncated file, another format, a missing shard, a shard without
        a promised array or with one more.
    """
    path = find_weights(path)
    if not path.name.endswith(".index.json"):
        return _index_file(path)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected JSON with a weight_map: {error}") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{path}: expected a weight_map from array names to file names")
    found: dict[str, Stored] = {}
    for shard in sorted(set(places.values())):
        file = path.parent / shard
        if Path(shard).name != shard or file.suffix not in (".safetensors", *TORCH_SUFFIXES):
            raise InputError(f"{path}: shard {shard!r} is not a weights file beside the index")
        if not file.is_file():
            raise InputError(f"{path}: shard {file} is missing")
        for name, stored in _index_file(file).items():
            if places.get(name) != shard:
                raise InputError(f"{file}: array {name!r} is not listed for it in {path.name}")
            found[name] = stored
    missing = sorted(set(places) - set(found))
    if missing:
        raise InputError(f"{path}: array {missing[0]!r} is not in its shard {places[missing[0]]}")
    return found


def _index_file(path: Path) -> dict[str, Stored]:
    if path.suffix == ".safetensors":
        return _header(path)
    if path.suffix in TORCH_SUFFIXES:
        return {name: Stored(path, *where) for name, where in locate_tensors(path).items()}
    raise InputError(f"{path}: expected .safetensors or {', '.join(TORCH_SUFFIXES)}")


def _header(path: Path) -> dict[str, Stored]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise InputError(f"{path}: not a sound safetensors file: a header of {length} bytes in {size}")
            content: Any = json.loads(stream.read(length))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a sound safetensors file: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a sound safetensors file: the header is no object")
    found = {}
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise InputError(f"{path}: array {name!r}: not a sound safetensors header")
        if kind not in _DTYPES:
            raise InputError(f"{path}: array {name!r} has dtype {kind}, which NumPy lacks")
        dtype = np.dtype(_DTYPES[kind])
        if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise InputError(f"{path}: array {name!r} {shape} {kind} does not fit its place in {size} bytes")
        found[name] = Stored(path, dtype, shape, 8 + length + begin)
    return found


@dataclasses.dataclass(frozen=True)
class Pending:
    """An array still to be written.

    Attributes:
      dtype, shape: of the array.
      get: gives it.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    get: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_array_files(folder: Path, arrays: Mapping[str, Pending], *, shard_bytes: int = 5_000_000_000) -> list[Path]:
    """Writes arrays as ``model.safetensors``, or as shards with an index, holding one array at a time.

    Args:
      folder: exists; a temporary one (`tove_jax.files.atomic.atomic_folder`), so that nothing half-written stays.
      arrays: by name, in the order in which they are written.
      shard_bytes: a shard holds no more, unless one array does.

    Returns:
      The files written.

    Raises:
      InputError: a dtype that safetensors lacks.
      ValueError: an array is not what was announced.
    """
    shards: list[dict[str, Pending]] = [{}]
    filled = 0
    for name, array in arrays.items():
        if np.dtype(array.dtype) not in _NAMES:
            raise InputError(f"array {name!r}: safetensors has no dtype {array.dtype}")
        if filled and filled + array.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard)
    written = [folder / name for name in names]
    if count > 1:
        index = {
            "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
            "weight_map": {array: name for name, shard in zip(names, shards, strict=True) for array in sorted(shard)},
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        written.append(path)
    return written


def _write(path: Path, arrays: Mapping[str, Pending]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    # The widest first, so that every array is aligned to its own items.
    order = sorted(arrays, key=lambda name: -np.dtype(arrays[name].dtype).itemsize)
    for name in order:
        array = arrays[name]
        header[name] = {
            "dtype": _NAMES[np.dtype(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            content = arrays[name].get()
            if content.shape != tuple(arrays[name].shape) or content.dtype != arrays[name].dtype:
                raise ValueError(f"{name}: announced {arrays[name]}, found {content.dtype} {content.shape}")
            stream.write(np.ascontiguousarray(content).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
