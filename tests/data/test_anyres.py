"""Tiles of LLaVA-NeXT: the grid, the pixels and the order of tokens are transformers'; and by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tove_jax.data.anyres import RESOLUTIONS, Anyres, best_resolution
from tove_jax.data.view import View
from tove_jax.errors import InputError

SMALL = Anyres(View(8), 2, ((8, 16), (16, 8), (16, 16), (24, 8), (8, 24)))
SIZES = [(336, 336), (20, 20), (480, 640), (640, 480), (300, 1200), (1200, 300), (335, 1009), (1, 700), (97, 51)]


def test_the_grid_by_hand():
    assert best_resolution((336, 336), RESOLUTIONS) == (336, 672)  # nothing is lost; the smallest, then the first
    assert best_resolution((480, 640), RESOLUTIONS) == (672, 672)
    assert best_resolution((300, 1200), RESOLUTIONS) == (336, 1008)
    assert best_resolution((1200, 300), RESOLUTIONS) == (1008, 336)


def test_tokens_by_hand():
    """A picture twice as wide as high on a grid of one line of three tiles, 2 x 2 patches each: a line is padding."""
    anyres = Anyres(View(4), 2, ((4, 12),))
    # 12 x 3.2 pixels, 6 x 1.6 patches; int(1.6) = 1, and the padding (2 - 1) // 2 = 0 keeps both lines.
    index = anyres.index([(16, 60)], tiles=4, length=20)
    lines = [[4, 5, 8, 9, 12, 13, 16], [6, 7, 10, 11, 14, 15, 16]]
    assert index.tolist() == [0, 1, 2, 3, *lines[0], *lines[1], -1, -1]
    assert anyres.count((16, 60)) == 18 and anyres.tiles((16, 60)) == 4
    # 3 x 4 pixels of 12 x 4: the columns on both sides go.
    narrow = anyres.index([(16, 12), (16, 12)], tiles=8, length=anyres.count((16, 12)) * 2)
    assert narrow[:14].tolist() == [0, 1, 2, 3, 8, 9, 32, 10, 11, 32, 16, 17, 18, 19]
    assert anyres.index([], tiles=4, length=2).tolist() == [-1, -1]


def test_room_and_settings_are_checked():
    for sizes, tiles, length in (([(16, 16)], 2, 99), ([(16, 16)], 5, 3), ([(16, 16)] * 2, 5, 999)):
        with pytest.raises(InputError, match="expected at most"):
            SMALL.index(sizes, tiles=tiles, length=length)
    with pytest.raises(InputError, match="at most 2 tiles, found 5"):
        SMALL.stack([np.zeros((16, 16, 3), np.uint8)], tiles=2)
    for resolutions in ((), ((8, 12),), ((8,),), ((0, 8),)):
        with pytest.raises(InputError, match="resolutions"):
            Anyres(View(8), 2, resolutions)


def test_tiles_hold_the_picture():
    """A picture of the grid's own size comes back from its tiles; mirrored, the tiles mirror."""
    picture = np.random.RandomState(0).randint(0, 256, (16, 24, 3), np.uint8)
    anyres = Anyres(View(8), 2, ((16, 24),))
    tiles = anyres.cut(picture)
    assert tiles.shape == (anyres.tiles((16, 24)), 8, 8, 3) == (anyres.most_tiles, 8, 8, 3)
    rows = [np.concatenate(tiles[1 + 3 * i : 4 + 3 * i], axis=1) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(rows), picture)
    mirrored = dataclasses.replace(anyres, view=anyres.view.flipped()).cut(picture)
    np.testing.assert_array_equal(mirrored, anyres.cut(picture[:, ::-1]))
    stacked = SMALL.stack([picture[:8], picture[:, :8]], tiles=9)
    assert stacked.shape == (9, 8, 8, 3) and not stacked[SMALL.tiles((8, 24)) + SMALL.tiles((16, 8)) :].any()
    assert SMALL.most_tokens == max(SMALL.count(size) for size in SMALL.resolutions)


def test_equal_to_transformers():
    """Grid, pixels and number of tokens of the processor, photographs among the pictures."""
    pytest.importorskip("torch")
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor
    from transformers.image_processing_utils import select_best_resolution

    skimage = pytest.importorskip("skimage.data")
    for size in SIZES:
        assert best_resolution(size, RESOLUTIONS) == select_best_resolution(size, [list(pair) for pair in RESOLUTIONS])
    anyres = Anyres(View(48), 12, tuple((48 * h, 48 * w) for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))))
    reference = LlavaNextImageProcessorPil(
        size={"shortest_edge": 48},
        crop_size={"height": 48, "width": 48},
        image_grid_pinpoints=[list(pair) for pair in anyres.resolutions],
    )
    counter = LlavaNextProcessor.__new__(LlavaNextProcessor)
    counter.image_processor, counter.patch_size, counter.num_additional_image_tokens = reference, 12, 0
    photograph, coffee = skimage.astronaut(), skimage.coffee()
    for picture in (photograph, coffee, coffee.swapaxes(0, 1), coffee[:100], photograph[:, 200:261], coffee[:20, :20]):
        found = reference([picture], return_tensors="np")
        expected = found["pixel_values"][0].transpose(0, 2, 3, 1)
        size = picture.shape[:2]
        tiles = anyres.cut(np.ascontiguousarray(picture))
        assert tuple(found["image_sizes"][0]) == size and len(expected) == anyres.tiles(size)
        np.testing.assert_allclose(anyres.view.normalize(tiles), expected, atol=1 / 255)
        assert anyres.count(size) == counter._get_number_of_features(*size, 48, 48)
