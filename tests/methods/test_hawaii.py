"""HAWAII's objective: a restatement in double precision, then its properties."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from tests.methods.hawaii_cases import (
    GRID,
    HAS_PICTURE,
    LAYERS,
    MASK,
    NAMES,
    ROWS,
    TEXT,
    WIDTH,
    WORDS,
    draw,
    evaluate,
    loss_of,
    make_config,
    objective_case,
)
from tove_jax.adapters.mola import ROUTED
from tove_jax.config.schema import (
    HawaiiConfig,
)
from tove_jax.methods import hawaii
from tove_jax.models import vit
from tove_jax.train.state import flatten

# The whole objective once more, in NumPy and double precision, row by row.


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mlp(p, x):
    hidden = x @ p["hidden"]["kernel"] + p["hidden"]["bias"]
    return hidden * (1 + erf(hidden / np.sqrt(2))) / 2 @ p["out"]["kernel"] + p["out"]["bias"]


def bilinear(x, side):
    """Half-pixel centres, edges held, no antialias."""
    for axis in (0, 1):
        count = x.shape[axis]
        at = np.clip((np.arange(side) + 0.5) * count / side - 0.5, 0, count - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, count - 1)
        weight = (at - low).reshape(-1, *[1] * (x.ndim - axis - 1))
        x = np.take(x, low, axis) * (1 - weight) + np.take(x, high, axis) * weight
    return x


def cells(patches, kind):
    k = max(1, min(patches.shape[:2]) // GRID) if kind == "space_to_depth" else 1
    resized = bilinear(patches, k * GRID)
    rows = [resized[k * i : k * i + k, k * j : k * j + k].reshape(-1) for i in range(GRID) for j in range(GRID)]
    return np.stack(rows)


def restated(config, params, outputs, features, batch):
    """Returns the loss and its parts from NumPy float64 arrays."""
    method, names = config.method, config.features.names
    rows = np.flatnonzero(batch["mask"] & (batch.get("has_picture", True) | method.kd_on_text_only))
    coarse, fine = [], {name: [] for name in names}
    for b in rows:
        routed, forced = outputs[config.student.feature][b, 1:], outputs["forced"][b, :, 1:]
        flat = {name: cells(features[name].patches[b], method.unshuffle) for name in names}
        if method.coarse:
            fused = mlp(params["coarse"], np.concatenate([flat[name] for name in names], axis=-1))
            coarse.append(((fused - routed) ** 2).mean())
        for i, name in enumerate(names):
            raw = name == method.clip_expert and method.clip_target == "raw"
            wanted = flat[name] if raw else mlp(params[name], flat[name])
            queries = wanted
            if method.instruction_width:
                words = batch["instruction"][b][batch["instruction_mask"][b]][: method.instruction_tokens]
                queries = np.concatenate([wanted, mlp(params["text"], words)])
            scores = softmax(queries @ wanted.T / np.sqrt(WIDTH)).mean(0)
            if not method.token_scoring:
                scores = np.full(len(wanted), 1 / len(wanted))
            np.testing.assert_allclose(scores.sum(), 1)
            fine[name].append((scores * ((forced[i] - wanted) ** 2).mean(-1)).sum())
    balance = 0.0
    for group in ("teacher", "general") if config.student.adapter.general_experts else ("teacher",):
        probs, choice = (outputs[f"adapter/router_{group}_{kind}_mean"][:, rows] for kind in ("probs", "choice"))
        experts = probs.shape[-1]
        if method.balance_pool == "batch":
            layers = [experts * (p.mean(0) * f.mean(0)).sum() for p, f in zip(probs, choice, strict=True)]
        else:
            layers = [experts * (p * f).sum(-1).mean() for p, f in zip(probs, choice, strict=True)]
        balance += np.mean(layers)
    parts = {f"loss/{name}/patches": np.mean(values) for name, values in fine.items()}
    parts["loss/fine"] = np.mean(list(parts.values()))
    if method.coarse:
        parts["loss/coarse"] = np.mean(coarse)
    parts["loss/balance"] = balance
    distillation = parts["loss/fine"] + parts.get("loss/coarse", 0)
    return {**parts, "loss/total": method.kd_weight * distillation + method.balance_weight * balance}


VARIANTS = {
    "default": {},
    "instruction": {"instruction_width": TEXT},
    "short instruction": {"instruction_width": TEXT, "instruction_tokens": 2},
    "raw clip, by row": {"clip_target": "raw", "balance_pool": "row", "unshuffle": "resize"},
    "uniform, fine alone": {"token_scoring": False, "coarse": False, "adapter": {"general_experts": 0}},
    "text rows too": {"kd_on_text_only": True, "head_width": 5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_restatement_in_double_precision(variant):
    config, method, outputs, features, batch = objective_case(**VARIANTS[variant])
    double = lambda tree: jax.tree.map(lambda x: x if x.dtype == bool else np.asarray(x, np.float64), tree)
    method, outputs, features, batch = double((method, outputs, features, batch))
    batch |= {"mask": MASK, "has_picture": HAS_PICTURE}
    with jax.enable_x64(True):
        loss, metrics = evaluate(config, method, outputs, features, batch)
        assert loss.dtype == jnp.float64
    expected = restated(config, method, outputs, features, batch)
    assert {name for name in metrics if name.startswith("loss/")} == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-9, err_msg=name)
    assert metrics["loss/total"] == loss
    assert jnp.zeros(1).dtype == jnp.float32


def test_one_call_gives_what_each_pass_gives(whole):
    config, student, params, pixels, outputs = whole
    found = outputs(params, pixels)
    wanted = hawaii.requested_intermediates(config)
    assert set(found) == {*wanted, "forced"}

    @jax.jit
    def alone(forced):
        inputs = {"forced": jnp.full(ROWS, forced)}
        return vit.encode(student, params["student"], pixels, wanted, adapter_inputs=inputs)

    routed = alone(ROUTED)
    for name, value in routed.items():
        # The routers of the layers that the feature comes through.
        value = value[: LAYERS - 1] if name.startswith("adapter/") else value
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)
    for i in range(len(NAMES)):
        np.testing.assert_allclose(found["forced"][:, i], alone(i)[config.student.feature], atol=1e-4)
    deployed = jax.jit(lambda p: hawaii.tokens(student, p, pixels, {}, config))(params)
    np.testing.assert_allclose(deployed, routed[config.student.feature][:, 1:], atol=1e-4)
    assert hawaii.deployed_experts(config) == () and hawaii.training_experts(config) == NAMES


def test_forced_passes_depend_on_one_expert_and_the_routed_pass_on_no_choice(whole):
    _, _, params, pixels, outputs = whole
    before = outputs(params, pixels)

    def disturbed(*path):
        """Every parameter below the path, of one expert where an index ends it, made another."""
        *names, last = path
        tree = jax.tree.map(np.copy, params)
        node = tree["student"]["layers"]["mlp"]["adapter"]
        for name in names:
            node = node[name]
        for leaf in ("a_kernel", "b_kernel"):
            np.moveaxis(node[leaf], 2 if leaf == "a_kernel" else 1, 0)[last] += 1.0
        return outputs(tree, pixels)

    for site in ("down", "up"):
        after = disturbed(f"teacher_{site}", 1)
        for i in range(len(NAMES)):
            same = np.array_equal(before["forced"][:, i], after["forced"][:, i])
            assert same == (i != 1)
        after = disturbed(f"general_{site}", 0)
        np.testing.assert_array_equal(before["forced"], after["forced"])
    tree = jax.tree.map(np.copy, params)
    for group in ("teacher", "general"):
        tree["student"]["layers"]["mlp"]["adapter"][f"router_{group}"]["out"]["kernel"] *= -3.0
    after = outputs(tree, pixels)
    np.testing.assert_array_equal(before["forced"], after["forced"])
    assert np.abs(before["layers/-2"] - after["layers/-2"]).max() > 1e-3


def test_gradients_reach_what_the_paper_says():
    config = make_config(instruction_width=TEXT)
    student, params, pixels, features, batch = draw(config)
    parts = ("loss/fine", "loss/coarse", "loss/balance", *[f"loss/{name}/patches" for name in NAMES])

    def vector(p):
        metrics = loss_of(config, student)(p, pixels, features, batch)[1]
        return jnp.stack([metrics[name] for name in parts])

    jacobian = jax.device_get(jax.jit(jax.jacrev(vector))(params))

    def reached(tree):
        """Names of what has a gradient; experts of a group by number."""
        found = set()
        for path, leaf in flatten(tree).items():
            leaf = np.asarray(leaf)
            if "/adapter/" not in path or "router_" in path:
                found |= (
                    {path.split("/adapter/")[-1].split("/")[0 if "/adapter/" in path else 1]} if leaf.any() else set()
                )
                continue
            group = path.split("/adapter/")[1].split("_")[0]
            experts = np.moveaxis(leaf, 2 if path.endswith("a_kernel") else 1, 0)
            found |= {f"{group}{e}" for e, expert in enumerate(experts) if expert.any()}
        return found

    gradients = {name: reached(jax.tree.map(lambda x, i=i: x[i], jacobian)) for i, name in enumerate(parts)}
    last = jax.tree.leaves(jax.tree.map(lambda x: x[:, -1], jacobian["student"]["layers"]))
    assert not any(leaf.any() for leaf in last), "the layer beyond the feature"
    tower = {"patch_embed", "class_embed", "position_embed", "pre_norm", "layers"}
    experts = {f"{group}{e}" for group, count in (("teacher", 3), ("general", 2)) for e in range(count)}
    routers = {"router_teacher", "router_general"}
    # The routed pass: through the straight-through factor to both routers.
    assert gradients["loss/coarse"] <= tower | experts | routers | {"coarse"}
    assert gradients["loss/coarse"] >= tower | routers | {"coarse"}
    # A forced pass: one expert, its own head and, through the scores, the text head; no router.
    for i, name in enumerate(NAMES):
        assert gradients[f"loss/{name}/patches"] == tower | {f"teacher{i}", name, "text"}
    assert gradients["loss/fine"] == tower | {"teacher0", "teacher1", "teacher2", *NAMES, "text"}
    # The balance: routers, and the tower and experts that make their inputs; no head.
    assert gradients["loss/balance"] <= tower | experts | routers
    assert gradients["loss/balance"] >= tower | routers


def test_stopped_scores_leave_the_text_head_without_a_gradient():
    config, *args = objective_case(instruction_width=TEXT, stop_gradient_token_score=True)
    stopped = jax.jit(jax.grad(lambda *args: hawaii.objective(*args, config)[0]))(*args)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(stopped["text"]))
    assert all(np.asarray(leaf).any() for name in NAMES for leaf in jax.tree.leaves(stopped[name]))


def test_no_gradient_into_the_instruction():
    config, params, outputs, features, batch = objective_case(instruction_width=TEXT)

    def loss(words):
        return hawaii.objective(params, outputs, features, {**batch, "instruction": words}, config)[0]

    words = batch["instruction"]
    assert loss(words) != loss(2 * words)
    assert not np.asarray(jax.jit(jax.grad(loss))(words)).any()


def test_token_scores_sum_to_one_and_leave_padding_out():
    config, _, _, _, batch = objective_case(instruction_width=TEXT)
    random = np.random.default_rng(3)
    wanted = jnp.asarray(random.standard_normal((ROWS, 9, WIDTH)), jnp.float32)
    text = jnp.asarray(random.standard_normal((ROWS, WORDS, WIDTH)), jnp.float32)
    mask = jnp.asarray(batch["instruction_mask"])
    score = jax.jit(lambda text, mask: hawaii.token_scores(config.method, wanted, text, mask))
    without = hawaii.token_scores(config.method, wanted, None, None)
    scores = score(text, mask)
    for found in (scores, without):
        assert found.shape == (ROWS, 9) and (np.asarray(found) > 0).all()
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    # What padding holds does not matter; the last row has no word at all.
    np.testing.assert_array_equal(scores, score(jnp.where(mask[..., None], text, 1e3), mask))
    np.testing.assert_allclose(scores[3], without[3], rtol=1e-5)
    assert np.abs(scores[0] - without[0]).max() > 1e-3
    uniform = dataclasses.replace(config.method, token_scoring=False)
    np.testing.assert_allclose(hawaii.token_scores(uniform, wanted, text, mask), 1 / 9, rtol=1e-6)
    # Tokens that are all alike are scored alike: then scoring and uniform are one.
    alike = jnp.broadcast_to(wanted[:, :1], wanted.shape)
    np.testing.assert_allclose(hawaii.token_scores(config.method, alike, text, mask), 1 / 9, rtol=1e-5)


def test_without_token_scoring_the_fine_term_is_a_plain_mean():
    config, params, outputs, features, batch = objective_case(token_scoring=False)
    _, metrics = evaluate(config, params, outputs, features, batch)
    for i, name in enumerate(NAMES):
        student = outputs["forced"][:, i, 1:]
        wanted = hawaii.target(config.method, params[name], features[name], student)
        np.testing.assert_allclose(metrics[f"loss/{name}/patches"], np.square(student - wanted).mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics[f"score/{name}/peak"], 1.0, rtol=1e-6)


def test_without_general_experts_and_coarse_term_is_the_ablation():
    config, params, *args = objective_case({"general_experts": 0}, coarse=False)
    assert set(params) == set(NAMES)
    tree = jax.eval_shape(vit.from_config(config.student).init, jax.random.key(0), jnp.zeros((1, 6, 6, 3)))["params"]
    assert not any("general" in name for name in tree["layers"]["mlp"]["adapter"])
    _, metrics = evaluate(config, params, *args)
    np.testing.assert_allclose(
        metrics["loss/total"], 0.5 * metrics["loss/fine"] + 0.05 * metrics["loss/balance"], rtol=1e-6
    )
    assert "loss/coarse" not in metrics and "router/general/entropy" not in metrics
    loads = [metrics[f"router/load/00/{e}"] for e in range(len(NAMES))]
    np.testing.assert_allclose(sum(loads), 1.0, rtol=1e-6)
    assert f"router/load/00/{len(NAMES)}" not in metrics


@pytest.mark.parametrize("what", ["padded", "text only"])
def test_rows_that_do_not_count_contribute_nothing(what):
    config, params, outputs, features, batch = objective_case(instruction_width=TEXT)
    batch = {**batch, "has_picture": np.ones(ROWS, bool)}
    left_out = {"padded": {"mask": MASK}, "text only": {"has_picture": MASK}}[what]
    run = jax.jit(jax.value_and_grad(lambda *args: hawaii.objective(*args, config), argnums=(0, 1), has_aux=True))

    def by_row(function, tree):
        """Applies a function to leaves with their rows in front; routers' reports have layers there."""

        def turned(x):
            return np.swapaxes(function(np.swapaxes(x, 0, 1)), 0, 1)

        return {n: turned(v) if n.startswith("adapter/") else jax.tree.map(function, v) for n, v in tree.items()}

    keep = lambda x: np.concatenate([x[MASK], x[MASK][:1]])
    spoil = lambda x: np.where(MASK.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan)
    (_, found), (heads, tokens) = run(params, outputs, features, {**batch, **left_out})
    (_, other), _ = run(params, by_row(spoil, outputs), by_row(spoil, features), {**batch, **left_out})
    three = {**jax.tree.map(keep, batch), "mask": np.arange(ROWS) < 3}
    (_, alone), (heads_alone, _) = run(params, by_row(keep, outputs), by_row(keep, features), three)
    (_, everything), _ = run(params, outputs, features, batch)
    assert set(found) == set(other) == set(alone)
    for name in found:
        np.testing.assert_allclose(found[name], other[name], rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert abs(everything["loss/fine"] - found["loss/fine"]) > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), heads, heads_alone)
    for name in ("layers/-2", "forced"):
        assert not np.asarray(tokens[name])[2].any() and np.asarray(tokens[name])[:2].any()
    (loss, metrics), zero = run(params, outputs, features, {**batch, "mask": np.zeros(ROWS, bool)})
    assert loss == 0 and all(np.isfinite(value) for value in metrics.values())
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(zero))


