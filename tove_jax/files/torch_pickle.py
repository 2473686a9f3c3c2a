"""Reads the tensors of a PyTorch ``.bin``/``.pt``/``.pth`` file without PyTorch.

Both containers are read: the zip archive (PyTorch 1.6 and later) and the older row of pickles. Only
tensor rebuilding is admitted from the pickle; whatever else it names is refused before it is looked
up, so no code from the file runs. The two containers are described in PyTorch's serialization notes
(https://docs.pytorch.org/docs/stable/notes/serialization.html); the reader is ours.
"""

from __future__ import annotations

import collections
import io
import itertools
import math
import mmap
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from tove_jax.errors import InputError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LARGEST_VISIT = 1_000_000
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "UntypedStorage": np.dtype(np.uint8),
}
_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}


class _Refused(Exception):
    """The pickle asks for something that is not tensor data."""


class _Dtype:
    """A dtype the pickle named; slots, so that the pickle cannot hang anything on it."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _Storage:
    """One block of bytes; filled, or its place noted, after the pickle has been read."""

    __slots__ = ("data", "dtype", "key", "numel", "offset")

    def __init__(self, key: str, dtype: np.dtype, numel: int):
        self.key = key
        self.dtype = dtype
        self.numel = numel
        self.data: bytes | None = None
        self.offset: int | None = None


class _Tensor:
    """A tensor as the pickle describes it: a strided window on a storage, not yet trusted."""

    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None):
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.strides = strides
        self.dtype = dtype


class _Rebuild:
    """Stands for one of torch's rebuilding functions; made anew for every file."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(self, *args: Any) -> Any:
        if self.kind == "parameter":
            return args[0]
        storage, offset, shape, strides = args[:4]
        dtype = args[6].dtype if self.kind == "tensor_v3" else None
        return _Tensor(storage, offset, shape, strides, dtype)


