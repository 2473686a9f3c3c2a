"""Experts that give surface normals: NLL-AngMF, run in JAX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from tove_jax.data.view import IMAGENET_MEAN, IMAGENET_STD, View
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.experts.published import Published
from tove_jax.hf.folding import fold_batch_norms
from tove_jax.hf.rules import Rule
from tove_jax.models.angmf import SKIPS, STRIDE, AngMF

ENCODER_EPSILON = 1e-3
DECODER_EPSILON = 1e-5
_ENCODER = "encoder.original_model"

# The norm after the encoder's last convolution, which the decoder never reads, and its classifier.
IGNORE = (rf"{_ENCODER}\.bn2\..*", rf"{_ENCODER}\.(classifier|global_pool)\..*", r".*\.num_batches_tracked")


def _block(prefix: str, expanded: bool) -> Iterator[tuple[str, str, str | None]]:
    """Yields (our name, published convolution, its batch norm) of one block of the encoder."""
    if expanded:
        yield "expand", f"{prefix}.conv_pw", f"{prefix}.bn1"
    yield "depthwise", f"{prefix}.conv_dw", f"{prefix}.bn{2 if expanded else 1}"
    yield "squeeze", f"{prefix}.se.conv_reduce", None
    yield "excite", f"{prefix}.se.conv_expand", None
    yield "project", f"{prefix}.conv_pwl" if expanded else f"{prefix}.conv_pw", f"{prefix}.bn{3 if expanded else 2}"


def _convolution(ours: str, theirs: str, layers: tuple[int, ...] | None = None, *, bias: bool = True) -> list[Rule]:
    """Returns the rules of a convolution over two axes; of a stack of them when `layers` is given."""
    axes = (2, 3, 1, 0) if layers is None else (0, 3, 4, 2, 1)
    rules = [Rule(f"{theirs}.weight", f"{ours}/kernel", axes, layers=layers)]
    return rules + ([Rule(f"{theirs}.bias", f"{ours}/bias", layers=layers)] if bias else [])


def _tables(module: AngMF) -> tuple[tuple[Rule, ...], tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Returns the rules, and the pairs of convolution and batch norm of encoder and decoder."""
    rules = _convolution("encoder/stem", f"{_ENCODER}.conv_stem")
    rules += _convolution("encoder/head", f"{_ENCODER}.conv_head", bias=False)
    encoder = [(f"{_ENCODER}.conv_stem", f"{_ENCODER}.bn1")]
    for index, stage in enumerate(module.stages):
        for layer in range(stage.repeats):
            names = _block(f"{_ENCODER}.blocks.{index}.{layer}", stage.expansion != 1)
            encoder += [(convolution, norm) for _, convolution, norm in names if norm]
        for ours, theirs, _ in _block(f"{_ENCODER}.blocks.{index}.0", stage.expansion != 1):
            rules += _convolution(f"encoder/stage{index}_first/{ours}", theirs)
        rest = tuple(range(1, stage.repeats))
        for ours, theirs, _ in _block(f"{_ENCODER}.blocks.{index}.{{layer}}", stage.expansion != 1):
            rules += _convolution(f"encoder/stage{index}_rest/{ours}", theirs, rest) if rest else []
    rules += _convolution("neck", "decoder.conv2") + _convolution("coarse", "decoder.out_conv_res8")
    decoder = []
    for step in range(1, 1 + len(SKIPS)):
        for index in (1, 2):
            convolution = f"decoder.up{step}._net.{3 * index - 3}"
            rules += _convolution(f"up{step}_conv{index}", convolution)
            decoder.append((convolution, f"decoder.up{step}._net.{3 * index - 2}"))
    for scale in (4, 2, 1):
        for index in range(4):
            ours, theirs = f"refine{scale}_{index}", f"decoder.out_conv_res{scale}.{2 * index}"
            rules += [Rule(f"{theirs}.weight", f"{ours}/kernel", (2, 1, 0)), Rule(f"{theirs}.bias", f"{ours}/bias")]
    return tuple(rules), tuple(encoder), tuple(decoder)


RULES, ENCODER_PAIRS, DECODER_PAIRS = _tables(AngMF())


def canonical(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Strips the prefix of a parallel run, and folds the batch norms.

    Raises:
      InputError: an array of a batch norm is missing.
    """
    arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    arrays = fold_batch_norms(arrays, ENCODER_PAIRS, epsilon=ENCODER_EPSILON, source="NLL-AngMF")
    return fold_batch_norms(arrays, DECODER_PAIRS, epsilon=DECODER_EPSILON, source="NLL-AngMF")


def features(module: nn.Module, params: Any, pixels: jax.Array) -> ExpertFeatures:
    """Returns the unit normals (B, S, S, 3) as patches."""
    return ExpertFeatures(patches=module.apply({"params": params}, pixels)[0][..., :3])


def concentration(module: nn.Module, params: Any, pixels: jax.Array) -> jax.Array:
    """Returns kappa (B, S, S): the higher, the surer the normal."""
    return module.apply({"params": params}, pixels)[0][..., 3]


ROWS = (
    Published(
        card=ExpertCard(
            name="normals",
            title="NLL-AngMF surface normals, EfficientNet-B5 (ScanNet)",
            paper="Bae, Budvytis and Cipolla, Aleatoric Uncertainty in Surface Normal Estimation, ICCV 2021, "
            "arXiv:2109.09881",
            # A copy of the authors' file (github.com/baegwangbin/surface_normal_uncertainty), whose licence this is.
            weights="lllyasviel/Annotators",
            licence="MIT",
            # Published as 640 x 480, whatever the picture's aspect; here the centre square of that height.
            view=View(size=480, fit="crop", interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD),
            grid=(480, 480),
            width=3,
            checked_against="the released PyTorch network",
            parameters=72_326_240,
        ),
        build=lambda size: AngMF(),
        rules=RULES,
        features=features,
        ignore=IGNORE,
        canonical=canonical,
        multiple=STRIDE,
        file="scannet.pt",
        extras={"concentration": concentration},
    ),
)
