"""Runs frozen experts over pictures once and writes their features as shards.

The pictures are divided into shards in a fixed way. A process claims a shard by locking a file
beside it; the lock goes when its process does, so several processes share the work by running the
same command, and a killed one loses no more than its unfinished shards.

Three things go on at once: threads decode the next pictures, also of the next shard; the device computes a
batch; one thread fetches, encodes and writes the batch before, and closes shards.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
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
from tove_jax.experts.manifest import BASIS_FILE, FILE_NAME, Manifest, Moments, ShardEntry, describe
from tove_jax.experts.runner import Runner, is_out_of_memory
from tove_jax.experts.shards import ShardWriter, claim, is_done, lock_path, partial_path, read_index, writing
from tove_jax.experts.spectrum import Basis, Covariance, digest, principal
from tove_jax.experts.store import FeatureStore
from tove_jax.files.atomic import atomic_write_bytes

_POLL_SECONDS = 0.2
_WAIT_SECONDS = 0.002
# Claimed shards at a time: one closing, one being written, one whose pictures are decoded. No more, for the others' sake.
_CLAIMS = 3
BASIS_PICTURES = 512
"""Pictures on which the axes of a codec with PCA are fitted at most; ours."""


def extract(
    expert: Expert,
    source: PictureSource,
    indices: Sequence[int] | np.ndarray,
    folder: Path | str,
    *,
    codec: str = "bf16",
    medium: str = "mmap",
    shard_records: int = 256,
    batch: int = 16,
    runner: Runner | None = None,
    dtype: str = "float32",
    view: View | None = None,
    threads: int = 2,
    prefetch: int = 2,
    progress: bool = True,
    wait: bool = True,
    share: tuple[int, int] | None = None,
    basis: Basis | None = None,
    sample: Sequence[int] | np.ndarray | None = None,
) -> Manifest:
    """Writes one expert's features of some pictures, or what is missing of them.

    Runs again after a kill at any moment, and in several processes at once, with the same result
    as one unbroken run. Shards that are missing or cut short are written anew.

    Args:
      expert: loaded expert.
      source: of the pictures; read from several threads.
      indices: which pictures, in stored order.
      folder: the store's folder.
      codec: how patches are stored, see `codecs.parse`.
      medium: kind of the shards' files, see `tove_jax.experts.media`; an existing store keeps its own.
      shard_records: records a shard; an existing store keeps its own.
      batch: pictures a call of the expert, 0: as many as fit; the last one is padded, so that it compiles
        once. Out of memory, half as many.
      runner: of this expert, so that several stores compile it once; None: made here, with `batch`.
      dtype: in which the expert was loaded to compute, for the manifest.
      view: what the expert is shown: its own view (when None) or its mirror.
      threads: that read, decode and cut pictures ahead of the expert.
      prefetch: batches kept ready.
      progress: show a progress bar.
      wait: stay until shards claimed by other processes are done too, taking over those of dead
        ones; else return when nothing is left to claim.
      share: (i, n): write the shards i, i + n, ... alone and wait for nobody; for hosts without a common disk,
        whose partial stores `tove_jax.experts.manage.merge` joins.
      basis: axes of a codec with PCA; None: fitted on `sample` by the first process that comes.
      sample: pictures to fit it on, such as training pictures; None: some of `indices`.

    Returns:
      The manifest; complete unless `wait` is false and others are still at work, or a share was asked for.

    Raises:
      InputError: the folder holds another expert, view, weights, codec or list of pictures; the
        folder cannot be written or the disk is full; a picture cannot be read; the expert's
        features are not what its card says, or not finite; memory is short for one picture.
    """
    folder = Path(folder)
    view = _checked_view(expert, view)
    if threads < 1 or prefetch < 1:
        raise InputError(f"threads, prefetch: expected at least 1 each, found {threads}, {prefetch}")
    if share is not None and not 0 <= share[0] < share[1]:
        raise InputError(f"share: expected i/n with i from 0 to n - 1, found {share[0]}/{share[1]}")
    indices = [int(index) for index in indices]
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
        medium=medium,
        dtype=dtype,
        basis=basis,
    )
    runner = Runner(expert, batch) if runner is None else runner
    with writing(folder), contextlib.ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = _Pictures(source, view, stack.enter_context(ThreadPoolExecutor(threads)), prefetch)
        chosen = indices if sample is None else [int(index) for index in sample]
        manifest = _begin(folder, wanted, lambda: _fit(wanted, runner, pictures, chosen, progress))
        if manifest.complete:
            return manifest
        left = list(range(len(manifest.shards)))
        done = {number for number in left if is_done(folder, manifest, number)}
        bar = tqdm(
            total=manifest.records,
            initial=sum(manifest.shards[number].records for number in done),
            desc=folder.name,
            unit=" pictures",
            disable=not progress,
        )
        stack.enter_context(bar)
        extraction = _Extraction(folder, manifest, runner, pictures, indices, bar, done)
        if share is not None:
            left, wait = left[share[0] :: share[1]], False
        while left:
            before, left = left, extraction.go(left)
            if left == before:
                if not wait:
                    break
                time.sleep(_POLL_SECONDS)
        if not all(is_done(folder, manifest, number) for number in range(len(manifest.shards))):
            return manifest
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


class _Pictures:
    """Pictures of a source, cut by a view in threads."""

    def __init__(self, source: PictureSource, view: View, pool: ThreadPoolExecutor, prefetch: int) -> None:
        self.source, self.view, self.prefetch, self._pool = source, view, prefetch, pool

    def batches(
        self, requests: Iterator[tuple[Any, Sequence[int]]], batch: int
    ) -> Generator[tuple[Any, np.ndarray], None, None]:
        """Yields each request's first part and its pixels, filled up to `batch`; requests are drawn ahead.

        A request whose first part is None says that there is none at the moment.
        """
        ahead: collections.deque[tuple[Any, list[Future[np.ndarray]]]] = collections.deque()
        try:
            while True:
                while len(ahead) <= self.prefetch and (request := next(requests, None)) is not None:
                    key, indices = request
                    if key is None:
                        if ahead:
                            break
                        time.sleep(_WAIT_SECONDS)
                        continue
                    ahead.append((key, [self._pool.submit(self._cut, int(index)) for index in indices]))
                if not ahead:
                    return
                key, futures = ahead.popleft()
                cuts = [future.result() for future in futures]
                yield key, np.stack(cuts + cuts[-1:] * (batch - len(cuts)))
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


class _Shard:
    """One claimed shard on its way: its writer and sums, and what releases the claim."""

    def __init__(self, extraction: _Extraction, number: int, claimed: contextlib.ExitStack) -> None:
        self.number, self.records = number, extraction.manifest.shards[number].records
        self.done = 0
        self.moments = Moments()
        self._stack = claimed
        self.writer = ShardWriter(extraction.folder, extraction.manifest, number)
        claimed.enter_context(self.writer)

    def close(self) -> None:
        """Removes what is unfinished and releases the claim."""
        self._stack.close()


class _Extraction:
    """Writes shards of one store."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        runner: Runner,
        pictures: _Pictures,
        indices: Sequence[int],
        bar: Any,
        done: set[int],
    ) -> None:
        self.folder, self.manifest, self.runner = folder, manifest, runner
        self.pictures, self.indices, self.bar = pictures, indices, bar
        self._starts = np.cumsum([0, *(shard.records for shard in manifest.shards)])
        self._total = manifest.records * manifest.record_bytes / 1e6
        self._open: dict[int, _Shard] = {}
        self._failed = False
        # Shards that the bar counts.
        self._seen = done

    def go(self, numbers: Sequence[int]) -> list[int]:
        """Writes what can be claimed of some shards; returns those that others hold."""
        while True:
            busy: list[int] = []
            try:
                self._go(self._requests(numbers, busy))
                return busy
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.runner.halve(error)
                self.bar.write(f"{self.folder.name}: out of memory, going on with {self.runner.batch} pictures a call")

    def _go(self, requests: Iterator[tuple[Any, Sequence[int]]]) -> None:
        written: collections.deque[Future[None]] = collections.deque()
        self._failed = False
        writer = ThreadPoolExecutor(1)
        try:
            with contextlib.closing(self.pictures.batches(requests, self.runner.batch)) as batches:
                for (shard, ids), pixels in batches:
                    features = self.runner(pixels)
                    written.append(writer.submit(self._write, shard, ids, features))
                    # One batch is computed while the one before is written; no more are kept in memory.
                    while len(written) > 2:
                        written.popleft().result()
            while written:
                written.popleft().result()
        finally:
            writer.shutdown(wait=True, cancel_futures=True)
            for shard in list(self._open.values()):
                self.bar.update(-shard.done)
                shard.close()
            self._open.clear()

    def _requests(self, numbers: Sequence[int], busy: list[int]) -> Iterator[tuple[Any, Sequence[int]]]:
        """Claims shards one after the other, as their pictures are asked for."""
        for number in numbers:
            if self._is_done(number):
                continue
            while len(self._open) >= _CLAIMS and not self._failed:
                yield None, ()
            claimed = contextlib.ExitStack()
            if not claimed.enter_context(claim(lock_path(self.folder / self.manifest.shards[number].file))):
                claimed.close()
                busy.append(number)
                continue
            if self._is_done(number):
                claimed.close()
                continue
            try:
                shard = self._open[number] = _Shard(self, number, claimed)
            except BaseException:
                claimed.close()
                raise
            start = int(self._starts[number])
            for first in range(start, start + shard.records, self.runner.batch):
                chosen = self.indices[first : min(first + self.runner.batch, start + shard.records)]
                yield (shard, [self.pictures.source.ids[index] for index in chosen]), chosen

    def _is_done(self, number: int) -> bool:
        if not is_done(self.folder, self.manifest, number):
            return False
        if number not in self._seen:
            self._seen.add(number)
            self._progress(self.manifest.shards[number].records)
        return True

    def _write(self, shard: _Shard, ids: list[str], features: ExpertFeatures) -> None:
        try:
            self._written(shard, ids, features)
        except BaseException:
            self._failed = True
            raise

    def _written(self, shard: _Shard, ids: list[str], features: ExpertFeatures) -> None:
        name, manifest = self.manifest.expert["name"], self.manifest
        _check_shapes(manifest, self.runner, features)
        payloads = codecs.encode_features(manifest.codec, features, ids, name, manifest.basis)
        shard.moments.add_tokens(np.asarray(features.patches)[: len(ids)])
        for id, payload in zip(ids, payloads, strict=True):
            shard.writer.write(id, payload)
        shard.done += len(ids)
        self._progress(len(ids))
        if shard.done == shard.records:
            shard.writer.finish(shard.moments)
            self._seen.add(shard.number)
            del self._open[shard.number]
            shard.close()

    def _progress(self, pictures: int) -> None:
        done = (self.bar.n + pictures) * self.manifest.record_bytes / 1e6
        self.bar.set_postfix_str(f"{done:.1f} of {self._total:.1f} MB", refresh=False)
        self.bar.update(pictures)


