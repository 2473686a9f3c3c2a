from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.adapters.mole import MoLE, balance_loss, from_config
from tove_jax.config.schema import AdapterConfig
from tove_jax.errors import InputError

WIDTH, HIDDEN, EXPERTS, RANK = 6, 10, 3, 2
X = np.random.default_rng(0).standard_normal((2, 5, WIDTH)).astype(np.float32)


class Host(nn.Module):
    """The smallest MLP with a MoLE."""

    fields: tuple = ()

    @nn.compact
    def __call__(self, x, **more):
        mole = MoLE(experts=EXPERTS, rank=RANK, **dict(self.fields), name="adapter")
        return mole(x, nn.Dense(HIDDEN, name="fc1"), nn.relu, nn.Dense(WIDTH, name="fc2"), **more)


def host(**fields):
    return Host(tuple(fields.items()))


def expected(params, x, routing, site, alpha):
    """Expert by expert and token by token, in double precision."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    a = p["adapter"]
    logits = x @ a["router"]["kernel"] + a["router"]["bias"]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights = np.eye(EXPERTS)[probs.argmax(-1)] if routing == "top1" else probs

    def lora(name, z):
        w = a[name]
        each = [(z @ w["a_kernel"][:, e] + w["a_bias"][e]) @ w["b_kernel"][e] + w["b_bias"][e] for e in range(EXPERTS)]
        return sum(weights[..., e : e + 1] * each[e] * alpha / RANK for e in range(EXPERTS))

    linear = lambda name, z: z @ p[name]["kernel"] + p[name]["bias"]
    if site == "ffn":
        return linear("fc2", np.maximum(linear("fc1", x), 0)) + lora("ffn", x), probs
    hidden = np.maximum(linear("fc1", x) + lora("down", x), 0)
    return linear("fc2", hidden) + lora("up", hidden), probs


@pytest.mark.parametrize("routing", ["top1", "dense"])
@pytest.mark.parametrize("site", ["linears", "ffn"])
def test_equals_expert_by_expert(routing, site):
    module = host(routing=routing, site=site, alpha=3.0)
    params = jax.jit(module.init)(jax.random.key(0), X)["params"]
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda a: np.asarray(a + 0.1 * draw.standard_normal(a.shape), np.float32), params)
    reports = frozenset({"router_probs", "router_choice", "router_probs_mean", "router_choice_mean", "router_entropy"})
    y, found = jax.jit(lambda p: module.apply({"params": p}, X, reports=reports))(params)
    reference, probs = expected(params, X.astype(np.float64), routing, site, 3.0)
    np.testing.assert_allclose(y, reference, atol=1e-5)
    np.testing.assert_allclose(found["router_probs"], probs, atol=1e-6)
    np.testing.assert_array_equal(found["router_choice"], np.eye(EXPERTS)[probs.argmax(-1)])
    np.testing.assert_allclose(found["router_probs_mean"], probs.mean(1), atol=1e-6)
    np.testing.assert_allclose(found["router_entropy"], -(probs * np.log(probs)).sum(-1).mean(-1), atol=1e-6)


def test_two_products_and_no_gather():
    module = host()
    params = module.init(jax.random.key(0), X)
    jaxpr = jax.make_jaxpr(module.apply)(params, X).jaxpr
    equations = [e.primitive.name for p in jaxpr.eqns for e in getattr(p.params.get("call_jaxpr"), "eqns", [p])]
    # Router, fc1, fc2, and two for each half.
    assert equations.count("dot_general") == 7
    assert not {"gather", "dynamic_slice", "while", "scan", "cond"} & set(equations)


def test_straight_through_changes_nothing_forward():
    plain, through = host(), host(router_gradient="straight_through")
    params = plain.init(jax.random.key(0), X)["params"]
    np.testing.assert_array_equal(plain.apply({"params": params}, X)[0], through.apply({"params": params}, X)[0])

    def router_gradient(module):
        gradient = jax.grad(lambda p: (module.apply({"params": p}, X)[0] ** 2).sum())(params)
        return np.abs(gradient["adapter"]["router"]["kernel"]).max()

    assert router_gradient(plain) == 0 and router_gradient(through) > 0
    assert router_gradient(host(routing="dense")) > 0


@pytest.mark.parametrize("site,names", [("linears", {"router", "down", "up"}), ("ffn", {"router", "ffn"})])
def test_initialisation(site, names):
    params = host(site=site).init(jax.random.key(0), X)["params"]["adapter"]
    assert set(params) == names
    assert np.abs(params["router"]["kernel"]).max() <= WIDTH**-0.5
    assert np.asarray(params["router"]["bias"]).any()
    half = params["down" if site == "linears" else "ffn"]
    for kernel, fan_in in ((half["a_kernel"], WIDTH), (half["b_kernel"], RANK)):
        bound = (6 / fan_in) ** 0.5
        assert 0.8 * bound < np.abs(kernel).max() <= bound
    assert not half["a_bias"].any() and not half["b_bias"].any()
    zeros = host(site=site, b_init="zeros")
    params = zeros.init(jax.random.key(0), X)["params"]
    base = nn.Dense(HIDDEN).apply({"params": params["fc1"]}, X)
    base = nn.Dense(WIDTH).apply({"params": params["fc2"]}, nn.relu(base))
    np.testing.assert_array_equal(zeros.apply({"params": params}, X)[0], base)


def test_dropout_only_touches_the_experts():
    module = host(dropout=0.5)
    params = module.init(jax.random.key(0), X)["params"]
    probs = frozenset({"router_probs"})
    plain, found = module.apply({"params": params}, X, reports=probs)
    rngs = {"dropout": jax.random.key(2)}
    dropped, again = module.apply({"params": params}, X, deterministic=False, reports=probs, rngs=rngs)
    np.testing.assert_array_equal(found["router_probs"], again["router_probs"])
    assert np.abs(plain - dropped).max() > 1e-3


def test_balance_loss():
    even = jnp.full((4, 2, EXPERTS), 1 / EXPERTS)
    for pool in ("all", "layer"):
        np.testing.assert_allclose(balance_loss(even, even, pool), 1 / EXPERTS, rtol=1e-6)
    # Two layers that each use one expert, another one: pooled this looks balanced, by layer it is not.
    probs = jax.nn.one_hot(jnp.array([[0], [1]]), 2)
    np.testing.assert_allclose(balance_loss(probs, probs, "all"), 0.5)
    np.testing.assert_allclose(balance_loss(probs, probs, "layer"), 1.0)
    gradient = jax.grad(lambda p, f: balance_loss(p, f).sum(), argnums=(0, 1))(even, even)
    assert np.asarray(gradient[0]).any() and not np.asarray(gradient[1]).any()


def test_factory_and_refusals():
    assert from_config(AdapterConfig(kind="none"), jnp.float32) is None
    factory = from_config(AdapterConfig(), jnp.float32)
    assert factory == from_config(AdapterConfig(), jnp.float32) != from_config(AdapterConfig(rank=3), jnp.float32)
    assert hash(factory) == hash(from_config(AdapterConfig(), jnp.float32))
    assert factory(name="adapter").rank == 32
    params = host().init(jax.random.key(0), X)
    with pytest.raises(InputError, match="no report 'probs'"):
        host().apply(params, X, reports=frozenset({"probs"}))
    with pytest.raises(InputError, match="takes no adapter inputs"):
        host().apply(params, X, inputs=jnp.zeros(2))
