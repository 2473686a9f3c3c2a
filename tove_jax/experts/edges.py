"""Experts that give edges: DexiNed, run in JAX."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.data.view import View
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.experts.published import Published
from tove_jax.hf.folding import fold_batch_norms
from tove_jax.hf.rules import Rule
from tove_jax.models.dexined import DENSE_LAYERS, DOUBLINGS, STRIDE, DexiNed

EPSILON = 1e-5
SIDES = tuple(f"side{number}" for number in range(1, 1 + len(DOUBLINGS)))

# What the released network holds but never uses.
IGNORE = (r"side_5\..*", r"block_cat\.bn\..*", r".*\.num_batches_tracked")


def _layers() -> list[tuple[str, str, str | None]]:
    """Returns (our name, published convolution, its batch norm) of every layer."""
    rows: list[tuple[str, str, str | None]] = [
        (f"block{b}_conv{c}", f"block_{b}.conv{c}", f"block_{b}.bn{c}") for b in (1, 2) for c in (1, 2)
    ]
    for block, layers in DENSE_LAYERS.items():
        for layer in range(1, 1 + layers):
            prefix = f"dblock_{block}.denselayer{layer}"
            for c in (1, 2):
                rows.append((f"block{block}_layer{layer}_conv{c}", f"{prefix}.conv{c}", f"{prefix}.norm{c}"))
    rows += [(f"skip{n}", f"side_{n}.conv", f"side_{n}.bn") for n in range(1, 5)]
    rows += [(f"pre{n}", f"pre_dense_{n}.conv", f"pre_dense_{n}.bn") for n in range(2, 7)]
    for number, doublings in enumerate(DOUBLINGS, start=1):
        for step in range(doublings):
            # The convolution, a ReLU and the transposed convolution of each step.
            prefix = f"up_block_{number}.features"
            rows.append((f"side{number}_conv{step}", f"{prefix}.{3 * step}", None))
            rows.append((f"side{number}_up{step}", f"{prefix}.{3 * step + 2}", None))
    return [*rows, ("fuse", "block_cat.conv", None)]


LAYERS = _layers()
PAIRS = tuple((convolution, norm) for _, convolution, norm in LAYERS if norm)
# Output channels come first in torch's convolutions, input channels in its transposed ones: our kernel of a
# transposed convolution is (height, width, out, in), so one permutation serves both.
RULES = tuple(
    rule
    for ours, theirs, _ in LAYERS
    for rule in (Rule(f"{theirs}.weight", f"{ours}/kernel", (2, 3, 1, 0)), Rule(f"{theirs}.bias", f"{ours}/bias"))
)


def canonical(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Strips the prefix of a parallel run, and folds the batch norms.

    Raises:
      InputError: an array of a batch norm is missing.
    """
    arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return fold_batch_norms(arrays, PAIRS, epsilon=EPSILON, source="DexiNed")


def features(module: nn.Module, params: Any, pixels: jax.Array) -> ExpertFeatures:
    """Returns the fused edge probability (B, S, S, 1) as patches."""
    return ExpertFeatures(patches=nn.sigmoid(module.apply({"params": params}, pixels)[0]))


def sides(module: nn.Module, params: Any, pixels: jax.Array) -> jax.Array:
    """Returns the edge probability of every block (B, 6, S, S), finest first."""
    found = module.apply({"params": params}, pixels, intermediates=SIDES)[1]
    return nn.sigmoid(jnp.stack([found[name][..., 0] for name in SIDES], axis=1))


ROWS = (
    Published(
        card=ExpertCard(
            name="edges",
            title="DexiNed edge detector (BIPED)",
            paper="Soria, Riba and Sappa, Dense Extreme Inception Network, WACV 2020, arXiv:1909.01955",
            # A copy of the authors' 10_model.pth (github.com/xavysp/DexiNed).
            weights="kornia/dexined",
            licence="MIT",
            # Single pictures as released: 512 x 512, whatever their aspect.
            view=View(
                size=512,
                fit="squash",
                interpolation="bilinear",
                mean=(103.939, 116.779, 123.68),
                std=(1.0, 1.0, 1.0),
                channels="bgr",
                scale=255.0,
            ),
            grid=(512, 512),
            width=1,
            checked_against="the released PyTorch network",
            parameters=35_058_891,
        ),
        build=lambda size: DexiNed(),
        rules=RULES,
        features=features,
        ignore=IGNORE,
        canonical=canonical,
        multiple=STRIDE,
        file="DexiNed_BIPED_10.pth",
        extras={"sides": sides},
    ),
)
