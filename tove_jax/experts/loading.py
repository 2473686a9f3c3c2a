"""What the loaders of experts share: weights inside installed packages, sizes, array checks."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertCard


def package_file(module: str, relative: str, requirement: str) -> Path:
    """Finds a weights file in an installed package without importing the package.

    The packages are wanted for their weights alone; importing them would pull in torch,
    TensorFlow or OpenCV, which are not installed.

    Args:
      module: the package's top-level module.
      relative: path of the file inside it.
      requirement: what pip should install when it is missing, such as ``name==1.0``.

    Returns:
      The file's path.

    Raises:
      InputError: the package or the file is not there; the message gives the pip command.
    """
    command = f"pip install --no-deps {requirement}"
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"package {requirement} is not installed: its weights are needed; run `{command}`")
    for folder in spec.submodule_search_locations:
        path = Path(folder, *relative.split("/"))
        if path.is_file():
            return path
    raise InputError(f"package {module}: file {relative} is missing; run `{command} --force-reinstall`")


def resized(card: ExpertCard, size: int | None, multiple: int) -> ExpertCard:
    """Returns a convolutional expert's card for another input size: same stride, another grid.

    Args:
      card: the published card.
      size: pixels a side, or None for the card as it is.
      multiple: what `size` must be a multiple of.

    Raises:
      InputError: `size` is no positive multiple of `multiple`.
    """
    if size is None:
        return card
    if not isinstance(size, int) or size <= 0 or size % multiple:
        raise InputError(f"expert {card.name}: size: expected a positive multiple of {multiple}, found {size!r}")
    grid = (size * card.grid[0] // card.view.size, size * card.grid[1] // card.view.size)
    return dataclasses.replace(card, view=dataclasses.replace(card.view, size=size), grid=grid)


def check_arrays(path: Path, arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that a weights file holds exactly the arrays of an architecture, all finite.

    Args:
      path: named in the message.
      arrays: as read.
      shapes: name to shape, for every array the architecture has.

    Raises:
      InputError: an array is missing, superfluous, of another shape, or holds NaN or Inf.
    """
    for kind, names in (
        ("missing", shapes.keys() - arrays.keys()),
        ("unexpected", arrays.keys() - shapes.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise InputError(f"{path}: {len(names)} {kind} arrays: {shown}{' ...' if len(names) > 5 else ''}")
    for name, shape in shapes.items():
        found = tuple(arrays[name].shape)
        if found != tuple(shape):
            raise InputError(f"{path}: array {name}: expected shape {tuple(shape)}, found {found}")
        if not np.isfinite(arrays[name]).all():
            raise InputError(f"{path}: array {name}: expected finite numbers, found NaN or Inf")
