"""Feature stores: found by record id, checked as they are read.

A store is a folder with `manifest.json` and shards (`tove_jax.experts.shards`), written by `tove extract`.
"""

from __future__ import annotations

import collections
import hashlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.errors import InputError
from tove_jax.experts import codecs, media
from tove_jax.experts.base import ExpertFeatures
from tove_jax.experts.manifest import FILE_NAME, Manifest, hash_ids
from tove_jax.experts.shards import CRC, index_path, read_index, record_crc

# Open shards a store keeps: a run reads eight stores and more, and a process may open a thousand files.
_OPEN_SHARDS = 64


class FeatureStore:
    """Reads a finished store by record id.

    Safe to use from several threads; pickles as its path and opens anew where it is unpickled.

    Attributes:
      path: folder.
      manifest: what it holds.
      ids: record ids, in stored order.
      verify: whether CRC-32 is compared. A mapped record (`tove_jax.experts.media`) is compared when it is
        first read; an ArrayRecord, which comes from the disk each time, on every read.
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
        self._mapped = manifest.medium == "mmap"
        self._sound = {number: bytearray(len(crcs)) for number, crcs in self._crcs.items()} if self._mapped else {}
        self._record_bytes = manifest.record_bytes
        # Half, since a run reads several stores.
        self._exact = manifest.records * manifest.record_bytes > _memory() / 2
        # Name, dtype, number of values, offset and shape of each array, worked out once.
        self._layout = []
        offset = 0
        for name, spec in manifest.arrays.items():
            dtype = codecs.dtype_of(spec.dtype)
            self._layout.append((name, dtype, spec.bytes // dtype.itemsize, offset, spec.shape))
            offset += spec.bytes
        self._readers: collections.OrderedDict[int, media.Reader] = collections.OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> FeatureStore:
        """Opens a store, checking manifest, indices and the presence and size of every shard.

        Args:
          path: folder of the store.
          verify: compare CRC-32 of the records.

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

    def crc(self, id: str) -> int:
        """Returns the CRC-32 that was written for a record (`tove_jax.experts.shards.record_crc`)."""
        number, position = self._places[id]
        return self._crcs[number][position]

    def read(self, id: str) -> dict[str, np.ndarray]:
        """Reads one record.

        Returns:
          payload array -> encoded array of the manifest's shape and dtype, read-only. Those of a mapped
          store lie in the file's pages: nothing was copied.

        Raises:
          InputError: no such record, or a damaged one; names the record and the shard.
        """
        place = self._places.get(id)
        if place is None:
            raise InputError(f"{self.path}: no features of record {id!r} among its {len(self.ids)} records")
        record = self._mapped_record(id, *place) if self._mapped else self._array_record(id, *place)
        return {
            name: np.frombuffer(record, dtype, count, offset).reshape(shape)
            for name, dtype, count, offset, shape in self._layout
        }

    def read_batch(self, ids: Iterable[str]) -> dict[str, np.ndarray]:
        """Reads records and stacks them: payload array -> (B, ...)."""
        records = [self.read(id) for id in ids]
        return {name: np.stack([record[name] for record in records]) for name in self.manifest.arrays}

    def features(self, ids: Iterable[str]) -> ExpertFeatures:
        """Reads and decodes records on the host: NumPy ExpertFeatures, float32."""
        return decode_features(self.manifest, self.read_batch(ids))

    def _where(self, id: str, number: int) -> str:
        return f"{self.path / self.manifest.shards[number].file}: record {id!r}"

    def _mapped_record(self, id: str, number: int, position: int) -> Any:
        record = self._reader(number).read(position)
        if not self.verify or self._sound[number][position]:
            return record
        if len(record) != self._record_bytes:
            raise InputError(f"{self._where(id, number)}: expected {self._record_bytes} bytes, found {len(record)}")
        crc = record_crc(record, id)
        if crc != self._crcs[number][position]:
            raise InputError(
                f"{self._where(id, number)}: damaged: CRC-32 of its bytes is {crc:08x}, "
                f"{self._crcs[number][position]:08x} was written"
            )
        self._sound[number][position] = 1
        return record

    def _array_record(self, id: str, number: int, position: int) -> Any:
        where = self._where(id, number)
        try:
            record = self._reader(number).read(position)
        except (RuntimeError, IndexError) as error:
            raise InputError(f"{where}: damaged: {error}") from error
        name = id.encode()
        expected = self._record_bytes + len(name) + CRC.size
        if len(record) != expected:
            raise InputError(f"{where}: expected {expected} bytes, found {len(record)}")
        if self.verify:
            stored = CRC.unpack_from(record, expected - CRC.size)[0]
            crc = record_crc(memoryview(record)[: self._record_bytes], id)
            if not crc == stored == self._crcs[number][position]:
                raise InputError(f"{where}: damaged: CRC-32 of its bytes is {crc:08x}, {stored:08x} was written")
        if record[self._record_bytes : -CRC.size] != name:
            raise InputError(f"{where}: another record is stored in its place")
        return record

    def _reader(self, number: int) -> media.Reader:
        with self._lock:
            reader = self._readers.get(number)
            if reader is None:
                path = self.path / self.manifest.shards[number].file
                reader = media.open_reader(self.manifest.medium, path, self._record_bytes, self._exact)
                self._readers[number] = reader
                if len(self._readers) > _OPEN_SHARDS:
                    # Not closed here: another thread may be reading; the last reference closes it.
                    self._readers.popitem(last=False)
            self._readers.move_to_end(number)
            return reader


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
    problems: list[str] = []
    indices: list[dict[str, Any] | None] = []
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
        f"{done}/{len(manifest.shards)} shards{'' if manifest.complete else ' (not finished)'}, {manifest.medium}, "
        f"{manifest.codec}, {shapes}, {manifest.records * manifest.record_bytes / 1e6:.1f} MB, "
        f"{manifest.view['size']} px{' mirrored' if manifest.view['flip'] else ''}, view {manifest.view_key}, "
        f"weights {manifest.weights_hash[:16]}"
    )


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
    for name, shape in manifest.shapes.items():
        if name in codecs.CODED:
            fields[name] = codecs.decode(manifest.codec, payload, name, dtype, width=shape[-1], basis=manifest.basis)
        else:
            fields[name] = payload[name]
    return ExpertFeatures(**fields)
