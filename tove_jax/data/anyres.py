"""LLaVA-NeXT's pictures of any shape: the best grid of tiles, the tiles, and the order of their tokens.

Everything that depends on a picture's shape happens here, on the host: the device gathers tokens by an index of
static length. Choices and rounding are those of transformers' LLaVA-NeXT.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tove_jax.data.view import View
from tove_jax.errors import InputError

RESOLUTIONS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Height and width of LLaVA-NeXT's grids, pixels, for tiles of 336."""


def best_resolution(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the grid that keeps the most of a picture's pixels; of equal ones the smallest, then the first.

    Args:
      size: height and width of the picture.
      resolutions: heights and widths to choose from.
    """
    height, width = size

    def worth(target: tuple[int, int]) -> tuple[int, int]:
        scale = min(target[1] / width, target[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - target[0] * target[1]

    return max(resolutions, key=worth)


@dataclasses.dataclass(frozen=True)
class Anyres:
    """How a picture is cut into a base picture and tiles.

    Attributes:
      view: of the base picture and of each tile; its fit is not used.
      patch_size: of the tower, pixels.
      resolutions: heights and widths of the grids, multiples of the view's size.

    Raises:
      InputError: no resolution, or one that is no multiple of the view's size.
    """

    view: View
    patch_size: int
    resolutions: tuple[tuple[int, int], ...] = RESOLUTIONS

    def __post_init__(self) -> None:
        size = self.view.size
        if not self.resolutions or any(
            len(pair) != 2 or any(side < size or side % size for side in pair) for pair in self.resolutions
        ):
            raise InputError(
                f"resolutions: expected heights and widths that are multiples of {size}, found {self.resolutions}"
            )

    @property
    def side(self) -> int:
        """Patches a side of a tile."""
        return self.view.size // self.patch_size

    @property
    def most_tiles(self) -> int:
        """Tiles of a picture at most, the base picture among them: K of a batch that takes every picture."""
        return 1 + max(self._tiles(resolution) for resolution in self.resolutions)

    @property
    def most_tokens(self) -> int:
        """Tokens of a picture at most, newlines among them."""
        grids = [(high // self.view.size * self.side, wide // self.view.size) for high, wide in self.resolutions]
        return self.side**2 + max(lines * (columns * self.side + 1) for lines, columns in grids)

    def _tiles(self, resolution: tuple[int, int]) -> int:
        return resolution[0] // self.view.size * (resolution[1] // self.view.size)

    def tiles(self, size: tuple[int, int]) -> int:
        """Returns how many tiles a picture of this height and width has, the base picture among them."""
        return 1 + self._tiles(best_resolution(size, self.resolutions))

    def cut(self, image: np.ndarray) -> np.ndarray:
        """Cuts one picture.

        Args:
          image: uint8 (H, W, 3), RGB.

        Returns:
          uint8 (K, size, size, 3): the whole picture squeezed to a square, then the tiles of the picture scaled into
          its grid and padded with black, line by line.

        Raises:
          InputError: not uint8 (H, W, 3), or a side of zero.
        """
        size = self.view.size
        base = dataclasses.replace(self.view, fit="squash", resize=None).cut(image)
        if self.view.flip:
            image = image[:, ::-1]
        height, width = image.shape[:2]
        high, wide = best_resolution((height, width), self.resolutions)
        across, down = wide / width, high / height
        if across < down:
            inner = (wide, min(math.ceil(height * across), high))
        else:
            inner = (min(math.ceil(width * down), wide), high)
        method = Image.Resampling[self.view.interpolation.upper()]
        scaled = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(inner, method))
        canvas = np.zeros((high, wide, 3), np.uint8)
        top, left = (high - inner[1]) // 2, (wide - inner[0]) // 2
        canvas[top : top + inner[1], left : left + inner[0]] = scaled
        tiles = canvas.reshape(high // size, size, wide // size, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
        return np.concatenate([base[None], tiles])

    def _lines(self, size: tuple[int, int]) -> np.ndarray:
        """Returns the numbers of the tokens of a picture's tiles, (lines, columns), without what is padding."""
        high, wide = best_resolution(size, self.resolutions)
        rows, columns, side = high // self.view.size, wide // self.view.size, self.side
        tiles = side**2 + np.arange(rows * columns * side**2).reshape(rows, columns, side, side)
        numbers = tiles.swapaxes(1, 2).reshape(rows * side, columns * side)
        height, width = size
        if width / height > columns / rows:
            padding = (rows * side - int(round(height * (columns * side / width), 7))) // 2
            return numbers[padding : rows * side - padding]
        padding = (columns * side - int(round(width * (rows * side / height), 7))) // 2
        return numbers[:, padding : columns * side - padding]

    def count(self, size: tuple[int, int]) -> int:
        """Returns how many tokens a picture of this height and width has, newlines among them."""
        lines = self._lines(size)
        return self.side**2 + lines.size + len(lines)

    def index(self, sizes: Sequence[tuple[int, int]], *, tiles: int, length: int) -> np.ndarray:
        """Tells which tokens make up the pictures of a row, in order.

        Args:
          sizes: height and width of the row's pictures, whose tiles lie one after the other.
          tiles: K, tiles that the row has room for.
          length: M, tokens that it has room for.

        Returns:
          int32 (M,): numbers of the tokens of the row's tiles, ``K * N`` for the newline, -1 after the last; as
          `tove_jax.models.llava.pack_pictures` reads it.

        Raises:
          InputError: more tiles or tokens than there is room for.
        """
        newline, first, found = tiles * self.side**2, 0, [np.zeros(0, np.int64)]
        for size in sizes:
            lines = self._lines(size) + first * self.side**2
            base = np.arange(self.side**2) + first * self.side**2
            found += [base, np.pad(lines, ((0, 0), (0, 1)), constant_values=newline).reshape(-1)]
            first += self.tiles(size)
        joined = np.concatenate(found)
        if first > tiles or len(joined) > length:
            raise InputError(
                f"pictures of {list(sizes)} pixels: expected at most {tiles} tiles and {length} tokens, found {first} "
                f"and {len(joined)}"
            )
        return np.pad(joined, (0, length - len(joined)), constant_values=-1).astype(np.int32)

    def stack(self, pictures: Sequence[np.ndarray], *, tiles: int) -> np.ndarray:
        """Returns uint8 (tiles, size, size, 3), the tiles of a row's pictures, black after the last.

        Raises:
          InputError: more tiles than there is room for.
        """
        size = self.view.size
        cut = np.concatenate([self.cut(picture) for picture in pictures] or [np.zeros((0, size, size, 3), np.uint8)])
        if len(cut) > tiles:
            raise InputError(f"pictures: expected at most {tiles} tiles, found {len(cut)}")
        return np.pad(cut, ((0, tiles - len(cut)), (0, 0), (0, 0), (0, 0)))
