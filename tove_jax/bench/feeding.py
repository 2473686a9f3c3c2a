"""How fast features and pictures reach a step: stores, codecs, decoding of pictures, the loader, and a copy beside."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.bench import cases as steps
from tove_jax.bench import input as media
from tove_jax.bench.sections import Case, Scale
from tove_jax.bench.timing import Clock, Row, Spread, alternate, cores, rows
from tove_jax.files.atomic import atomic_write_bytes

CODECS = ("float32", "bf16", "fp8", "int8", "int4")
THREADS = 2


def cases(scale: Scale, small: bool, folder: str | None = None) -> list[Case]:
    """Returns the input section.

    Args:
      scale: records and turns are read.
      small: tiny records.
      folder: on the disk to measure; None: the system's temporary one.
    """
    grid, width, batch = (4, 32, 4) if small else (24, 1024, 16)

    def run(function: Callable[..., list[Row]]) -> Callable[[Clock], list[Row]]:
        return lambda clock: function(scale, grid, width, batch, folder, clock)

    return [
        Case("wait of a step", run(_wait)),
        Case("loader", run(_loader)),
        Case("stores", run(_stores)),
        Case("codecs", run(_codecs)),
        Case("pictures", run(_pictures)),
    ]


def _stores(scale: Scale, grid: int, width: int, batch: int, folder: str | None, clock: Clock) -> list[Row]:
    """Reads every medium cold and warm, as `tove_jax.bench.input`, with a copy in memory beside."""
    del clock
    options: dict[str, Any] = {"records": scale.records, "grid": grid, "width": width, "batch": batch}
    speeds = media.measure(folder, threads=THREADS, passes=max(1, scale.turns - 1), **options)
    size = scale.records // batch * batch * grid * grid * width * 2
    found = [_memcpy("store, warm", size, scale.turns)]
    for speed in speeds:
        side = f"{speed.medium}, CRCs {'compared' if speed.verify else 'not compared'}"
        for case, rate in (("store, cold", speed.cold), ("store, warm", speed.warm)):
            if rate is not None:
                seconds = size / rate
                ratio = seconds / found[0].seconds.median
                spread = Spread(seconds, seconds, seconds, 1)
                facts = {"note": "ratio to a copy in memory"}
                found.append(Row(case, side, spread, size / 1e9, "GB", ratio, facts))
    return found


def _memcpy(case: str, size: int, turns: int) -> Row:
    source = np.ones(size, np.uint8)
    target = np.empty_like(source)
    times = alternate({"copy in memory": lambda: np.copyto(target, source)}, turns, Clock())
    return rows(case, times, size / 1e9, "GB")[0]


def _codecs(scale: Scale, grid: int, width: int, batch: int, folder: str | None, clock: Clock) -> list[Row]:
    """Decodes a batch from the host: sent to the device and brought to float32."""
    del folder
    from tove_jax.experts import codecs

    values = np.random.default_rng(0).standard_normal((batch, grid, grid, width), np.float32)
    sides: dict[str, Callable[[], Any]] = {}
    facts = {}
    for codec in CODECS:
        payload = codecs.encode(codec, values)
        sides[codec] = _decoder(codec, payload)
        facts[codec] = {"note": f"{sum(array.nbytes for array in payload.values()) / batch / 1e6:.2f} MB a picture"}
    times = alternate(sides, scale.turns, clock, share=scale.share)
    return rows("codec, host to float32 on the device", times, batch, "images", facts)


def _decoder(codec: str, payload: dict[str, np.ndarray]) -> Callable[[], Any]:
    from tove_jax.experts import codecs

    decode = jax.jit(lambda payload: codecs.decode(codec, payload).astype(jnp.float32))
    return lambda: jax.block_until_ready(decode(payload))


def jpeg(seed: int) -> bytes:
    """Returns a JPEG of 640 x 480 pixels, as large as a photograph's."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (15, 20, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _pictures(scale: Scale, grid: int, width: int, batch: int, folder: str | None, clock: Clock) -> list[Row]:
    """Decodes JPEGs of 640 x 480 pixels, and cuts them for a student of 224, in one thread."""
    del grid, width, folder
    from tove_jax.data.decode import decode
    from tove_jax.data.view import View

    view, files = View(size=224), [jpeg(number) for number in range(batch)]
    decoded = [decode(data, "bench") for data in files]
    sides = {
        "decode": lambda: [decode(data, "bench") for data in files],
        "cut": lambda: [view.cut(picture) for picture in decoded],
    }
    times = alternate(sides, scale.turns, clock, share=scale.share)
    return rows("JPEG 640 x 480, one thread", times, batch, "images")


