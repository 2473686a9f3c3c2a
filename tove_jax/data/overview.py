"""What is in a source: counts by label and side of the split, broken pictures, a sheet of small ones."""

from __future__ import annotations

import collections
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from tove_jax.data.picture import PictureSource
from tove_jax.data.split import Split, spread
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_write_bytes


def counts_table(source: PictureSource, split: Split) -> str:
    """Returns a text table of pictures by label and side; labels with most pictures first.

    At most 30 labels have a line of their own, the rest share one.
    """
    sides = [collections.Counter(source.labels[int(i)] or "(no label)" for i in side) for side in split]
    total = sides[0] + sides[1]
    order = sorted(total, key=lambda label: (-total[label], label))
    rows = [(label, sides[0][label], sides[1][label]) for label in order[:30]]
    if order[30:]:
        rest = order[30:]
        rows.append((f"({len(rest)} more labels)", *(sum(side[label] for label in rest) for side in sides)))
    rows.append(("total", len(split.train), len(split.held_out)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{'label':<{width}} {'train':>8} {'held out':>9} {'all':>8}"]
    lines += [f"{label:<{width}} {train:>8} {held:>9} {train + held:>8}" for label, train, held in rows]
    return "\n".join(lines)


def find_broken(source: PictureSource, indices: Sequence[int], *, threads: int = 2) -> list[str]:
    """Decodes every picture, with a progress bar, and returns what is wrong, a line a broken picture."""

    def problem(index: int) -> str | None:
        try:
            source[int(index)]
        except InputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(threads) as pool:
        found = tqdm(pool.map(problem, indices), "decode pictures", total=len(indices), unit="picture")
        return [line for line in found if line]


def contact_sheet(
    source: PictureSource, indices: Sequence[int], path: Path | str, *, count: int = 60, cell: int = 112
) -> int:
    """Writes a PNG of small pictures with their labels or captions, spread evenly over `indices`.

    Args:
      source: pictures.
      indices: of which some are shown.
      path: target, written whole or not at all.
      count: pictures at most.
      cell: side of a small picture, pixels.

    Returns:
      How many are on it.

    Raises:
      InputError: no picture, one that cannot be decoded, or a target that cannot be written.
    """
    shown = [int(indices[int(i)]) for i in spread(len(indices), count)]
    if not shown or count < 1 or cell < 8:
        raise InputError(f"contact sheet: expected pictures and cells of 8 pixels, found {len(shown)} and {cell}")
    view, gap, text = View(cell), 6, 14
    columns = min(len(shown), max(1, round((1.4 * len(shown)) ** 0.5)))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (gap + columns * (cell + gap), gap + rows * (cell + text + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, index in enumerate(tqdm(shown, "contact sheet", unit="picture", leave=False)):
        picture = source[index]
        left, top = gap + number % columns * (cell + gap), gap + number // columns * (cell + text + gap)
        sheet.paste(Image.fromarray(np.ascontiguousarray(view.cut(picture.image))), (left, top))
        title = (picture.caption or picture.label or picture.id).encode("latin-1", "replace").decode("latin-1")
        draw.text((left, top + cell), title[: cell // 6], fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    atomic_write_bytes(path, buffer.getvalue())
    return len(shown)
