"""HAWAII's objective: a restatement in double precision, then its properties."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from tove_jax.adapters.mola import ROUTED
from tove_jax.config import door
from tove_jax.config.schema import (
    AdapterConfig,
    Config,
    FeaturesConfig,
    HawaiiConfig,
    MeshConfig,
    OptimConfig,
    StudentConfig,
)
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.methods import get, hawaii, move_kd
from tove_jax.methods.presets import HAWAII_PRESETS
from tove_jax.models import vit
from tove_jax.parallel import logical_specs, make_mesh, shard_batch, tree_shardings
from tove_jax.train.objective import logical_axes
from tove_jax.train.state import flatten, parameter_factors

ROWS, WIDTH, GRID, LAYERS, WORDS, TEXT = 4, 8, 3, 3, 5, 6
GRIDS = {"clip": ((3, 3), WIDTH), "a": ((6, 7), 4), "b": ((2, 2), 5)}  # k = 1, 2 and 1
NAMES = tuple(GRIDS)
MOLA = {"kind": "mola", "rank": 2, "alpha": 2.0, "b_init": "kaiming", "router_gradient": "straight_through"}
MASK = np.array([True, True, False, True])
HAS_PICTURE = np.array([True, False, True, True])


def make_config(adapter=None, **method):
    return Config(
        student=StudentConfig(
            image_size=6,
            patch_size=2,
            width=WIDTH,
            layers=LAYERS,
            heads=2,
            mlp_width=12,
            adapter=AdapterConfig(**{**MOLA, "router_width": 4, "general_experts": 2, **(adapter or {})}),
        ),
        features=FeaturesConfig(experts=NAMES),
        method=HawaiiConfig(**method),
        optim=OptimConfig(groups=((".*", 1.0),)),
    )


def card(name, grid, width):
    return ExpertCard(name, name, "", "", "", View(size=8), grid, width)


CARDS = {name: card(name, *shape) for name, shape in GRIDS.items()}


def draw(config, seed=0):
    """Pixels, features, a batch with an instruction, and every parameter away from its start."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    pixels = normal(ROWS, 6, 6, 3)
    features = {name: ExpertFeatures(normal(ROWS, *grid, width)) for name, (grid, width) in GRIDS.items()}
    batch = {
        "mask": np.ones(ROWS, bool),
        "instruction": normal(ROWS, WORDS, TEXT),
        "instruction_mask": np.arange(WORDS) < np.array([5, 3, 1, 0])[:, None],
    }
    student = vit.from_config(config.student)
    params = {
        "student": jax.jit(student.init)(jax.random.key(seed), pixels)["params"],
        "method": hawaii.init_extra(config, CARDS, GRID**2, jax.random.key(seed)),
    }
    params = jax.tree.map(lambda x: np.asarray(x + 0.1 * random.standard_normal(x.shape), np.float32), params)
    return student, params, pixels, features, batch


def loss_of(config, student):
    def loss(params, pixels, features, batch):
        outputs = hawaii.forward(student, params, pixels, features, config, None)
        return hawaii.objective(params["method"], outputs, features, batch, config)

    return loss


