"""Feature shards: written whole, found by record id, checked on every read.

A store is a folder with `manifest.json` and, for each shard, an ArrayRecord file and an index::

    shard-00000-of-00012.arrayrecord    one record a picture: payload arrays, id, CRC-32
    shard-00000-of-00012.json           ids, CRCs, size and SHA-256 of the file, running sums

A record is the payload arrays in the manifest's order (C order, little endian), the record id in
UTF-8 and the CRC-32 of both, little endian. The index appears after its shard, so a shard with an
index is a finished one.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from tove_jax.errors import InputError
from tove_jax.experts import codecs
from tove_jax.experts.base import ExpertFeatures
from tove_jax.experts.manifest import FILE_NAME, FORMAT, Manifest, Moments, hash_ids
from tove_jax.files.atomic import atomic_write_json

_CRC = struct.Struct("<I")
# One record a group, so that a random read touches one record; bytes of floats hardly compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 32768
# Open shards a store keeps: four experts of thousands of shards would exhaust a process's files.
_OPEN_SHARDS = 128


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
        self._writer: Any = None

    def __enter__(self) -> ShardWriter:
        with writing(self._partial):
            self._partial.unlink(missing_ok=True)
            # ArrayRecord's writer says nothing on opening; the system's own answer is the better error.
            os.close(os.open(self._partial, os.O_WRONLY | os.O_CREAT, 0o644))
        with self._faults():
            self._writer = ArrayRecordWriter(str(self._partial), _WRITER_OPTIONS)
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):
                self._writer.close()
            self._writer = None
        self._partial.unlink(missing_ok=True)

    def write(self, id: str, payload: Mapping[str, np.ndarray]) -> int:
        """Appends a record and returns its size in bytes.

        Raises:
          InputError: an array of another shape or dtype than the manifest's, or the disk is full.
        """
        parts = []
        found = {name: (tuple(value.shape), value.dtype.name) for name, value in payload.items()}
        wanted = {name: (spec.shape, spec.dtype) for name, spec in self._manifest.arrays.items()}
        if found != wanted:
            raise InputError(
                f"record {id!r}, expert {self._manifest.expert['name']!r}: expected {wanted}, found {found}"
            )
        for name in self._manifest.arrays:
            parts.append(np.ascontiguousarray(payload[name]).tobytes())
        parts.append(id.encode())
        body = b"".join(parts)
        crc = zlib.crc32(body)
        with self._faults():
            self._writer.write(body + _CRC.pack(crc))
            if not self._writer.ok():
                self._writer.close()
        self._ids.append(id)
        self._crcs.append(crc)
        return len(body) + _CRC.size

    def finish(self, moments: Moments) -> None:
        """Puts the shard in place: close, sync, rename, then the index.

        Args:
          moments: running sums of this shard's patches.

        Raises:
          InputError: the disk is full, or the number of records is not the manifest's.
        """
        if len(self._ids) != self._expected:
            raise InputError(f"{self.path}: expected {self._expected} records, found {len(self._ids)}")
        with self._faults():
            writer, self._writer = self._writer, None
            writer.close()
        with writing(self._partial):
            with open(self._partial, "rb") as stream:
                os.fsync(stream.fileno())
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                size = os.fstat(stream.fileno()).st_size
            os.replace(self._partial, self.path)
        atomic_write_json(
            index_path(self.path),
            {
                "format": FORMAT,
                "identity": self._manifest.identity(),
                "file": self.path.name,
                "records": len(self._ids),
                "bytes": size,
                "sha256": digest,
                "moments": moments.state(),
                "ids": self._ids,
                "crc32": self._crcs,
            },
            indent=None,
        )

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise InputError(f"{self.path}: cannot be written: {error}") from error


def index_path(shard: Path) -> Path:
    """Returns the path of a shard's index."""
    return shard.with_suffix(".json")


def partial_path(shard: Path) -> Path:
    """Returns the name under which a shard is written before it is whole."""
    return shard.with_name(shard.name + ".partial")


