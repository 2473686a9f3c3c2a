"""Runs frozen experts over pictures once and writes their features as shards.

The pictures are divided into shards in a fixed way. A process claims a shard by locking a file
beside it; the lock goes when its process does, so several processes share the work by running the
same command, and a killed one loses no more than its unfinished shard.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tove_jax.data.picture import PictureSource
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import codecs
from tove_jax.experts.base import Expert, ExpertFeatures
from tove_jax.experts.manifest import FILE_NAME, Manifest, Moments, ShardEntry, describe
from tove_jax.experts.store import FeatureStore, ShardWriter, index_path, partial_path, read_index, writing
from tove_jax.files.atomic import atomic_write_bytes

_POLL_SECONDS = 0.2


def extract(
    expert: Expert,
    source: PictureSource,
    indices: Sequence[int],
    folder: Path | str,
    *,
    codec: str = "bf16",
    shard_records: int = 256,
    batch: int = 16,
    view: View | None = None,
    threads: int = 2,
    prefetch: int = 2,
    progress: bool = True,
    wait: bool = True,
) -> Manifest:
    """Writes one expert's features of some pictures, or what is missing of them.

    Runs again after a kill at any moment, and in several processes at once, with the same result
    as one unbroken run. Shards that are missing or cut short are written anew.

    Args:
      expert: loaded expert.
      source: of the pictures; read from several threads.
      indices: which pictures, in stored order.
      folder: the store's folder.
      codec: how patches are stored, one of `codecs.CODECS`.
      shard_records: records a shard; an existing store keeps its own.
      batch: pictures a call of the expert; the last one is padded, so that it compiles once.
      view: what the expert is shown: its own view (when None) or its mirror.
      threads: that read, decode and cut pictures ahead of the expert.
      prefetch: batches kept ready.
      progress: show a progress bar.
      wait: stay until shards claimed by other processes are done too, taking over those of dead
        ones; else return when nothing is left to claim.

    Returns:
      The manifest; complete unless `wait` is false and others are still at work.

    Raises:
      InputError: the folder holds another expert, view, weights, codec or list of pictures; the
        folder cannot be written or the disk is full; a picture cannot be read; the expert's
        features are not what its card says, or not finite.
    """
    folder = Path(folder)
    view = _checked_view(expert, view)
    if batch < 1 or threads < 1 or prefetch < 1:
        raise InputError(f"batch, threads, prefetch: expected at least 1 each, found {batch}, {threads}, {prefetch}")
    ids = [source.ids[index] for index in indices]
    wanted = describe(
        expert.card,
        expert.weights_hash,
        view,
        codec,
        ids,
        source=source.name,
        source_licence=source.licence,
        shard_records=shard_records,
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        manifest = _begin(folder, wanted)
        if manifest.complete:
            return manifest
        work = _Work(expert, source, view, manifest, folder, batch, threads, prefetch)
        done = {number for number in range(len(manifest.shards)) if _is_done(folder, manifest, number)}
        bar = tqdm(
            total=manifest.records,
            initial=sum(manifest.shards[number].records for number in done),
            desc=folder.name,
            unit=" pictures",
            disable=not progress,
        )
        with bar, ThreadPoolExecutor(threads) as pool:
            left = [number for number in range(len(manifest.shards)) if number not in done]
            while left:
                busy = []
                for number in left:
                    if _is_done(folder, manifest, number):
                        bar.update(manifest.shards[number].records)
                        continue
                    with claim(_lock_path(folder, manifest, number)) as claimed:
                        if not claimed:
                            busy.append(number)
                        elif _is_done(folder, manifest, number):
                            bar.update(manifest.shards[number].records)
                        else:
                            start = number * manifest.shard_records
                            entry = manifest.shards[number]
                            work.shard(number, indices[start : start + entry.records], pool, bar)
                if len(busy) == len(left):
                    if not wait:
                        return manifest
                    time.sleep(_POLL_SECONDS)
                left = busy
        return _finish(folder)


def _checked_view(expert: Expert, view: View | None) -> View:
    own = expert.card.view
    if view is None:
        return own
    if dataclasses.replace(view, flip=own.flip) != own:
        raise InputError(
            f"expert {expert.card.name!r}: expected its view {own.key()} or the mirror of it, found {view.key()} "
            f"({view} instead of {own})"
        )
    return view


class _Work:
    """One expert at work on shards: pictures decoded in threads, one batch on the device, one being written."""

    def __init__(
        self,
        expert: Expert,
        source: PictureSource,
        view: View,
        manifest: Manifest,
        folder: Path,
        batch: int,
        threads: int,
        prefetch: int,
    ) -> None:
        self.expert, self.source, self.view = expert, source, view
        self.manifest, self.folder = manifest, folder
        self.batch, self.prefetch = batch, prefetch
        self.written = 0
        self._call: Callable[[np.ndarray], ExpertFeatures] | None = None

    def shard(self, number: int, indices: Sequence[int], pool: ThreadPoolExecutor, bar: Any) -> None:
        """Writes one shard, or raises and leaves nothing."""
        name = self.manifest.expert["name"]
        moments = Moments()
        with ShardWriter(self.folder, self.manifest, number) as writer:
            for ids, features in self._features(indices, pool):
                self._check_shapes(features)
                payloads = codecs.encode_features(self.manifest.codec, features, ids, name)
                moments.add_tokens(np.asarray(features.patches)[: len(ids)])
                for id, payload in zip(ids, payloads, strict=True):
                    self.written += writer.write(id, payload)
                bar.set_postfix_str(f"{self.written / 1e6:.1f} MB", refresh=False)
                bar.update(len(ids))
            writer.finish(moments)

    def _features(self, indices: Sequence[int], pool: ThreadPoolExecutor) -> Iterator[tuple[list[str], ExpertFeatures]]:
        # JAX returns before the device is done: the next batch is sent before the last is fetched.
        before = None
        for ids, pixels in self._pixels(indices, pool):
            now = ids, self._apply(pixels)
            if before is not None:
                yield before
            before = now
        if before is not None:
            yield before

    def _pixels(self, indices: Sequence[int], pool: ThreadPoolExecutor) -> Iterator[tuple[list[str], np.ndarray]]:
        ahead: collections.deque[tuple[list[str], list[Future[np.ndarray]]]] = collections.deque()
        starts = iter(range(0, len(indices), self.batch))
        try:
            while True:
                while len(ahead) <= self.prefetch and (start := next(starts, None)) is not None:
                    chosen = indices[start : start + self.batch]
                    futures = [pool.submit(self._cut, int(index)) for index in chosen]
                    ahead.append(([self.source.ids[index] for index in chosen], futures))
                if not ahead:
                    return
                ids, futures = ahead.popleft()
                cuts = [future.result() for future in futures]
                yield ids, np.stack(cuts + cuts[-1:] * (self.batch - len(cuts)))
        finally:
            for _, futures in ahead:
                for future in futures:
                    future.cancel()

    def _cut(self, index: int) -> np.ndarray:
        id = self.source.ids[index]
        try:
            picture = self.source[index]
            if picture.id != id:
                raise InputError(f"the source gives record {picture.id!r} in its place")
            return self.view.cut(picture.image)
        except (InputError, OSError) as error:
            raise InputError(f"source {self.source.name!r}, record {id!r}: {error}") from error

    def _apply(self, pixels: np.ndarray) -> ExpertFeatures:
        if self._call is None:
            self._call = self._compiled() if self.expert.card.backend == "jax" else self._host
        return self._call(pixels)

    def _host(self, pixels: np.ndarray) -> ExpertFeatures:
        return self.expert.apply(self.expert.params, pixels)

    def _compiled(self) -> Callable[[np.ndarray], ExpertFeatures]:
        import jax  # here, so that host experts do without

        devices = jax.local_devices()
        if self.batch % len(devices):
            devices = devices[:1]
        mesh = jax.sharding.Mesh(np.asarray(devices), ("batch",))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = jax.device_put(self.expert.params, everywhere)
        apply = jax.jit(self.expert.apply)
        return lambda pixels: apply(params, jax.device_put(pixels, rows))

    def _check_shapes(self, features: ExpertFeatures) -> None:
        found = {name: tuple(value.shape) for name, value in features._asdict().items() if value is not None}
        wanted = {name: (self.batch, *shape) for name, shape in self.manifest.shapes.items()}
        if found != wanted:
            raise InputError(
                f"expert {self.manifest.expert['name']!r}: its card promises {wanted} for {self.batch} pictures, "
                f"found {found}"
            )


def _begin(folder: Path, wanted: Manifest) -> Manifest:
    """Creates the manifest, or checks that the one there is for the same thing; incomplete if a shard is missing."""
    path = folder / FILE_NAME
    with claim(folder / "manifest.lock", wait=True):
        if not path.exists():
            atomic_write_bytes(path, wanted.to_json())
            return wanted
        manifest = Manifest.read(folder)
        manifest.require_same(wanted, folder)
        if manifest.complete and not all(_is_done(folder, manifest, n) for n in range(len(manifest.shards))):
            shards = tuple(ShardEntry(shard.file, shard.records) for shard in manifest.shards)
            manifest = dataclasses.replace(manifest, complete=False, statistics=None, shards=shards)
            atomic_write_bytes(path, manifest.to_json())
        if manifest.complete:
            _sweep(folder, manifest)
        return manifest


def _finish(folder: Path) -> Manifest:
    """Writes checksums and statistics into the manifest once every shard is there."""
    with claim(folder / "manifest.lock", wait=True):
        manifest = Manifest.read(folder)
        if not manifest.complete:
            moments, shards = Moments(), []
            for number, shard in enumerate(manifest.shards):
                index = read_index(folder, manifest, number)
                moments.add(index["moments"])
                shards.append(ShardEntry(shard.file, shard.records, index["bytes"], index["sha256"]))
            manifest = dataclasses.replace(
                manifest, complete=True, statistics=moments.statistics(), shards=tuple(shards)
            )
            atomic_write_bytes(folder / FILE_NAME, manifest.to_json())
            FeatureStore.open(folder)
        _sweep(folder, manifest)
        return manifest


def _sweep(folder: Path, manifest: Manifest) -> None:
    """Removes what killed processes left beside finished shards; locks held by living ones stay."""
    names = {entry.name for entry in folder.iterdir()}
    for number, shard in enumerate(manifest.shards):
        lock = _lock_path(folder, manifest, number)
        if not names & {lock.name, partial_path(folder / shard.file).name}:
            continue
        with claim(lock) as claimed:
            if claimed:
                partial_path(folder / shard.file).unlink(missing_ok=True)
    # Only a holder of the manifest's lock writes it, and no index is written once all are there.
    for name in names:
        if name.startswith((f".{FILE_NAME}.", ".shard-")) and name.endswith(".tmp"):
            (folder / name).unlink(missing_ok=True)


def _is_done(folder: Path, manifest: Manifest, number: int) -> bool:
    if not index_path(folder / manifest.shards[number].file).exists():
        return False
    try:
        read_index(folder, manifest, number)
    except InputError:
        return False
    return True


def _lock_path(folder: Path, manifest: Manifest, number: int) -> Path:
    return (folder / manifest.shards[number].file).with_suffix(".lock")


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
            time.sleep(_POLL_SECONDS / 10)
        except FileNotFoundError:
            pass
        os.close(opened)
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)
