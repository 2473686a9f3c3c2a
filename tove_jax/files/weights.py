"""Reads weights from the files they are published in, as NumPy arrays, and hashes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.errors import InputError
from tove_jax.files.torch_pickle import read_torch

# In the order in which a folder is searched: safetensors first, for it cannot hold code.
_IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TORCH_SUFFIXES = (".bin", ".pt", ".pth")


def find_weights(path: Path | str) -> Path:
    """Returns the weights file of a folder, or the file itself.

    Args:
      path: a weights file, or a folder with ``model.safetensors``, ``model.safetensors.index.json``,
        ``pytorch_model.bin`` or ``pytorch_model.bin.index.json`` (looked for in this order).

    Raises:
      InputError: nothing there, or a folder without such a file.
    """
    path = Path(path)
    if path.is_dir():
        for name in _IN_FOLDER:
            if (path / name).is_file():
                return path / name
        raise InputError(f"{path}: expected one of {', '.join(_IN_FOLDER)} in this folder, found none")
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    return path


def read_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """Reads named arrays from a file or folder, never running code from it and without torch.

    Args:
      path: ``.safetensors``; ``.bin``, ``.pt`` or ``.pth`` as ``torch.save`` writes a state dict (see
        `tove_jax.files.torch_pickle.read_torch`); an index of shards (``*.index.json``); or a folder
        (see `find_weights`).

    Returns:
      Name to array in the file's own dtype (bfloat16 through `ml_dtypes`).

    Raises:
      InputError: missing, damaged or truncated file, a shard without a promised array, or a pickle
        that asks for more than tensors.
    """
    path = find_weights(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return read_torch(path)
    raise InputError(f"{path}: expected .safetensors, {', '.join(TORCH_SUFFIXES)} or .index.json")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    arrays = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():
                try:
                    # Copied: the file may be replaced while its arrays are still in use.
                    arrays[name] = np.array(file.get_tensor(name))
                except (AttributeError, TypeError, KeyError) as error:
                    dtype = file.get_slice(name).get_dtype()
                    raise InputError(f"{path}: array {name!r} has dtype {dtype}, which NumPy lacks") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a sound safetensors file: {error}") from error
    return arrays


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{index}: expected JSON with a weight_map: {error}") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{index}: expected a weight_map from array names to file names")
    arrays: dict[str, np.ndarray] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or shard.endswith(".index.json"):
            raise InputError(f"{index}: shard {shard!r} is not a plain file name beside the index")
        if not (index.parent / shard).is_file():
            raise InputError(f"{index}: shard {index.parent / shard} is missing")
        found = read_arrays(index.parent / shard)
        for name, array in found.items():
            if places.get(name) != shard:
                raise InputError(f"{index.parent / shard}: array {name!r} is not listed for it in {index.name}")
            arrays[name] = array
    missing = sorted(set(places) - set(arrays))
    if missing:
        raise InputError(f"{index}: array {missing[0]!r} is not in its shard {places[missing[0]]}")
    return arrays


def hash_arrays(arrays: Mapping[str, Any]) -> str:
    """Hashes named arrays: sha256 over names in order, dtypes, shapes and little-endian bytes.

    The result depends neither on the order of the mapping, nor on memory layout, nor on the file
    format the arrays came from.

    Args:
      arrays: name to array (NumPy or JAX).

    Returns:
      64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        header = json.dumps([name, array.dtype.name, list(array.shape)])
        digest.update(f"{len(header)}:{header}".encode())
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_file(path: Path | str) -> str:
    """Returns the sha256 of a file's bytes, 64 hexadecimal digits.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
