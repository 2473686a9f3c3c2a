"""Low-rank updates beside every linear of a Llama's layers (LoRA, arXiv:2106.09685), in a tree of their own.

The tree mirrors the kernels' paths: ``layers/attention/{query,key,value,out}/`` and ``layers/mlp/{gate,fc1,fc2}/``,
each with ``a_kernel`` (L, d_in, r) and ``b_kernel`` (L, r, d_out). It is given beside the frozen parameters::

    logits, _ = module.apply({"params": params, "lora": lora}, tokens)

and a linear then computes ``x W + (x A) B alpha / r``: no kernel is merged, and none has a gradient unless it is
asked for.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.errors import InputError
from tove_jax.models.llama import Llama, abstract_params
from tove_jax.parallel import flat_paths, map_paths


def init_lora(module: Llama, rng: jax.Array) -> dict[str, Any]:
    """Draws fresh updates: A uniform within 1 / sqrt(d_in), as peft draws it, B zero, so the model is as before.

    Args:
      module: with a `lora_rank`.
      rng: key.

    Returns:
      ``{"layers": ...}``, float32.

    Raises:
      InputError: its rank is not positive.
    """
    if module.lora_rank < 1:
        raise InputError(f"lora: expected a rank of at least 1, found {module.lora_rank}")
    tree: dict[str, Any] = {}
    for number, (path, kernel) in enumerate(_kernels(abstract_params(module)).items()):
        depth, width, features = kernel.shape
        bound = 1 / math.sqrt(width)
        a_shape = (depth, width, module.lora_rank)
        a = jax.random.uniform(jax.random.fold_in(rng, number), a_shape, jnp.float32, -bound, bound)
        node = tree
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node |= {"a_kernel": a, "b_kernel": jnp.zeros((depth, module.lora_rank, features))}
    return tree


def merge_lora(module: Llama, params: Any, lora: Any) -> dict[str, Any]:
    """Returns parameters whose kernels hold the updates: ``W + A B alpha / r``, summed in float32.

    Args:
      module: with the `lora_rank` and `lora_alpha` of the training.
      params: its tree; the dtypes stay.
      lora: what `init_lora` returned, trained.

    Raises:
      InputError: updates for something else, or of another rank.
    """
    kernels, found = _kernels(params), flat_paths(lora)
    expected = {}
    for path, kernel in kernels.items():
        depth, width, features = kernel.shape
        expected[f"{path}/a_kernel"] = (depth, width, module.lora_rank)
        expected[f"{path}/b_kernel"] = (depth, module.lora_rank, features)
    shapes = {path: np.shape(leaf) for path, leaf in found.items()}
    if shapes != expected:
        wrong = sorted(path for path in {*shapes, *expected} if shapes.get(path) != expected.get(path))
        raise InputError(
            f"lora: {wrong[0]}: expected {expected.get(wrong[0], 'nothing')}, found {shapes.get(wrong[0], 'nothing')}"
        )
    scale = module.lora_alpha / module.lora_rank

    def merged(path: str, leaf: Any) -> Any:
        name = path.removesuffix("/kernel")
        if name == path or name not in kernels:
            return leaf
        a, b = (jnp.asarray(found[f"{name}/{part}_kernel"], jnp.float32) for part in "ab")
        precise = jnp.promote_types(leaf.dtype, jnp.float32)
        return (jnp.asarray(leaf, precise) + scale * jnp.einsum("lir,lro->lio", a, b)).astype(leaf.dtype)

    return map_paths(merged, params)


def _kernels(params: Any) -> dict[str, Any]:
    """Returns the layers' kernels by path, without the last part."""
    return {
        path.removesuffix("/kernel"): leaf
        for path, leaf in flat_paths(params).items()
        if path.startswith("layers/") and path.endswith("/kernel")
    }
