"""The files that hold a shard's records: fixed-size records mapped into memory, or ArrayRecord.

- ``mmap``: payloads one after the other, each filled up with zeros to a multiple of 64 bytes. A record is read
  where it lies, without a call to the system once its pages are in memory. For disks of this machine.
- ``arrayrecord``: one record a chunk, read by ``pread`` through the array_record library. For mounted object
  stores and network disks, where a page fault is a round trip, and for reading by other tools.

A writer or reader knows bytes and positions alone; ids and CRCs are the shard's (`tove_jax.experts.shards`).
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from typing import Any, Protocol

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

SUFFIXES = {"mmap": ".records", "arrayrecord": ".arrayrecord"}
"""Medium -> ending of its files' names."""

_ALIGNMENT = 64
# One record a group, so that a random read touches one record; bytes of floats hardly compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 32768
# What is asked of the disk ahead of a reader that goes in stored order: some tenths of a second of a hard disk.
_WINDOW = 16 * 2**20
# Threads that share a sequential read come by a little out of order.
_NEAR = 64


class Writer(Protocol):
    """Appends records to a file."""

    def write(self, record: bytes) -> None:
        """Appends a record; OSError or RuntimeError when the system refuses."""

    def close(self) -> None:
        """Gives everything to the system; OSError or RuntimeError when it refuses."""


class Reader(Protocol):
    """Reads records by position, from several threads."""

    def read(self, position: int) -> Any:
        """Returns a record's bytes as a buffer; RuntimeError or IndexError when it is damaged."""


def stride(record_bytes: int) -> int:
    """Returns the bytes from one mapped record to the next."""
    return max(1, -(-record_bytes // _ALIGNMENT)) * _ALIGNMENT


class _MappedWriter:
    def __init__(self, path: Path, record_bytes: int) -> None:
        self._stream = open(path, "wb", buffering=2**20)
        self._padding = bytes(stride(record_bytes) - record_bytes)

    def write(self, record: bytes) -> None:
        self._stream.write(record)
        self._stream.write(self._padding)

    def close(self) -> None:
        self._stream.close()


class _MappedReader:
    """A mapped shard; its pages outlive this object as long as an array made from them does.

    With ``exact`` the disk is asked for the records that are read and no more: for stores that memory does not
    hold. Otherwise the kernel may read around them, since the rest is wanted soon: measured cold and in random
    order, that was three times as fast.
    """

    def __init__(self, path: Path, record_bytes: int, exact: bool) -> None:
        with open(path, "rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)
        self._bytes, self._stride = record_bytes, stride(record_bytes)
        self._exact = exact
        if exact:
            self._map.madvise(mmap.MADV_RANDOM)
        self._asked = bytearray(len(self._map) // self._stride)
        self._last, self._ahead = -1, 0
        self._lock = threading.Lock()

    def read(self, position: int) -> memoryview:
        start = position * self._stride
        if not self._asked[position]:
            self._ask(position, start)
        return self._view[start : start + self._bytes]

    def _ask(self, position: int, start: int) -> None:
        """Asks the disk ahead of a read, and in stored order for what follows; once for each record."""
        with self._lock:
            self._asked[position] = 1
            stop = start + self._stride
            follows = 0 < position - self._last <= _NEAR
            self._last = position
            if follows and stop > self._ahead - _WINDOW // 2:
                start, stop = max(start, min(self._ahead, stop)), stop + _WINDOW
                self._ahead = stop
            elif follows or not self._exact:
                return
        stop = min(stop, len(self._map))
        start -= start % mmap.PAGESIZE
        if stop > start:
            self._map.madvise(mmap.MADV_WILLNEED, start, stop - start)


class _RecordWriter:
    def __init__(self, path: Path) -> None:
        # ArrayRecord's writer says nothing on opening; the system's own answer is the better error.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
        self._writer: Any = ArrayRecordWriter(str(path), _WRITER_OPTIONS)

    def write(self, record: bytes) -> None:
        self._writer.write(record)
        if not self._writer.ok():
            self._writer.close()

    def close(self) -> None:
        self._writer.close()


class _RecordReader:
    def __init__(self, path: Path) -> None:
        self._reader = ArrayRecordReader(str(path), _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)

    def read(self, position: int) -> bytes:
        return self._reader.read([position])[0]


def open_writer(medium: str, path: Path, record_bytes: int) -> Writer:
    """Opens a new file for records of `record_bytes` each (ArrayRecord takes any size)."""
    return _MappedWriter(path, record_bytes) if medium == "mmap" else _RecordWriter(path)


def open_reader(medium: str, path: Path, record_bytes: int, exact: bool = False) -> Reader:
    """Opens a finished file; ``exact``: read nothing but what is asked for, see `_MappedReader`."""
    return _MappedReader(path, record_bytes, exact) if medium == "mmap" else _RecordReader(path)