def objective_case(adapter=None, **method):
    """A config, parameters of the heads, outputs as `forward` gives them, features and a batch, without a model."""
    config = make_config(adapter, **method)
    random = np.random.default_rng(1)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    shapes = jax.eval_shape(lambda: hawaii.init_extra(config, CARDS, GRID**2, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: 0.5 * normal(*leaf.shape), shapes)
    outputs = {"layers/-2": normal(ROWS, 10, WIDTH), "forced": normal(ROWS, len(NAMES), 10, WIDTH)}
    for group, count in (("teacher", len(NAMES)), ("general", config.student.adapter.general_experts)):
        if count:
            probs = random.dirichlet(np.ones(count), (LAYERS - 1, ROWS, 10))
            choice = np.eye(count)[probs.argmax(-1)]
            entropy = -(probs * np.log(probs)).sum(-1).mean(-1)
            for kind, value in (("probs_mean", probs.mean(2)), ("choice_mean", choice.mean(2)), ("entropy", entropy)):
                outputs[f"adapter/router_{group}_{kind}"] = value.astype(np.float32)
    features = {name: ExpertFeatures(normal(ROWS, *grid, width)) for name, (grid, width) in GRIDS.items()}
    batch = {
        "mask": np.ones(ROWS, bool),
        "instruction": normal(ROWS, WORDS, TEXT),
        "instruction_mask": np.arange(WORDS) < np.array([5, 3, 1, 0])[:, None],
    }
    return config, params, outputs, features, batch


def evaluate(config, *args):
    return jax.jit(lambda *args: hawaii.objective(*args, config))(*args)


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


@pytest.fixture(scope="module")
def whole():
    """A student away from its start, and its jitted passes."""
    config = make_config()
    student, params, pixels, *_ = draw(config)
    return config, student, params, pixels, jax.jit(lambda p, x: hawaii.forward(student, p, x, {}, config, None))


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


def test_step_zero_is_clip_exactly():
    config = make_config({"b_init": "zeros"})
    student = vit.from_config(config.student)
    pixels = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype(np.float32)
    params = jax.jit(student.init)(jax.random.key(0), pixels)["params"]
    outputs = jax.jit(lambda p: hawaii.forward(student, {"student": p}, pixels, {}, config, None))(params)
    plain = vit.from_config(dataclasses.replace(config.student, adapter=AdapterConfig(kind="none")))
    tower = jax.tree.map(lambda x: x, params)
    del tower["layers"]["mlp"]["adapter"]
    # Four times over, as the passes lie, so that the products are the same ones.
    four = np.repeat(pixels, 4, axis=0)
    clip = jax.jit(lambda p: vit.encode(plain, p, four, ("layers/-2",)))(tower)["layers/-2"]
    clip = np.asarray(clip).reshape(2, 4, 10, WIDTH)
    np.testing.assert_array_equal(outputs["layers/-2"], clip[:, 0])
    np.testing.assert_array_equal(outputs["forced"], clip[:, 1:])


def test_eight_devices_give_the_loss_of_one():
    config = make_config({"dora": True}, instruction_width=TEXT)
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, remat="full"))
    student, params, pixels, features, batch = draw(config)
    everything = (pixels, features, {**batch, "mask": MASK, "has_picture": HAS_PICTURE})
    loss = jax.value_and_grad(loss_of(config, student), has_aux=True)
    (_, one), gradient = jax.jit(loss)(params, *everything)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shardings = tree_shardings(params, logical_specs(params, logical_axes(config), "axes"), mesh)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(shardings["method"]))
    assert any(
        not leaf.is_fully_replicated for leaf in jax.tree.leaves(shardings["student"]["layers"]["mlp"]["adapter"])
    )
    with jax.set_mesh(mesh):
        (_, eight), sharded = jax.jit(loss)(jax.device_put(params, shardings), *shard_batch(everything, mesh))
    assert set(one) == set(eight)
    for name in one:
        np.testing.assert_allclose(one[name], eight[name], rtol=2e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, sharded)


def test_dropout_draws_for_every_pass(whole):
    config, student, params, pixels, _ = whole
    run = jax.jit(lambda key: hawaii.forward(student, params, pixels, {}, config, key))
    one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one["forced"], again["forced"])
    assert np.abs(one["forced"] - other["forced"]).max() > 1e-3


FULL = {
    "clip": ((24, 24), 1024),
    "convnext_xxl": ((32, 32), 3072),
    "eva02_l": ((64, 64), 1024),
    "pix2struct_l": ((32, 32), 1536),
    "sam_l": ((64, 64), 256),
}


def flops(config, layers, differentiated):
    """FLOPs of HAWAII's objective and of (1 + N_t) plain passes, at so many layers, by the compiler's count.

    One picture at full size, heads and losses with it. The plain passes go to the same feature and end in
    one mean; where differentiated, both have the gradient of every parameter.
    """
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, layers=layers, remat="none"))
    names = config.features.names
    student = vit.from_config(config.student)
    plain = vit.from_config(dataclasses.replace(config.student, adapter=AdapterConfig(kind="none")))
    cards = {name: card(name, *FULL[name]) for name in names}
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    pixels, many = array(1, 336, 336, 3), array(1 + len(names), 336, 336, 3)
    features = {name: ExpertFeatures(array(1, *grid, width)) for name, (grid, width) in FULL.items() if name in names}
    trees = [jax.eval_shape(module.init, jax.random.key(0), pixels)["params"] for module in (student, plain)]
    heads = jax.eval_shape(lambda: hawaii.init_extra(config, cards, 576, jax.random.key(0)))

    def whole(params, x, features):
        return loss_of(config, student)(params, x, features, {"mask": jnp.ones(1, bool)})[0]

    def passes(params, x):
        return jnp.square(vit.encode(plain, params, x, ("layers/-2",))["layers/-2"]).mean()

    def count(function, *args):
        function = jax.grad(function) if differentiated else function
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    return np.array(
        [count(whole, {"student": trees[0], "method": heads}, pixels, features), count(passes, trees[1], many)]
    )


@pytest.mark.parametrize("teachers,differentiated", [("base", True), ("dagger", False)])
def test_at_most_a_fifth_above_plain_passes(teachers, differentiated):
    config = door.from_file(f"configs/hawaii_vit_l.py:teachers={teachers}")
    two, three = (flops(config, layers, differentiated) for layers in (2, 3))
    ours, plain = two + 22 * (three - two)  # layers are all alike
    assert 1.1 < ours / plain <= 1.2


