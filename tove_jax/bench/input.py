"""Reading speed of the feature store's media, side by side: ``python -m tove_jax.bench.input``.

Stores of equal random records are written to a temporary folder, one a medium, and read in random order, each
record copied into a batch, as `tove_jax.data.loader` does. A run measures one pass of every medium before the
next pass of any, so that a change of the machine's load meets all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from tove_jax.experts import codecs, media
from tove_jax.experts.base import ExpertCard
from tove_jax.experts.manifest import Manifest, Moments, describe
from tove_jax.experts.shards import ShardWriter
from tove_jax.experts.store import FeatureStore
from tove_jax.files.atomic import atomic_write_bytes


@dataclasses.dataclass(frozen=True)
class Speed:
    """One medium's reading speed through Grain's threads.

    Attributes:
      medium: see `tove_jax.experts.media`.
      verify: whether CRCs were compared.
      cold: bytes a second of the first pass, from the disk; None where the system's page cache could not be emptied
        of the store.
      first: bytes a second of a newly opened store whose pages are in memory.
      warm: bytes a second of the passes after it, the best of them.
    """

    medium: str
    verify: bool
    cold: float | None
    first: float
    warm: float


def write_store(folder: Path, medium: str, records: int, grid: int, width: int, shard_records: int) -> Manifest:
    """Writes a store of random bf16 patches (grid, grid, width)."""
    from tove_jax.data.view import View
    from tove_jax.experts.extract import completed

    card = ExpertCard("bench", "Bench", "none", "none", "none", View(size=16), (grid, grid), width)
    ids = [f"record {number}" for number in range(records)]
    manifest = describe(
        card,
        "none",
        card.view,
        "bf16",
        ids,
        source="bench",
        source_licence="none",
        shard_records=shard_records,
        medium=medium,
    )
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, 2**15, (grid, grid, width), np.uint16)
    spec = manifest.arrays["patches"]
    for number, entry in enumerate(manifest.shards):
        with ShardWriter(folder, manifest, number) as writer:
            for position in range(entry.records):
                id = ids[number * shard_records + position]
                # Cheap to make and different in every record.
                writer.write(id, {"patches": np.roll(values, position).view(codecs.dtype_of(spec.dtype))})
            moments = Moments()
            moments.add_tokens(np.ones((1, width), np.float32))
            writer.finish(moments)
    manifest = completed(folder, manifest)
    atomic_write_bytes(folder / "manifest.json", manifest.to_json())
    return manifest


class _Copied:
    """Copies a batch's records into one array, and gives its first bytes."""

    def __init__(self, store: FeatureStore, batch: int, seed: int) -> None:
        self.store, self.batch = store, batch
        self.order = np.random.default_rng(seed).permutation(len(store))

    def __call__(self, step: int) -> np.ndarray:
        spec = self.store.manifest.arrays["patches"]
        out = np.empty((self.batch, *spec.shape), codecs.dtype_of(spec.dtype))
        for row in range(self.batch):
            position = self.order[step * self.batch + row]
            out[row] = self.store.read(self.store.ids[position])["patches"]
        return out


def read_speed(store: FeatureStore, *, batch: int, threads: int, seed: int) -> float:
    """Returns bytes a second of one pass over a store in random order."""
    steps = len(store) // batch
    dataset = grain.MapDataset.range(steps).map(_Copied(store, batch, seed))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
    iterator: Iterator[Any] = iter(dataset.to_iter_dataset(options))
    start = time.perf_counter()
    count = sum(1 for _ in iterator)
    seconds = time.perf_counter() - start
    iterator.close()  # type: ignore[attr-defined]
    return count * batch * store.manifest.record_bytes / seconds


def forget(folder: Path) -> bool:
    """Asks the system to drop a folder's files from its page cache; returns whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return True


def measure(
    folder: Path | str | None = None,
    *,
    records: int = 512,
    grid: int = 24,
    width: int = 1024,
    batch: int = 16,
    threads: int = 2,
    passes: int = 3,
    shard_records: int = 64,
) -> list[Speed]:
    """Measures every medium, with and without comparing CRCs.

    Args:
      folder: on the disk to measure; None: the system's temporary one. What is written goes afterwards.
      records: a store; its bytes should fit in memory twice.
      grid, width: shape of a record's patches; the defaults are CLIP ViT-L/14's at 336 pixels, 1.18 MB.
      batch: records a batch.
      threads: of Grain.
      passes: warm ones.
      shard_records: records a shard.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        names = list(media.SUFFIXES)
        for medium in names:
            write_store(Path(temporary) / medium, medium, records, grid, width, shard_records)
        options: dict[str, Any] = {"batch": batch, "threads": threads}
        cases = [(medium, verify) for verify in (True, False) for medium in names]
        cold: dict[str, float | None] = dict.fromkeys(names)
        for medium in names:
            if forget(Path(temporary) / medium):
                cold[medium] = read_speed(FeatureStore.open(Path(temporary) / medium), seed=0, **options)
        stores = {case: FeatureStore.open(Path(temporary) / case[0], verify=case[1]) for case in cases}
        speeds: dict[tuple[str, bool], list[float]] = {case: [] for case in cases}
        for number in range(passes + 1):
            for case, store in stores.items():
                speeds[case].append(read_speed(store, seed=number, **options))
    return [
        Speed(
            medium, verify, cold[medium] if verify else None, speeds[medium, verify][0], max(speeds[medium, verify][1:])
        )
        for medium, verify in cases
    ]


def table(speeds: list[Speed]) -> str:
    """Returns the speeds as a Markdown table."""
    lines = ["| medium | CRC | cold, GB/s | first warm pass, GB/s | later, GB/s |", "|---|---|---|---|---|"]
    for speed in speeds:
        cold = "" if speed.cold is None else f"{speed.cold / 1e9:.2f}"
        lines.append(
            f"| {speed.medium} | {'compared' if speed.verify else 'not compared'} | {cold} | {speed.first / 1e9:.2f} | "
            f"{speed.warm / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tove_jax.bench.input", description="Reading speed of the media.")
    parser.add_argument("--folder", help="On the disk to measure; the system's temporary folder when left out.")
    for name, value, text in (
        ("records", 512, "Records of a store."),
        ("batch", 16, "Records a batch."),
        ("threads", 2, "Grain's threads."),
        ("passes", 3, "Warm passes; the best is given."),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=text)
    args = parser.parse_args(argv)
    speeds = measure(args.folder, records=args.records, batch=args.batch, threads=args.threads, passes=args.passes)
    print(table(speeds))


if __name__ == "__main__":
    main()