def read_index(folder: Path, manifest: Manifest, number: int) -> dict[str, Any]:
    """Reads the index of a finished shard and checks it against manifest and file, without reading the file.

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
    wanted = (FORMAT, manifest.identity(), entry.file, entry.records)
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


class FeatureStore:
    """Reads a finished store by record id.

    Safe to use from several threads; pickles as its path and opens anew where it is unpickled.

    Attributes:
      path: folder.
      manifest: what it holds.
      ids: record ids, in stored order.
      verify: whether every read compares CRC-32.
    """

    def __init__(self, path: Path, manifest: Manifest, indices: Sequence[Mapping[str, Any] | None], verify: bool):
        self.path, self.manifest, self.verify = path, manifest, verify
        self.ids: tuple[str, ...] = tuple(id for index in indices if index for id in index["ids"])
        self._crcs = {number: index["crc32"] for number, index in enumerate(indices) if index}
        self._places = {
            id: (number, position)
            for number, index in enumerate(indices)
            if index
            for position, id in enumerate(index["ids"])
        }
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> FeatureStore:
        """Opens a store, checking manifest, indices and the presence and size of every shard.

        Args:
          path: folder of the store.
          verify: compare the CRC-32 of every record read (about a third of the reading speed).

        Raises:
          InputError: no manifest, not all extracted, a missing, truncated or foreign shard; names the file.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        if not manifest.complete:
            done = sum(index_path(path / shard.file).exists() for shard in manifest.shards)
            raise InputError(
                f"{path}: extraction is not finished, {done} of {len(manifest.shards)} shards; run `tove extract` again"
            )
        indices = [read_index(path, manifest, number) for number in range(len(manifest.shards))]
        store = cls(path, manifest, indices, verify)
        found = hash_ids(store.ids)
        if found != manifest.ids_hash:
            raise InputError(f"{path / FILE_NAME}: expected record ids {manifest.ids_hash}, found {found} in shards")
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.verify)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id: object) -> bool:
        return id in self._places

    def read(self, id: str) -> dict[str, np.ndarray]:
        """Reads one record.

        Returns:
          payload array -> encoded array of the manifest's shape and dtype, read-only.

        Raises:
          InputError: no such record, or a damaged one; names the record and the shard.
        """
        place = self._places.get(id)
        if place is None:
            raise InputError(f"{self.path}: no features of record {id!r} among its {len(self.ids)} records")
        number, position = place
        where = f"{self.path / self.manifest.shards[number].file}: record {id!r}"
        try:
            record = self._reader(number).read([position])[0]
        except (RuntimeError, IndexError) as error:
            raise InputError(f"{where}: damaged: {error}") from error
        name = id.encode()
        expected = self.manifest.record_bytes + len(name) + _CRC.size
        if len(record) != expected:
            raise InputError(f"{where}: expected {expected} bytes, found {len(record)}")
        if self.verify:
            stored = _CRC.unpack_from(record, expected - _CRC.size)[0]
            crc = zlib.crc32(memoryview(record)[: -_CRC.size])
            if not crc == stored == self._crcs[number][position]:
                raise InputError(f"{where}: damaged: CRC-32 of its bytes is {crc:08x}, {stored:08x} was written")
        if record[self.manifest.record_bytes : -_CRC.size] != name:
            raise InputError(f"{where}: another record is stored in its place")
        payload, offset = {}, 0
        for key, spec in self.manifest.arrays.items():
            count = spec.bytes // codecs.dtype_of(spec.dtype).itemsize
            array = np.frombuffer(record, codecs.dtype_of(spec.dtype), count, offset)
            payload[key] = array.reshape(spec.shape)
            offset += spec.bytes
        return payload

    def read_batch(self, ids: Iterable[str]) -> dict[str, np.ndarray]:
        """Reads records and stacks them: payload array -> (B, ...)."""
        records = [self.read(id) for id in ids]
        return {name: np.stack([record[name] for record in records]) for name in self.manifest.arrays}

    def features(self, ids: Iterable[str]) -> ExpertFeatures:
        """Reads and decodes records on the host: NumPy ExpertFeatures, float32."""
        return codecs.decode_features(self.manifest, self.read_batch(ids))

    def _reader(self, number: int) -> Any:
        with self._lock:
            reader = self._readers.get(number)
            if reader is None:
                path = str(self.path / self.manifest.shards[number].file)
                reader = ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)
                self._readers[number] = reader
                if len(self._readers) > _OPEN_SHARDS:
                    # Not closed here: another thread may be reading; the last reference closes it.
                    self._readers.popitem(last=False)
            self._readers.move_to_end(number)
            return reader


