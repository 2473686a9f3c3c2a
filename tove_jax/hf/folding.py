"""Folds published batch norms into the convolutions before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from tove_jax.errors import InputError

_PARTS = ("weight", "bias", "running_mean", "running_var")


def fold_batch_norms(
    arrays: Mapping[str, np.ndarray],
    pairs: Iterable[tuple[str, str]],
    *,
    epsilon: float,
    source: str = "arrays",
) -> dict[str, np.ndarray]:
    """Replaces convolution and batch norm by one convolution with a bias, computed in double precision.

    Args:
      arrays: published name to array, in torch's layout (output channels first).
      pairs: (convolution, batch norm) by the names' prefixes; the convolution may have a bias.
      epsilon: of the norms.
      source: what the arrays came from, for messages.

    Returns:
      The arrays with ``<convolution>.weight`` and ``.bias`` in float32 and without the norms' arrays.

    Raises:
      InputError: a pair without one of its arrays, or shapes that do not fit each other.
    """
    folded = dict(arrays)
    missing = []
    for convolution, norm in pairs:
        names = [f"{convolution}.weight", *(f"{norm}.{part}" for part in _PARTS)]
        absent = [name for name in names if name not in arrays]
        missing += absent
        if absent:
            continue
        kernel, *parts = (np.asarray(arrays[name], np.float64) for name in names)
        for name, part in zip(names[1:], parts, strict=True):
            if kernel.ndim < 2 or part.shape != kernel.shape[:1]:
                raise InputError(f"{source}: {name} has shape {part.shape}, {names[0]} has {kernel.shape}")
        weight, bias, mean, variance = parts
        scale = weight / np.sqrt(variance + epsilon)
        offset = np.asarray(arrays.get(f"{convolution}.bias", 0.0), np.float64) - mean
        folded[names[0]] = (kernel * scale.reshape(-1, *(1,) * (kernel.ndim - 1))).astype(np.float32)
        folded[f"{convolution}.bias"] = (bias + offset * scale).astype(np.float32)
        for name in (*names[1:], f"{norm}.num_batches_tracked"):
            folded.pop(name, None)
    if missing:
        shown = ", ".join(missing[:8])
        raise InputError(f"{source}: {len(missing)} arrays are missing: {shown}{' ...' if len(missing) > 8 else ''}")
    return folded


def unfolded_shapes(
    shapes: Mapping[str, tuple[int, ...]], pairs: Iterable[tuple[str, str]], *, biased: bool
) -> dict[str, tuple[int, ...]]:
    """Returns the published names and shapes behind those of the folded network.

    Args:
      shapes: name to shape of the folded network's arrays.
      pairs: as `fold_batch_norms` took.
      biased: whether the published convolutions of the pairs have biases of their own.
    """
    found = dict(shapes)
    for convolution, norm in pairs:
        width = found[f"{convolution}.bias"]
        if not biased:
            del found[f"{convolution}.bias"]
        found.update({f"{norm}.{part}": width for part in _PARTS})
    return found
