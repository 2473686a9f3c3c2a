"""The layer's options that no published network of the tests has, or not alone."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.models import block
from tove_jax.models.block import Block
from tove_jax.parallel import flat_paths, logical_specs

FIELDS = {"heads": 2, "mlp_width": 24, "activation": "gelu", "norm_epsilon": 1e-6, "depth": 2}


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def init(module: Block, x: jax.Array) -> dict:
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [leaf + 0.3 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def run(module: Block, params: dict, x: jax.Array, **call) -> np.ndarray:
    return np.asarray(jax.jit(lambda params, x: module.apply({"params": params}, x, **call)[0])(params, x))


def test_windows_are_pictures_of_their_own():
    """A map of two by two windows: each comes out as if it stood alone."""
    x = draw(2, 6, 6, 16)
    windowed, whole = Block(**FIELDS, window=3), Block(**FIELDS)
    params = init(windowed, x)
    found = run(windowed, params, x)
    for rows in (slice(0, 3), slice(3, 6)):
        np.testing.assert_allclose(found[:, rows, 3:], run(whole, params, x[:, rows, 3:]), atol=1e-5)
    assert np.abs(found - run(whole, params, x)).max() > 1e-2
    tokens = run(whole, params, x.reshape(2, 36, 16)).reshape(x.shape)
    np.testing.assert_allclose(run(whole, params, x), tokens, atol=1e-5)
    # Padding takes part: a window of 4 on 6 x 6 is not a window of 6.
    assert run(Block(**FIELDS, window=4), params, x).shape == x.shape


class Distance(nn.Module):
    """Scores against far tokens."""

    @nn.compact
    def __call__(self, query: jax.Array) -> jax.Array:
        slope = self.param("slope", nn.initializers.ones, (query.shape[2],))
        places = jnp.arange(query.shape[1])
        return jnp.broadcast_to(
            -1e4 * slope[None, :, None, None] * abs(places[:, None] - places),
            (query.shape[0], query.shape[2], *[len(places)] * 2),
        )


def test_added_scores_and_masks():
    x = draw(2, 5, 16)
    near = Block(**FIELDS, position=lambda name: Distance(name=name))
    params = init(Block(**FIELDS), x)
    with_scores = {**params, "attention": {**params["attention"], "position": {"slope": jnp.ones(2)}}}
    # Everyone sees itself alone: as if every token were a picture.
    alone = run(Block(**FIELDS), params, x.reshape(10, 1, 16)).reshape(x.shape)
    np.testing.assert_allclose(run(near, with_scores, x), alone, atol=1e-5)
    mask = jnp.arange(5)[None] < jnp.asarray([[3], [5]])
    found = run(Block(**FIELDS), params, x, mask=mask)
    np.testing.assert_allclose(found[:1, :3], run(Block(**FIELDS), params, x[:1, :3]), atol=1e-5)
    np.testing.assert_allclose(found[1:], run(Block(**FIELDS), params, x[1:]), atol=1e-5)


def test_norms_scales_and_biases():
    x = draw(1, 4, 16)
    module = Block(**FIELDS, norm="rms", mlp_bias=False, biases=(), attention_scale=1.0, layer_scale=True)
    params = init(module, x)
    assert not [path for path in flat_paths(params) if path.endswith("bias")]
    none = {**params, "scale1": jnp.zeros(16), "scale2": jnp.zeros(16)}
    np.testing.assert_array_equal(run(module, none, x), x)
    y = np.asarray(x, np.float64)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    normed = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * p["norm1"]["scale"]
    query, key, value = ((normed @ p["attention"][n]["kernel"]).reshape(4, 2, 8) for n in ("query", "key", "value"))
    scores = np.einsum("qhd,khd->hqk", query, key)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("hqk,khd->qhd", weights, value).reshape(1, 4, 16) @ p["attention"]["out"]["kernel"]
    only = {**params, "scale2": jnp.zeros(16)}
    np.testing.assert_allclose(run(module, only, x), y + p["scale1"] * attended, atol=1e-4)


def test_every_option_has_axes():
    module = Block(**FIELDS, gated=True, attention_norm=True, mlp_norm=True, layer_scale=True)
    stacked = jax.jit(block.stacked_init(module, 3, jnp.zeros((1, 1, 16))))(jax.random.key(0))
    specs = logical_specs({"expert": {"layers": stacked}}, block.LOGICAL_AXES, "axes")["expert"]["layers"]
    assert specs["mlp"]["gate"]["kernel"] == ("layers", "embed", "mlp")
    assert specs["attention"]["norm"]["scale"] == ("layers", "heads")
    kernel = stacked["attention"]["query"]["kernel"]
    assert kernel.shape == (3, 16, 16) and not np.array_equal(kernel[0], kernel[1])


def test_adapters_need_a_plain_mlp():
    with pytest.raises(ValueError, match="an adapter needs a plain MLP"):
        Block(**FIELDS, gated=True, adapter=lambda name: None).init(jax.random.key(0), draw(1, 2, 16))


def test_patch_embedding_of_a_picture_of_any_shape():
    pixels = draw(2, 9, 14, 3)
    module = block.PatchEmbed(4, 6, bias=True)
    params = module.init(jax.random.key(0), pixels)["params"]
    params = {"kernel": params["kernel"], "bias": draw(6)}
    found = module.apply({"params": params}, pixels)
    assert found.shape == (2, 2, 3, 6)
    expected = jnp.einsum("bijc,ijcd->bd", pixels[:, 4:8, 8:12], params["kernel"]) + params["bias"]
    np.testing.assert_allclose(found[:, 1, 2], expected, atol=1e-6)
