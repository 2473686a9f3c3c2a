"""Shards of a feature store: claimed by one process, written whole, described by an index.

For each shard there is a file of records and an index::

    shard-00000-of-00012.records    one record a picture (or .arrayrecord, see `tove_jax.experts.media`)
    shard-00000-of-00012.json       ids, CRCs, size and SHA-256 of the file, running sums

A record is the payload arrays in the manifest's order (C order, little endian). Its CRC-32 is taken over the
payload and the record's id in UTF-8. An ArrayRecord holds id and CRC (little endian) behind the payload too. The index
appears after its shard, so a shard with an index is a finished one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.errors import InputError
from tove_jax.experts import media
from tove_jax.experts.manifest import Manifest, Moments
from tove_jax.files.atomic import atomic_write_json

CRC = struct.Struct("<I")
_POLL_SECONDS = 0.02


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turns what the system says of a full disk or a forbidden folder into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from error


class ShardWriter:
    """Writes one shard to a temporary name; `finish` renames it into place and writes its index.

    Used as a context manager; without `finish` nothing is left behind. The caller makes sure that
    no other process writes the same shard.
    """

    def __init__(self, folder: Path, manifest: Manifest, number: int) -> None:
        self.path = Path(folder) / manifest.shards[number].file
        self._partial = partial_path(self.path)
        self._manifest = manifest
        self._expected = manifest.shards[number].records
        self._ids: list[str] = []
        self._crcs: list[int] = []
        self._writer: media.Writer | None = None

    def __enter__(self) -> ShardWriter:
        with self._faults():
            self._partial.unlink(missing_ok=True)
            self._writer = media.open_writer(self._manifest.medium, self._partial, self._manifest.record_bytes)
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._writer is not None:
            with contextlib.suppress(RuntimeError, OSError):
                self._writer.close()
            self._writer = None
        self._partial.unlink(missing_ok=True)

    def write(self, id: str, payload: Mapping[str, np.ndarray]) -> int:
        """Appends a record and returns its size in bytes.

        Raises:
          InputError: an array of another shape or dtype than the manifest's, or the disk is full.
        """
        found = {name: (tuple(value.shape), value.dtype.name) for name, value in payload.items()}
        wanted = {name: (spec.shape, spec.dtype) for name, spec in self._manifest.arrays.items()}
        if found != wanted:
            raise InputError(
                f"record {id!r}, expert {self._manifest.expert['name']!r}: expected {wanted}, found {found}"
            )
        record = b"".join(np.ascontiguousarray(payload[name]).tobytes() for name in self._manifest.arrays)
        crc = record_crc(record, id)
        if self._manifest.medium == "arrayrecord":
            record = b"".join((record, id.encode(), CRC.pack(crc)))
        assert self._writer is not None, "ShardWriter is used as a context manager"
        with self._faults():
            self._writer.write(record)
        self._ids.append(id)
        self._crcs.append(crc)
        return len(record)

    def finish(self, moments: Moments) -> None:
        """Puts the shard in place: close, sync, rename, then the index.

        Args:
          moments: running sums of this shard's patches.

        Raises:
          InputError: the disk is full, or the number of records is not the manifest's.
        """
        if len(self._ids) != self._expected:
            raise InputError(f"{self.path}: expected {self._expected} records, found {len(self._ids)}")
        writer, self._writer = self._writer, None
        assert writer is not None, "finish is called once"
        with self._faults():
            writer.close()
        with writing(self._partial):
            with open(self._partial, "rb") as stream:
                os.fsync(stream.fileno())
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                size = os.fstat(stream.fileno()).st_size
            os.replace(self._partial, self.path)
        index = {
            "format": self._manifest.format,
            "identity": self._manifest.identity(),
            "file": self.path.name,
            "records": len(self._ids),
            "bytes": size,
            "sha256": digest,
            "moments": moments.state(),
            "ids": self._ids,
            "crc32": self._crcs,
        }
        atomic_write_json(index_path(self.path), index, indent=None)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{self.path}: cannot be written: {reason}") from error


def record_crc(payload: Any, id: str) -> int:
    """Returns the CRC-32 of a record's payload and id."""
    return zlib.crc32(id.encode(), zlib.crc32(payload))


def index_path(shard: Path) -> Path:
    """Returns the path of a shard's index."""
    return shard.with_suffix(".json")


def partial_path(shard: Path) -> Path:
    """Returns the name under which a shard is written before it is whole."""
    return shard.with_name(shard.name + ".partial")


def lock_path(shard: Path) -> Path:
    """Returns the file that whoever writes a shard holds locked."""
    return shard.with_suffix(".lock")


def read_index(folder: Path, manifest: Manifest, number: int) -> dict[str, Any]:
    """Reads a shard's index and compares it with the manifest and the shard's size, without reading the shard.

    Raises:
      InputError: index or shard missing, another size than written, another store's shard.
    """
    entry = manifest.shards[number]
    shard = Path(folder) / entry.file
    path = index_path(shard)
    try:
        index = json.loads(path.read_bytes())
        found = (index["format"], index["identity"], index["file"], index["records"])
        size, count = index["bytes"], (len(index["ids"]), len(index["crc32"]))
        total, digest = index["moments"]["values"], index["sha256"]
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; the shard's index was expected here") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a shard's index: {type(error).__name__} {error}") from error
    wanted = (manifest.format, manifest.identity(), entry.file, entry.records)
    if found != wanted:
        names = ("format", "identity of expert, weights, view and codec", "file", "records")
        name, want, have = next((name, w, h) for name, w, h in zip(names, wanted, found, strict=True) if w != h)
        raise InputError(f"{path}: another store's shard: {name}: expected {want!r}, found {have!r}")
    if count != (entry.records, entry.records) or not isinstance(total, int):
        raise InputError(f"{path}: expected {entry.records} ids and CRCs, found {count}")
    try:
        actual = shard.stat().st_size
    except OSError as error:
        raise InputError(f"{shard}: missing; a shard of {entry.records} records was expected here") from error
    if actual != size:
        raise InputError(f"{shard}: expected {size} bytes, found {actual}: truncated or overwritten")
    if manifest.complete and (entry.bytes, entry.sha256) != (size, digest):
        raise InputError(f"{path}: expected the shard of {entry.bytes} bytes, sha256 {entry.sha256}, found {digest}")
    return index


def is_done(folder: Path, manifest: Manifest, number: int) -> bool:
    """Whether a shard is there with a sound index; its records are not read."""
    if not index_path(folder / manifest.shards[number].file).exists():
        return False
    try:
        read_index(folder, manifest, number)
    except InputError:
        return False
    return True


@contextlib.contextmanager
def claim(path: Path, wait: bool = False) -> Iterator[bool]:
    """Holds a lock file, and removes it at the end; yields whether it was got.

    The lock is the system's (flock), so a killed holder frees it. A holder removes the file, so
    whoever gets a lock makes sure that it is still the file of that name.
    """
    handle = None
    while handle is None:
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.stat(path)
            here = os.fstat(opened)
            if (current.st_ino, current.st_dev) == (here.st_ino, here.st_dev):
                handle = opened
                continue
        except BlockingIOError:
            if not wait:
                os.close(opened)
                yield False
                return
            time.sleep(_POLL_SECONDS)
        except FileNotFoundError:
            pass
        os.close(opened)
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)