class _Unpickler(pickle.Unpickler):
    """Admits tensor rebuilding and ordered dictionaries, and nothing else."""

    def __init__(self, stream: BinaryIO, storages: dict[str, _Storage]):
        super().__init__(stream, encoding="utf-8")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils":
            if name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
                return _Rebuild("tensor_v2")
            if name == "_rebuild_tensor_v3":
                return _Rebuild("tensor_v3")
            if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
                return _Rebuild("parameter")
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Dtype(_STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return _Dtype(_DTYPES[name])
        if (module, name) == ("torch", "Size"):
            return tuple
        raise _Refused(f"{module}.{name}"[:120])

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise _Refused(f"persistent object {str(pid)[:80]!r}")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(kind, _Dtype) or not isinstance(key, str) or not _is_size(numel):
            raise ValueError(f"malformed storage {key!r}")
        if len(pid) == 6 and pid[5] is not None:
            raise ValueError(f"storage {key!r} is a view of another storage, which PyTorch dropped in 0.4")
        storage = self._storages.setdefault(key, _Storage(key, kind.dtype, numel))
        if storage.dtype != kind.dtype or storage.numel != numel:
            raise ValueError(f"storage {key!r} is described in two ways")
        return storage


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Reads every tensor of a PyTorch file.

    Nested dictionaries and lists are flattened with dots. A file whose top level holds no tensor but
    a ``state_dict``, ``model_state_dict``, ``model`` or ``module`` is read from there. Entries that
    are plain numbers, strings or None are passed over.

    Args:
      path: file written by ``torch.save``.

    Returns:
      Name to array; bfloat16 and float8 as `ml_dtypes` have them.

    Raises:
      InputError: not such a file, truncated, inconsistent, or a pickle that names anything but
        tensor data.
    """
    try:
        with open(path, "rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
            stream.seek(0)
            if zipped:
                return _named(path, *_read_zip(path, stream))
            if not os.fstat(stream.fileno()).st_size:
                raise InputError(f"{path}: expected a PyTorch weights file, found an empty file")
            # A memory map: no read can ask for more memory than the file is long.
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _named(path, *_read_legacy(path, mapped))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def locate_tensors(path: Path) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """Finds every tensor of a PyTorch file without reading its content; names are those of `read_torch`.

    Returns:
      Name to dtype, shape and the first byte's place in the file, where the tensor lies in C order, little-endian.

    Raises:
      InputError: as `read_torch`; the older container, big-endian or strided tensors, which cannot be read in parts.
    """
    whole = "which cannot be read in parts; convert it to safetensors"
    try:
        with open(path, "rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                raise InputError(f"{path}: expected PyTorch's zip container, found its older one or none, {whole}")
            stream.seek(0)
            content, order = _read_zip(path, stream, locate=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if order != "little":
        raise InputError(f"{path}: is big-endian, {whole}")

    def locate(path: Path, name: str, tensor: _Tensor, _order: str) -> tuple[np.dtype, tuple[int, ...], int]:
        storage = tensor.storage
        held = storage.numel * storage.dtype.itemsize if isinstance(storage, _Storage) else 0
        dtype, _ = _check(path, name, tensor, held)
        steps = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        if any(n > 1 and step != own for n, step, own in zip(tensor.shape, steps, tensor.strides, strict=True)):
            raise InputError(f"{path}: tensor {name!r} is strided, {whole}")
        return dtype, tensor.shape, storage.offset + tensor.offset * dtype.itemsize

    return _named(path, content, order, locate)


def _cut_pickle(stream: Any) -> bytes:
    """Returns the next pickle's bytes, its opcodes read through without doing anything they say.

    A damaged index of the unpickler's memo would make it allocate that many slots, and a damaged length
    that many bytes; both are found here first.
    """
    start, slots = stream.tell(), 0
    for opcode, argument, _ in pickletools.genops(stream):
        slots += 1
        memo = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if memo and not (isinstance(argument, int) and 0 <= argument <= slots):
            raise ValueError(f"memo index {str(argument)[:20]} after {slots} operations")
    end = stream.tell()
    stream.seek(start)
    return stream.read(end - start)


def _unpickle(path: Path, stream: Any, storages: dict[str, _Storage]) -> Any:
    try:
        return _Unpickler(io.BytesIO(_cut_pickle(stream)), storages).load()
    except _Refused as error:
        raise InputError(
            f"{path}: refused: the pickle asks for {error}, expected tensors only; nothing of it was run"
        ) from None
    except Exception as error:  # a hostile pickle can raise nearly anything
        raise InputError(
            f"{path}: expected a PyTorch weights file, found a broken pickle: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error


def _read_zip(path: Path, stream: BinaryIO, locate: bool = False) -> tuple[Any, str]:
    try:
        with zipfile.ZipFile(stream) as archive:
            records = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise InputError(f"{path}: expected a PyTorch archive with one data.pkl, found {len(pickles)}")
            prefix = pickles[0][: -len("data.pkl")]
            for info in records.values():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise InputError(f"{path}: record {info.filename} is compressed, expected stored as PyTorch does")
            order = "little"
            if prefix + "byteorder" in records:
                order = archive.read(prefix + "byteorder").decode("ascii", "replace")
            if order not in ("little", "big"):
                raise InputError(f"{path}: byte order is {order[:20]!r}, expected 'little' or 'big'")
            storages: dict[str, _Storage] = {}
            content = _unpickle(path, io.BytesIO(archive.read(pickles[0])), storages)
            for storage in storages.values():
                name = f"{prefix}data/{storage.key}"
                expected = storage.numel * storage.dtype.itemsize
                if name not in records:
                    raise InputError(f"{path}: storage record {name} is missing")
                if records[name].file_size != expected:
                    raise InputError(
                        f"{path}: storage record {name} has {records[name].file_size} bytes, expected {expected}"
                    )
                if locate:
                    storage.offset = _data_offset(path, stream, records[name])
                else:
                    storage.data = archive.read(name)
    except (InputError, OSError):
        raise
    except Exception as error:  # zipfile raises many kinds for one cause: a damaged archive
        raise InputError(f"{path}: damaged PyTorch archive: {type(error).__name__}: {error}") from error
    return content, order


def _data_offset(path: Path, stream: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Returns where a stored record's bytes begin, behind its own header (APPNOTE.TXT, 4.3.7)."""
    stream.seek(info.header_offset)
    header = stream.read(30)
    offset = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if header[:4] != b"PK\x03\x04" or offset + info.file_size > os.fstat(stream.fileno()).st_size:
        raise InputError(f"{path}: record {info.filename} does not lie where the archive says")
    return offset


def _read_legacy(path: Path, stream: Any) -> tuple[Any, str]:
    magic = _unpickle(path, stream, {})
    if magic != _LEGACY_MAGIC or isinstance(magic, bool):
        raise InputError(f"{path}: expected a PyTorch weights file, found another pickle")
    protocol = _unpickle(path, stream, {})
    if protocol != _LEGACY_PROTOCOL:
        raise InputError(f"{path}: PyTorch container version {protocol!r}, expected {_LEGACY_PROTOCOL}")
    system = _unpickle(path, stream, {})
    little = system.get("little_endian", True) if isinstance(system, Mapping) else True
    storages: dict[str, _Storage] = {}
    content = _unpickle(path, stream, storages)
    keys = _unpickle(path, stream, {})
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"{path}: damaged list of storages")
    for key in keys:
        header = stream.read(8)
        if len(header) != 8:
            raise InputError(f"{path}: truncated before storage {key}")
        (numel,) = struct.unpack("<q" if little else ">q", header)
        storage = storages.get(key)
        if storage is None or storage.numel != numel:
            found = "no tensor" if storage is None else f"{storage.numel} elements in the pickle"
            raise InputError(f"{path}: storage {key} has {numel} elements, {found}")
        size = numel * storage.dtype.itemsize
        storage.data = stream.read(size)
        if len(storage.data) != size:
            raise InputError(f"{path}: truncated: storage {key} has {len(storage.data)} bytes, expected {size}")
    missing = [storage.key for storage in storages.values() if storage.data is None]
    if missing:
        raise InputError(f"{path}: storage {missing[0]} is missing")
    return content, "little" if little else "big"


