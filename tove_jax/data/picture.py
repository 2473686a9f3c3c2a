"""What every picture source yields, and what a source is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

BLANK = "(blank)"
"""Id of the black picture that a source has where some of its conversations have none."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One record of a source.

    Attributes:
      id: unique in its source, stable between runs and machines; features are found by it.
      image: uint8 (H, W, 3), RGB.
      caption: text, or None where the source has none.
      label: name of the category, or None.
    """

    id: str
    image: np.ndarray
    caption: str | None = None
    label: str | None = None


class PictureSource(Protocol):
    """A random-access set of pictures, safe to read from several threads, cheap to pickle.

    ``ids``, ``labels`` and ``captions`` are known without decoding a picture; ``labels`` and
    ``captions`` hold None where there is none. Order is stable.
    """

    name: str
    licence: str
    ids: Sequence[str]
    labels: Sequence[str | None]
    captions: Sequence[str | None]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Picture: ...