@pytest.mark.parametrize("teachers", ["base", "dagger", "double_dagger"])
def test_full_size_configs(teachers):
    config = door.from_file(f"configs/hawaii_vit_l.py:teachers={teachers}")
    names = config.features.names
    assert config.student.adapter.teacher_experts == len(names) == {"base": 3}.get(teachers, 4)
    cards = {name: card(name, *FULL[name]) for name in names}
    heads = jax.eval_shape(lambda: hawaii.init_extra(config, cards, 576, jax.random.key(0)))
    # The spec's fused widths.
    assert heads["coarse"]["hidden"]["kernel"].shape == ({"base": 8192, "dagger": 9728}.get(teachers, 9216), 1024)
    student = vit.from_config(config.student)
    tree = {"student": jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, 336, 336, 3)))["params"]}
    tree["method"] = heads
    logical_specs(tree, logical_axes(config), "axes")
    factors = parameter_factors(config.optim, flatten(tree))
    trains = {path for path, factor in factors.items() if factor is not None}
    assert trains == {path for path in factors if "/adapter/" in path or path.startswith("method/")}
    second = door.from_file(f"configs/hawaii_vit_l.py:teachers={teachers},stage=2")
    assert None not in parameter_factors(second.optim, flatten(tree)).values()
    assert (second.optim.lr, second.train.batch) == (2e-5, 128)
    smoke = door.from_file(f"configs/hawaii_vit_l.py:teachers={teachers},smoke")
    assert smoke.student.adapter.teacher_experts == len(names) and smoke.train.steps < 10
    for wrong in ("teachers=bse", "stage=3"):
        with pytest.raises(InputError, match="did you mean 'base'|expected 1 or 2"):
            door.from_file(f"configs/hawaii_vit_l.py:{wrong}")


def test_bfloat16_student_keeps_float32_losses():
    config, params, outputs, features, batch = objective_case(instruction_width=TEXT)
    expected, _ = evaluate(config, params, outputs, features, batch)
    low = {
        name: jnp.asarray(x, jnp.float32 if name.startswith("adapter/") else jnp.bfloat16)
        for name, x in outputs.items()
    }
    loss, metrics = evaluate(config, params, low, features, batch)
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, expected, rtol=0.02)


def test_contracts_that_do_not_fit_are_refused():
    config, key = make_config(), jax.random.key(0)

    def init(config, cards=CARDS, tokens=9):
        return hawaii.init_extra(config, cards, tokens, key)

    with pytest.raises(InputError, match="found 2 in a 'mola'"):
        init(make_config({"teacher_experts": 2}))
    with pytest.raises(InputError, match="found 0 in a 'mole'"):
        init(make_config({"kind": "mole"}))
    with pytest.raises(InputError, match="square student grid, found 8 tokens"):
        init(config, tokens=8)
    with pytest.raises(InputError, match="'text' is the name of one of HAWAII's own heads"):
        init(dataclasses.replace(config, features=FeaturesConfig(experts=("clip", "a", "text"))))
    raw = make_config(clip_target="raw")
    assert "clip" not in init(raw)
    with pytest.raises(InputError, match="found a 4 x 4 grid of width 8"):
        init(raw, {**CARDS, "clip": card("clip", (4, 4), WIDTH)})
    with pytest.raises(InputError, match="'raw' needs expert 'eva'"):
        init(make_config(clip_target="raw", clip_expert="eva"))
    odd = dataclasses.replace(config, student=dataclasses.replace(config.student, feature="pooled"))
    with pytest.raises(InputError, match="found 'pooled'"):
        hawaii.requested_intermediates(odd)
    words = {"instruction": np.zeros((ROWS, 2, 3)), "instruction_mask": np.ones((ROWS, 2), bool)}
    method = HawaiiConfig(instruction_width=TEXT)
    with pytest.raises(InputError, match="expected width 6 .* found 3"):
        hawaii.instruction_tokens(method, {}, words, np.zeros((ROWS, 9, WIDTH)))


def test_registered_with_presets():
    assert get("hawaii") is hawaii
    paper, recommended = HAWAII_PRESETS["paper"], HAWAII_PRESETS["recommended"]
    assert paper.method == HawaiiConfig() and recommended.method.clip_target == "raw"
    for preset in (paper, recommended):
        # As printed: weight one, so that alpha is the rank.
        assert preset.adapter.alpha == preset.adapter.rank == 32 and preset.adapter.b_init == "zeros"
    for name in ("init_extra", "forward", "objective", "target", "tokens", "training_experts", "deployed_experts"):
        assert callable(getattr(hawaii, name)) and callable(getattr(move_kd, name, None) or getattr(hawaii, name))