def _check(path: Path, name: str, tensor: _Tensor, held: int | None = None) -> tuple[np.dtype, int]:
    """Refuses a tensor that is no window on its storage; returns its dtype and the storage's elements of that dtype.

    Args:
      path, name, tensor: see `_array`.
      held: bytes of the storage; None: those that were read.
    """
    storage = tensor.storage
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    sound = (
        isinstance(storage, _Storage)
        and (held is not None or isinstance(storage.data, bytes))
        and isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides) <= 32
        and all(_is_size(value) for value in (*shape, *strides, offset))
        and (tensor.dtype is None or isinstance(tensor.dtype, np.dtype))
    )
    if not sound:
        raise InputError(f"{path}: tensor {name!r} is malformed: shape {str(shape)[:80]}, strides {str(strides)[:80]}")
    dtype = tensor.dtype or storage.dtype
    available = (len(storage.data) if held is None else held) // dtype.itemsize
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if count else 0
    if (count and last >= available) or count >= 2**62:
        raise InputError(
            f"{path}: tensor {name!r} of shape {shape}, strides {strides}, offset {offset} "
            f"reaches beyond its storage of {available} elements"
        )
    if not count and any(size >= 2**31 for size in shape):
        raise InputError(f"{path}: tensor {name!r} is malformed: shape {shape}")
    return dtype, available


def _array(path: Path, name: str, tensor: _Tensor, order: str) -> np.ndarray:
    dtype, available = _check(path, name, tensor)
    storage, shape, strides, offset = tensor.storage, tensor.shape, tensor.strides, tensor.offset
    count = math.prod(shape)
    if not count:
        return np.zeros(shape, dtype)
    flat = np.frombuffer(storage.data, dtype.newbyteorder(">") if order == "big" and dtype.itemsize > 1 else dtype)
    steps = tuple(stride * dtype.itemsize for stride in strides)
    view = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)
    if count > available:  # an expanded tensor: copying it could take any amount of memory
        return view
    return np.array(view, dtype=dtype, order="C")


def _named(path: Path, content: Any, order: str, make: Callable[..., Any] | None = None) -> dict[str, Any]:
    if isinstance(content, Mapping) and not any(isinstance(value, _Tensor) for value in content.values()):
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
                break
    arrays: dict[str, Any] = {}
    visits = itertools.count()

    def visit(name: str, value: Any, depth: int) -> None:
        if next(visits) > _LARGEST_VISIT:  # a few lists that hold each other can stand for any number
            raise InputError(f"{path}: more than {_LARGEST_VISIT} entries")
        if depth > 32:
            raise InputError(f"{path}: nested deeper than 32 at {name[:80]!r}")
        if isinstance(value, _Tensor):
            if name in arrays:
                raise InputError(f"{path}: two tensors are called {name!r}")
            arrays[name] = (make or _array)(path, name, value, order)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(join(name, key), item, depth + 1)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                visit(join(name, index), item, depth + 1)

    def join(name: str, key: Any) -> str:
        return f"{name}.{key}" if name else str(key)

    visit("" if not isinstance(content, _Tensor) else "tensor", content, 0)
    if not arrays:
        raise InputError(f"{path}: expected tensors, found none")
    return arrays
