"""How fast features and pictures reach a step: stores, codecs, decoding of pictures, the loader, and a copy beside."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.bench import input as media
from tove_jax.bench.sections import Case, Scale
from tove_jax.bench.timing import Clock, Row, Spread, alternate, rows

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


def _jpeg(seed: int) -> bytes:
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

    view, files = View(size=224), [_jpeg(number) for number in range(batch)]
    decoded = [decode(data, "bench") for data in files]
    sides = {
        "decode": lambda: [decode(data, "bench") for data in files],
        "cut": lambda: [view.cut(picture) for picture in decoded],
    }
    times = alternate(sides, scale.turns, clock, share=scale.share)
    return rows("JPEG 640 x 480, one thread", times, batch, "images")


def _loader(scale: Scale, grid: int, width: int, batch: int, folder: str | None, clock: Clock) -> list[Row]:
    """Takes batches from the training loader: pictures decoded and cut, features read; a step waits for what is left.

    A step that takes longer than a batch never waits.
    """
    from tove_jax.data.decode import decode
    from tove_jax.data.loader import make_loader
    from tove_jax.data.picture import Picture
    from tove_jax.data.view import View
    from tove_jax.experts.store import FeatureStore

    files = [_jpeg(number) for number in range(4)]

    class Source:
        name, licence = "bench", "none"
        ids = [f"record {number}" for number in range(scale.records)]
        labels = captions = [None] * scale.records

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, index: int) -> Picture:
            return Picture(self.ids[index], decode(files[index % len(files)], self.ids[index]))

    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        media.write_store(Path(temporary) / "store", "mmap", scale.records, grid, width, 64)
        store = FeatureStore.open(Path(temporary) / "store")
        source: Any = Source()
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