def _check_shapes(manifest: Manifest, runner: Runner, features: ExpertFeatures) -> None:
    card = runner.expert.card
    found = {name: tuple(value.shape) for name, value in features._asdict().items() if value is not None}
    wanted = {name: (runner.batch, *shape) for name, shape in manifest.shapes.items()}
    wanted["patches"] = (runner.batch, *card.grid, card.width)
    if found != wanted:
        raise InputError(f"expert {card.name!r}: its card promises {wanted} for {runner.batch} pictures, found {found}")


def _fit(manifest: Manifest, runner: Runner, pictures: _Pictures, indices: Sequence[int], progress: bool) -> Basis:
    """Fits the principal axes of a codec on pictures spread over some; the same pictures give the same axes."""
    codec = codecs.parse(manifest.codec)
    indices = indices[:: max(1, len(indices) // BASIS_PICTURES)][:BASIS_PICTURES]
    while True:
        covariance = Covariance()
        parts = ((len(part), part) for part in _parts(indices, runner.batch))
        try:
            bar = tqdm(total=len(indices), desc=f"axes of {runner.expert.card.name}", disable=not progress)
            with bar, contextlib.closing(pictures.batches(parts, runner.batch)) as batches:
                for count, pixels in batches:
                    features = runner(pixels)
                    _check_shapes(manifest, runner, features)
                    patches = np.asarray(features.patches)[:count]
                    # Refuses values that are not finite, as they are refused when they are stored.
                    covariance.add(codecs.encode("float32", codec.pooled(patches), where="principal axes")["patches"])
                    bar.update(count)
                    if covariance.full():
                        break
            return principal(covariance, codec.pca or 0)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            runner.halve(error)


def _parts(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _begin(folder: Path, wanted: Manifest, fit: Any) -> Manifest:
    """Creates the manifest, or checks that the one there is for the same thing; incomplete if a shard is missing."""
    path = folder / FILE_NAME
    with claim(folder / "manifest.lock", wait=True):
        if not path.exists():
            if codecs.parse(wanted.codec).pca:
                basis = wanted.basis or fit()
                content = basis.to_bytes()
                atomic_write_bytes(folder / BASIS_FILE, content)
                wanted = dataclasses.replace(wanted, basis=basis, basis_hash=digest(content))
            atomic_write_bytes(path, wanted.to_json())
            return wanted
        manifest = Manifest.read(folder)
        manifest.require_same(wanted, folder)
        if manifest.complete and not all(is_done(folder, manifest, n) for n in range(len(manifest.shards))):
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
            manifest = completed(folder, manifest)
            atomic_write_bytes(folder / FILE_NAME, manifest.to_json())
            FeatureStore.open(folder)
        _sweep(folder, manifest)
        return manifest


def completed(folder: Path, manifest: Manifest) -> Manifest:
    """Returns the manifest with what the indices of all its shards say: sizes, checksums, statistics."""
    moments, shards = Moments(), []
    for number, shard in enumerate(manifest.shards):
        index = read_index(folder, manifest, number)
        moments.add(index["moments"])
        shards.append(ShardEntry(shard.file, shard.records, index["bytes"], index["sha256"]))
    return dataclasses.replace(manifest, complete=True, statistics=moments.statistics(), shards=tuple(shards))


def _sweep(folder: Path, manifest: Manifest) -> None:
    """Removes what killed processes left beside finished shards; locks held by living ones stay."""
    names = {entry.name for entry in folder.iterdir()}
    for shard in manifest.shards:
        lock = lock_path(folder / shard.file)
        if not names & {lock.name, partial_path(folder / shard.file).name}:
            continue
        with claim(lock) as claimed:
            if claimed:
                partial_path(folder / shard.file).unlink(missing_ok=True)
    # Only a holder of the manifest's lock writes these, and no index is written once all are there.
    begins = tuple(f".{name}." for name in (FILE_NAME, BASIS_FILE))
    for name in names:
        if name.startswith((*begins, ".shard-")) and name.endswith(".tmp"):
            (folder / name).unlink(missing_ok=True)
