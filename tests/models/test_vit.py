"""What the student promises beside its numbers: what runs, what does not, and what gets a gradient."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.config.schema import AdapterConfig, StudentConfig
from tove_jax.errors import InputError
from tove_jax.models import vit
from tove_jax.parallel import flat_paths, logical_specs

CONFIG = StudentConfig(
    image_size=16, patch_size=8, width=16, layers=6, heads=2, mlp_width=32, adapter=AdapterConfig(rank=2)
)
PIXELS = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
REPORTS = ("adapter/router_probs_mean", "adapter/router_choice_mean")


def configure(adapter=None, **more):
    adapter = dataclasses.replace(CONFIG.adapter, **(adapter or {}))
    return dataclasses.replace(CONFIG, adapter=adapter, **more)


@pytest.fixture(scope="module")
def params():
    return jax.jit(vit.from_config(CONFIG).init)(jax.random.key(0), PIXELS)["params"]


def run(config, params, intermediates=(), **more):
    model = vit.from_config(config)

    @jax.jit
    def apply(params):
        return model.apply({"params": params}, PIXELS, intermediates=intermediates, **more)

    return apply(params)


def count(function, *args):
    """Counts primitives in a jaxpr, those in loops and branches once."""
    found = Counter()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            found[equation.primitive.name] += 1
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def test_intermediates_are_those_of_the_plain_run(params):
    names = ("layers/0", "layers/-2", "layers/4", "layers/-1", "layers/3/attention_cls", *REPORTS)
    tokens, found = run(CONFIG, params, names)
    assert set(found) == set(names)
    np.testing.assert_array_equal(found["layers/-2"], found["layers/4"])
    np.testing.assert_array_equal(found["layers/-1"], tokens)
    plain, nothing = run(CONFIG, params)
    assert nothing == {}
    np.testing.assert_allclose(tokens, plain, atol=2e-6)
    none, alone = run(CONFIG, params, ("layers/4", *REPORTS), final=False)
    assert none is None
    for name in alone:
        np.testing.assert_allclose(alone[name], found[name], atol=2e-6)
        assert name == "layers/4" or alone[name].shape == (6, 2, 3)


def test_attention_row(params):
    names = ("layers/-2/attention_cls", "layers/-2/attention_cls_scores")
    _, found = run(CONFIG, params, names, final=False)
    assert found[names[0]].shape == (2, 2, 5)
    np.testing.assert_allclose(jax.nn.softmax(found[names[1]]), found[names[0]], atol=1e-6)
    np.testing.assert_allclose(found[names[0]].sum(-1), 1.0, rtol=1e-6)


def test_what_is_not_asked_for_is_not_computed(params):
    config = configure({"kind": "none"})
    model = vit.from_config(config)
    plain = jax.tree.map(lambda x: x, params)
    plain["layers"]["mlp"] = {name: params["layers"]["mlp"][name] for name in ("fc1", "fc2")}

    def softmaxes(*names, **more):
        return count(lambda p: model.apply({"params": p}, PIXELS, intermediates=names, **more), plain)["reduce_max"]

    assert softmaxes() == 1
    assert softmaxes("layers/-2", final=False) == 1
    # The layer with the row stands alone between two runs: three attentions, and the row's own softmax.
    assert softmaxes("layers/3/attention_cls") == 4
    assert softmaxes("layers/3/attention_cls_scores") == 3
    assert softmaxes("embeddings", final=False) == 0

    with_adapter = vit.from_config(CONFIG)

    def logarithms(*names):
        return count(lambda p: with_adapter.apply({"params": p}, PIXELS, intermediates=names), params)["log"]

    assert logarithms(*REPORTS) == 0
    assert logarithms("adapter/router_entropy") > 0


def test_layers_behind_the_last_one_wanted_are_not_run(params):
    def poison(first):
        layers = jax.tree.map(lambda x: jnp.asarray(x).at[first:].set(jnp.nan), params["layers"])
        return {**params, "layers": layers}

    _, found = run(CONFIG, poison(4), ("layers/3",), final=False)
    assert np.isfinite(found["layers/3"]).all()
    _, found = run(CONFIG, poison(3), ("layers/3",), final=False)
    assert np.isnan(found["layers/3"]).any()

    # The last layer's router needs its attention and its norm, not its MLP.
    model = vit.from_config(configure(layers=2))
    shapes = jax.eval_shape(model.init, jax.random.key(0), PIXELS)

    def flops(*names):
        apply = jax.jit(lambda p: model.apply(p, PIXELS, intermediates=names, final=False))
        return apply.lower(shapes).compile().cost_analysis()["flops"]

    few, with_router, whole = flops("layers/0"), flops("layers/0", *REPORTS), flops("layers/1", *REPORTS)
    mlp = 2 * PIXELS.shape[0] * 5 * 2 * 16 * 32
    assert few < with_router < whole - mlp


def test_parameters_and_logical_axes(params):
    shapes = {name: leaf.shape for name, leaf in flat_paths(params).items()}
    width, hidden, depth, experts, rank = 16, 32, 6, 3, 2
    assert shapes["patch_embed/kernel"] == (8, 8, 3, width)
    assert shapes["position_embed"] == (5, width) and shapes["class_embed"] == (width,)
    assert shapes["layers/attention/query/kernel"] == (depth, width, width)
    assert shapes["layers/mlp/fc1/kernel"] == (depth, width, hidden)
    assert shapes["layers/mlp/adapter/router/kernel"] == (depth, width, experts)
    assert shapes["layers/mlp/adapter/up/a_kernel"] == (depth, hidden, experts, rank)
    assert shapes["layers/mlp/adapter/up/b_kernel"] == (depth, experts, rank, width)
    assert len(shapes) == 33
    specs = logical_specs({"student": params}, vit.logical_axes(), "axes")["student"]
    assert specs["layers"]["mlp"]["adapter"]["down"]["b_bias"] == ("layers", "expert", "mlp")
    ffn = configure({"site": "ffn"})
    tree = jax.eval_shape(vit.from_config(ffn).init, jax.random.key(0), PIXELS)["params"]
    logical_specs(tree, vit.logical_axes(), "axes")
    assert set(tree["layers"]["mlp"]["adapter"]) == {"router", "ffn"}
    # Every layer draws its own.
    kernel = params["layers"]["mlp"]["fc1"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])
    assert abs(float(kernel.std()) - 32**-0.5) < 0.02


def test_mole_on_vit_l_adds_as_many_parameters_as_the_released_one():
    def size(adapter):
        config = StudentConfig(adapter=adapter)
        pixels = jax.ShapeDtypeStruct((1, 336, 336, 3), jnp.float32)
        tree = jax.eval_shape(vit.from_config(config).init, jax.random.key(0), pixels)["params"]
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    plain = size(AdapterConfig(kind="none"))
    assert plain == 303_507_456  # CLIP ViT-L/14-336's vision tower.
    assert size(AdapterConfig()) - plain == 24_040_008


def gradients(config, params, intermediates, reduce, **more):
    model = vit.from_config(config)

    @jax.jit
    def gradient(params):
        return jax.grad(
            lambda p: reduce(model.apply({"params": p}, PIXELS, intermediates=intermediates, final=False, **more)[1])
        )(params)

    return gradient(params)


def feature_loss(found):
    return (found["layers/-2"][:, 1:] ** 2).sum()


def test_rematerialisation_changes_no_gradient(params):
    def gradient(remat):
        names = ("layers/-2", *REPORTS)

        def loss(found):
            return feature_loss(found) + found[REPORTS[0]][:, :, 0].sum()

        return flat_paths(gradients(configure(remat=remat), params, names, loss))

    none, dots, full = gradient("none"), gradient("dots"), gradient("full")
    for name in none:
        for other in (dots, full):
            scale = max(1.0, float(np.abs(none[name]).max()))
            np.testing.assert_allclose(other[name], none[name], atol=1e-5 * scale, err_msg=name)


def test_gradient_reaches_what_the_method_says(params):
    found = gradients(CONFIG, params, ("layers/-2", *REPORTS), feature_loss)
    adapter = found["layers"]["mlp"]["adapter"]
    assert not np.asarray(adapter["router"]["kernel"]).any(), "top-1 leaves the router to the balance loss"
    for half in ("down", "up"):
        moved = np.abs(adapter[half]["b_bias"]).sum(axis=(1, 2))
        assert (moved[:-1] > 0).all() and moved[-1] == 0, "the last layer lies behind the feature"
    through = gradients(configure({"router_gradient": "straight_through"}), params, ("layers/-2",), feature_loss)
    moved = np.abs(through["layers"]["mlp"]["adapter"]["router"]["kernel"]).sum(axis=(1, 2))
    assert (moved[:-1] > 0).all() and moved[-1] == 0


def test_zero_initialised_experts_equal_clip_exactly(params):
    config = configure({"b_init": "zeros"})
    zeros = jax.jit(vit.from_config(config).init)(jax.random.key(1), PIXELS)["params"]
    plain = {**zeros, "layers": {**zeros["layers"], "mlp": {n: zeros["layers"]["mlp"][n] for n in ("fc1", "fc2")}}}
    clip = run(configure({"kind": "none"}), plain)[0]
    np.testing.assert_array_equal(run(config, zeros)[0], clip)
    disturbed = {**zeros, "layers": {**zeros["layers"], "mlp": {**plain["layers"]["mlp"]}}}
    disturbed["layers"]["mlp"]["adapter"] = params["layers"]["mlp"]["adapter"]
    assert np.abs(run(CONFIG, disturbed)[0] - clip).max() > 1e-3


def test_dropout_differs_by_key(params):
    model = vit.from_config(CONFIG)

    @jax.jit
    def once(seed):
        return model.apply({"params": params}, PIXELS, deterministic=False, rngs={"dropout": jax.random.key(seed)})[0]

    np.testing.assert_array_equal(once(0), once(0))
    assert np.abs(once(0) - once(1)).max() > 1e-4
    assert np.abs(once(0) - run(CONFIG, params)[0]).max() > 1e-4


def test_bfloat16_compute_and_storage(params):
    model = vit.from_config(CONFIG, jnp.bfloat16)
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    names = ("layers/1/attention_cls", REPORTS[0])
    apply = jax.jit(lambda tree: model.apply({"params": tree}, PIXELS, intermediates=names))
    expected, _ = run(CONFIG, params)
    for tree in (params, stored):
        tokens, found = apply(tree)
        assert tokens.dtype == jnp.bfloat16
        assert found["layers/1/attention_cls"].dtype == found[REPORTS[0]].dtype == jnp.float32
        error = np.abs(tokens.astype(np.float32) - expected)
        # A token whose two best experts are a hair apart may be routed otherwise; most may not.
        assert np.median(error) < 0.05


def test_wrong_requests_are_refused(params):
    with pytest.raises(InputError, match="has 6 layers"):
        run(CONFIG, params, ("layers/6",))
    with pytest.raises(InputError, match="intermediate 'layer/1': expected embeddings"):
        run(CONFIG, params, ("layer/1",))
    with pytest.raises(InputError, match="no report 'router_prob' .did you mean 'router_probs'"):
        run(CONFIG, params, ("adapter/router_prob",))
    with pytest.raises(InputError, match="has no adapter"):
        run(configure({"kind": "none"}), params, ("adapter/router_probs",))
    with pytest.raises(InputError, match=r"expected \(batch, 16, 16, 3\), found \(2, 8, 8, 3\)"):
        vit.from_config(CONFIG).apply({"params": params}, PIXELS[:, :8, :8])
    with pytest.raises(InputError, match="student.heads: 3 does not divide"):
        vit.from_config(configure(heads=3))
    with pytest.raises(InputError, match="student.patch_size: 32 does not fit"):
        vit.from_config(configure(patch_size=32))