def test_balance_is_one_at_even_load_and_more_otherwise():
    rows, method = jnp.ones(4, bool), HawaiiConfig()
    even = jnp.full((2, 4, 3), 1 / 3)
    for pool in ("batch", "row"):
        method = HawaiiConfig(balance_pool=pool)
        np.testing.assert_allclose(hawaii.balance_loss(even, even, rows, method), 1.0, rtol=1e-6)
        one = jnp.zeros((2, 4, 3)).at[..., 0].set(1.0)
        np.testing.assert_allclose(hawaii.balance_loss(one, one, rows, method), 3.0, rtol=1e-6)
    # Each row uses another expert: even over the batch, not within a row.
    split = jax.nn.one_hot(jnp.arange(4)[None] % 2, 2)
    np.testing.assert_allclose(hawaii.balance_loss(split, split, rows, HawaiiConfig()), 1.0)
    np.testing.assert_allclose(hawaii.balance_loss(split, split, rows, HawaiiConfig(balance_pool="row")), 2.0)
    # A load that follows the probabilities has its minimum at even load.
    random = np.random.default_rng(0).dirichlet(np.ones(3), (50, 2, 1)).astype(np.float32)
    for probs in random:
        assert hawaii.balance_loss(probs, probs, rows[:1], HawaiiConfig()) >= 1 - 1e-6
    gradient = jax.grad(hawaii.balance_loss, argnums=(0, 1))(even, even, rows, HawaiiConfig())
    assert np.asarray(gradient[0]).any() and not np.asarray(gradient[1]).any()
