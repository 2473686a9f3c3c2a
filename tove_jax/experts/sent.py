"""Extraction into a store of features that lies in an object store.

A process works in a local copy and sends what it finishes: a shard, then its index, so that a shard with an index is a
whole one there too; the manifest is complete when all are. Whoever sends the last shard completes it from the indices
alone. Locks do not reach across machines, so processes take shares of the shards (`tove_jax.experts.extract`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tove_jax.errors import InputError
from tove_jax.experts.extract import completed
from tove_jax.experts.manifest import BASIS_FILE, FILE_NAME, Manifest, ShardEntry
from tove_jax.experts.shards import index_path, is_done
from tove_jax.files import remote
from tove_jax.files.bucket import Bucket, all_at_once

_POLL_SECONDS = 1.0


@contextlib.contextmanager
def sending(url: str, cache: Path, share: tuple[int, int]) -> Iterator[Path]:
    """Yields a local folder into which a share of a store's shards is extracted, and sends them as they are finished.

    What was sent before is there: of an unfinished store this share's shards, and a finished one as a whole.

    Args:
      url: of the store's folder.
      cache: folder for the copies.
      share: (i, n), this process's shards.

    Raises:
      InputError: the store cannot be read or written, or holds something else under these names.
    """
    bucket = Bucket(url)
    folder = _begun(bucket, cache, share)
    stop, failed = threading.Event(), []
    sent = set(bucket.sizes())

    def watch() -> None:
        try:
            while not stop.wait(_POLL_SECONDS):
                _send(bucket, folder, share, sent)
        except InputError as error:
            failed.append(error)

    thread = threading.Thread(target=watch, name="sending", daemon=True)
    thread.start()
    try:
        yield folder
    finally:
        stop.set()
        thread.join()
        if not failed and (folder / FILE_NAME).exists():  # also what was finished before an error
            _send(bucket, folder, share, sent)
    if failed:
        raise failed[0]
    _complete(bucket, Manifest.read(folder))
    remote.remember(url, cache)
    remote.local.cache_clear()


def _begun(bucket: Bucket, cache: Path, share: tuple[int, int]) -> Path:
    """Copies what this process goes on from; returns the local folder."""
    text = bucket.read(FILE_NAME)
    if text is None:
        return remote.target_of(bucket.url, cache)
    manifest = Manifest.from_json(text, Path(bucket.url))
    if manifest.complete:
        return remote.copied(bucket.url, cache)
    there = bucket.sizes()
    wanted = {FILE_NAME, BASIS_FILE}
    for shard in manifest.shards[share[0] :: share[1]]:
        index = index_path(Path(shard.file)).name
        if index in there and shard.file in there:
            wanted |= {index, shard.file}
    return remote.copied(bucket.url, cache, chosen=wanted.__contains__)


def _send(bucket: Bucket, folder: Path, share: tuple[int, int], sent: set[str]) -> None:
    """Sends the manifest's beginning, and shards of the share that are finished and not yet sent."""
    if not (folder / FILE_NAME).exists():
        return
    manifest = Manifest.read(folder)
    for name in (BASIS_FILE, FILE_NAME):
        if name not in sent and (folder / name).exists():
            if name == FILE_NAME and manifest.complete:  # it is, here; there it is not before its shards are
                manifest = _begin_of(manifest)
            bucket.write(name, manifest.to_json() if name == FILE_NAME else (folder / name).read_bytes())
            sent.add(name)
    for number in range(share[0], len(manifest.shards), share[1]):
        shard = folder / manifest.shards[number].file
        if index_path(shard).name in sent or not is_done(folder, manifest, number):
            continue
        bucket.send(shard, shard.name)
        bucket.send(index_path(shard), index_path(shard).name)
        sent |= {shard.name, index_path(shard).name}


def _begin_of(manifest: Manifest) -> Manifest:
    shards = tuple(ShardEntry(shard.file, shard.records) for shard in manifest.shards)
    return dataclasses.replace(manifest, complete=False, statistics=None, shards=shards)


def _complete(bucket: Bucket, manifest: Manifest) -> None:
    """Completes the manifest in the store, if all shards are there."""
    text = bucket.read(FILE_NAME)
    theirs = manifest if text is None else Manifest.from_json(text, Path(bucket.url))
    if theirs.identity() != manifest.identity():
        raise InputError(f"{bucket.url}: another process extracts something else into it at the same time")
    there = bucket.sizes()
    names = {shard.file: index_path(Path(shard.file)).name for shard in manifest.shards}
    if theirs.complete or not all(file in there and index in there for file, index in names.items()):
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        all_at_once(lambda index: bucket.fetch(index, folder / index), names.values())
        for file in names:
            with open(folder / file, "wb") as stream:  # empty, of the shard's size: the index is compared with that
                stream.truncate(there[file])
        whole = completed(folder, _begin_of(manifest))
    bucket.write(FILE_NAME, whole.to_json())