class _Pictures:
    """So many pictures of 640 x 480 pixels, decoded from JPEG each time."""

    name, licence = "bench", "none"

    def __init__(self, count: int) -> None:
        self.ids = [f"record {number}" for number in range(count)]
        self.labels = self.captions = [None] * count
        self.files = [jpeg(number) for number in range(4)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        from tove_jax.data.decode import decode
        from tove_jax.data.picture import Picture

        return Picture(self.ids[index], decode(self.files[index % len(self.files)], self.ids[index]))


def _loader(scale: Scale, grid: int, width: int, batch: int, folder: str | None, clock: Clock) -> list[Row]:
    """Takes batches from the training loader: pictures decoded and cut, features read; a step waits for what is left.

    A step that takes longer than a batch never waits.
    """
    from tove_jax.data.loader import make_loader
    from tove_jax.data.view import View
    from tove_jax.experts.store import FeatureStore

    source: Any = _Pictures(scale.records)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        media.write_store(Path(temporary) / "store", "mmap", scale.records, grid, width, 64)
        store = FeatureStore.open(Path(temporary) / "store")
        loader = make_loader(
            source,
            np.arange(scale.records),
            View(size=224),
            {"bench": store},
            batch=batch,
            threads=THREADS,
            prefetch=THREADS,
            cache_pixels=False,
        )
        batches = iter(loader)
        for _ in range(2 * THREADS):  # what was made while nobody looked
            next(batches)
        times = alternate({"batch": lambda: next(batches)}, 2 * scale.turns, clock, share=scale.share)
        batches.close()
    note = f"{THREADS} threads, {loader.batch_bytes / batch / 1e6:.2f} MB a picture"
    return rows("loader, JPEG and stored features", times, batch, "images", {"batch": {"note": note}})


def _wait(scale: Scale, grid: int, width: int, batch: int, folder: str | None, clock: Clock) -> list[Row]:
    """Feeds MoVE-KD's step from stores by the training loader, and from one batch that the device holds.

    Features are pooled to the student's grid and stored as int8, CLIP's as they are. Pictures are decoded each time.
    """
    del grid, width, batch
    from tove_jax.data.loader import make_loader
    from tove_jax.data.view import View

    size, rows_of = scale.students[0]
    side = steps.SIZES[size]["image_size"] // steps.SIZES[size]["patch_size"]
    codec = f"pool:{side}+int8,clip=bf16"
    config = steps.config_of("move_kd", size, batch=rows_of, dtype=scale.dtype, codec=codec)
    source: Any = _Pictures(2 * max(rows_of, scale.records // 4))
    step = steps.Step(config)
    step.params = None
    count, waits, threads = 5, [], max(THREADS, cores())
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        loader = make_loader(
            source,
            np.arange(len(source)),
            View.of_student(config.student),
            write_features(Path(temporary), config, source.ids),
            batch=rows_of,
            threads=threads,
            prefetch=config.data.prefetch,
            cache_pixels=False,
        )
        batches = iter(loader)

        def fed() -> None:
            began = time.perf_counter()
            waited = step.fed(batches, count)
            waits.append(waited / (time.perf_counter() - began))

        # What was made while the step compiled says nothing.
        for _ in range(loader.prefetch + threads):
            next(batches)
        sides = {"one batch on the device": lambda: step.fed(None, count), "loader and stores": fed}
        times = alternate(sides, scale.turns, clock, share=scale.share)
        batches.close()
    waited = float(np.median(waits[1:]))
    note = f"waited {waited:.1%} of the time; {threads} threads, {loader.batch_bytes / rows_of / 1e6:.2f} MB a picture"
    told = {"loader and stores": {"note": note, "waited": waited}}
    name = f"{count} steps of move_kd {size} batch {rows_of} {scale.dtype}, adapters train"
    return rows(name, times, count * rows_of, "images", told)


def write_features(
    folder: Path, config: Any, ids: list[str], hashes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Writes a store of drawn numbers for every expert of a run.

    Args:
      folder: in which every expert's is written.
      config: the run's settings.
      ids: of the pictures.
      hashes: of the experts' weights, by name, where somebody compares them.

    Returns:
      The stores, open, by expert.
    """
    from tove_jax.experts.extract import completed
    from tove_jax.experts.manifest import Moments, describe
    from tove_jax.experts.shards import ShardWriter
    from tove_jax.experts.store import FeatureStore
    from tove_jax.plan.abstract import abstract_cards, abstract_manifest

    found = {}
    drawn = steps.draw_batch(config)["features"]
    for name, card in abstract_cards(config).items():
        codec = abstract_manifest(config, card).codec
        options: dict[str, Any] = {"source": "bench", "source_licence": "none", "shard_records": 64}
        manifest = describe(card, (hashes or {}).get(name, "none"), card.view, codec, ids, **options)
        path = folder / name
        path.mkdir()
        first = 0
        for number, entry in enumerate(manifest.shards):
            with ShardWriter(path, manifest, number) as writer:
                for id in ids[first : first + entry.records]:
                    writer.write(id, {key: values[len(id) % len(values)] for key, values in drawn[name].items()})
                moments = Moments()
                moments.add_tokens(np.ones((1, card.width), np.float32))
                writer.finish(moments)
            first += entry.records
        atomic_write_bytes(path / "manifest.json", completed(path, manifest).to_json())
        found[name] = FeatureStore.open(path)
    return found