def _reopen(path: Path, verify: bool) -> FeatureStore:
    return FeatureStore.open(path, verify=verify)


def find_stores(path: Path | str) -> list[Path]:
    """Returns the stores at or below a folder (two levels), sorted.

    Raises:
      InputError: there is none.
    """
    path = Path(path)
    found = sorted({file.parent for pattern in ("", "*/", "*/*/") for file in path.glob(pattern + FILE_NAME)})
    if not found:
        raise InputError(f"{path}: expected feature stores (folders with a {FILE_NAME}), found none")
    return found


def verify_store(path: Path | str) -> tuple[int, list[str]]:
    """Reads every record of a store.

    Returns:
      number of sound records, and one line for each fault: files, and records by id.

    Raises:
      InputError: the manifest does not read.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    problems, indices = [], []
    for number in range(len(manifest.shards)):
        try:
            indices.append(read_index(path, manifest, number))
        except InputError as error:
            problems.append(str(error))
            indices.append(None)
    if not manifest.complete:
        problems.append(f"{path}: extraction is not finished")
    store = FeatureStore(path, manifest, indices, verify=True)
    if None not in indices and hash_ids(store.ids) != manifest.ids_hash:
        problems.append(f"{path}: record ids differ from the manifest's {manifest.ids_hash}")
    sound = 0
    for index in filter(None, indices):
        before = len(problems)
        for id in index["ids"]:
            try:
                store.read(id)
                sound += 1
            except InputError as error:
                problems.append(str(error))
        if len(problems) == before:
            with open(path / index["file"], "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != index["sha256"]:
                problems.append(f"{path / index['file']}: expected sha256 {index['sha256']}, found {found}")
    return sound, problems


def summary(path: Path | str) -> str:
    """Returns one line about a store: expert, records, shards done, codec, shapes, bytes, view, weights."""
    path = Path(path)
    manifest = Manifest.read(path)
    done = sum(index_path(path / shard.file).exists() for shard in manifest.shards)
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in manifest.shapes.items())
    return (
        f"{path}: {manifest.expert['name']}, {manifest.records} records of {manifest.source}, "
        f"{done}/{len(manifest.shards)} shards{'' if manifest.complete else ' (not finished)'}, {manifest.codec}, "
        f"{shapes}, {manifest.records * manifest.record_bytes / 1e6:.1f} MB, {manifest.view['size']} px"
        f"{' mirrored' if manifest.view['flip'] else ''}, view {manifest.view_key}, "
        f"weights {manifest.weights_hash[:16]}"
    )


def statistics(path: Path | str, records: int = 64) -> str:
    """Returns a store's moments, and what every codec costs and loses on some of its patches, as text.

    The errors are measured on the patches as stored, so those of a store that is not float32 come
    on top of its own codec's.

    Args:
      path: folder of the store.
      records: on how many records, spread over the store, the codecs are measured.

    Raises:
      InputError: the store does not open, or a record is damaged.
    """
    store = FeatureStore.open(path)
    manifest, moments = store.manifest, store.manifest.statistics
    step = max(1, len(store) // max(1, records))
    patches = np.asarray(store.features(store.ids[::step][: max(1, records)]).patches)
    lines = [summary(path), f"  bytes a record: {manifest.record_bytes}"]
    if moments is not None:
        lines.append(
            f"  patches: mean {moments.mean:.4g}, std {moments.std:.4g}, token norm {moments.norm:.4g}, "
            f"from {moments.low:.4g} to {moments.high:.4g}"
        )
    for codec, error in codecs.reconstruction_errors(patches).items():
        lines.append(
            f"  {codec:8s} {error.bytes:10.0f} bytes of patches a record, relative error {error.relative:.2e}, "
            f"largest {error.largest:.3g}{'  (stored so)' if codec == manifest.codec else ''}"
        )
    return "\n".join(lines)
