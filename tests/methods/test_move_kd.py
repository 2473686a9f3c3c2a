"""MoVE-KD's objective: the golden numbers in double precision, then its properties."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.move_kd_cases import LAYERS, LORAS, TOKENS, WIDTH, card, evaluate, grid_of, make_config, random_case
from tove_jax.config.schema import FeaturesConfig, MoveKDConfig
from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertFeatures
from tove_jax.methods import get, move_kd
from tove_jax.methods.presets import PRESETS

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = sorted(path.stem.removeprefix("kd_objective_") for path in GOLDENS.glob("kd_objective_*.npz"))


def golden_case(name):
    with np.load(GOLDENS / f"kd_objective_{name}.npz") as stored:
        golden = dict(stored)
    options = json.loads(str(golden.pop("options_json")))
    count = sum(key.endswith("/tokens") for key in golden)
    names = ["clip", *[f"teacher{i}" for i in range(count)]]
    config = make_config(
        names,
        golden["student"].shape[-1],
        clip_weight=options["alpha"],
        token_weighting=options["token_weight"],
        teacher_weighting=options["teacher_weight"],
    )
    clip = golden["clip"]
    features = {
        "clip": ExpertFeatures(
            patches=clip.reshape(clip.shape[0], *grid_of(clip.shape[1]), -1),
            summary=golden["cls"],
            cls_attention=golden["cls_attention"].mean(axis=1),
        )
    }
    params = {}
    for teacher in names[1:]:
        tokens = golden[f"{teacher}/tokens"]
        features[teacher] = ExpertFeatures(tokens.reshape(tokens.shape[0], *grid_of(tokens.shape[1]), -1))
        part = {key: golden[f"{teacher}/{key}"] for key in ("w1", "b1", "w2", "b2")}
        params[teacher] = {
            "channel": {"kernel": part["w1"].T, "bias": part["b1"]},
            "token": {"kernel": part["w2"].T, "bias": part["b2"]},
        }
    student = golden["student"]
    outputs = {"layers/-2": np.concatenate([np.full_like(student[:, :1], np.nan), student], axis=1)}
    return config, params, outputs, features, golden


def test_all_golden_cases_are_here():
    expected = ["alpha_half", "default", "no_token_weight", "saturated", "three_teachers", "uniform_teachers"]
    assert CASES == expected


@pytest.mark.parametrize("name", CASES)
def test_equals_golden_in_double_precision(name):
    with jax.enable_x64(True):
        config, params, outputs, features, golden = golden_case(name)
        method, names = config.method, move_kd.teachers(config)
        params, outputs, features = jax.tree.map(jnp.asarray, (params, outputs, features))
        student, clip = outputs["layers/-2"][:, 1:], features["clip"]
        targets = {n: move_kd.target(method, params.get(n), features[n], student) for n in names}
        for teacher in names[1:]:
            assert targets[teacher].dtype == jnp.float64
            np.testing.assert_allclose(targets[teacher], golden[f"{teacher}/adapted"], atol=1e-6, rtol=0)
        weight = move_kd.token_weights(method, clip) if method.token_weighting else None
        losses = jnp.stack([move_kd.teacher_loss(student, targets[n], weight) for n in names], axis=-1)
        np.testing.assert_allclose(losses, golden["teacher_losses"], atol=1e-6, rtol=0)
        rows = jnp.ones(student.shape[0], bool)
        weights, fired = move_kd.teacher_weights(method, clip, [targets[n] for n in names[1:]], rows, 1)
        np.testing.assert_allclose(weights, golden["teacher_weights"], atol=1e-6, rtol=0)
        np.testing.assert_allclose(np.sum(weights, axis=-1), 1.0, atol=1e-12)
        # No stored case fires the rule, whatever its name: in `saturated` each row is one-hot, but the
        # teachers' means are 1/3 and 2/3. The next test fires it.
        assert not fired
        loss, metrics = move_kd.objective(params, outputs, features, {"mask": rows}, config)
        np.testing.assert_allclose(metrics["loss/kd"], golden["kd"], atol=1e-6, rtol=0)
        np.testing.assert_allclose(loss, 0.5 * golden["kd"], atol=1e-6, rtol=0)
        for k, teacher in enumerate(names):
            means = golden["teacher_losses"].mean(axis=0), golden["teacher_weights"].mean(axis=0)
            np.testing.assert_allclose(metrics[f"loss/{teacher}/patches"], means[0][k], atol=1e-6)
            np.testing.assert_allclose(metrics[f"weight/{teacher}"], means[1][k], atol=1e-6)
    assert jnp.zeros(1).dtype == jnp.float32


def test_saturation_rule_fires_on_rows_that_agree():
    """Rows 1 and 2 of `saturated` both choose the second teacher: q = (0, 1) becomes softmax((0, 1))."""
    with jax.enable_x64(True):
        config, params, outputs, features, golden = golden_case("saturated")
        np.testing.assert_allclose(golden["teacher_weights"][1:, 2], 0.2, atol=1e-12)
        outputs, features = jax.tree.map(lambda x: jnp.asarray(x)[1:], (outputs, features))
        loss, metrics = move_kd.objective(params, outputs, features, {"mask": jnp.ones(2, bool)}, config)
        weights = np.array([0.8, 0.2 / (1 + np.e), 0.2 * np.e / (1 + np.e)])
        assert float(metrics["weight/saturated"]) == 1.0
        for k, teacher in enumerate(("clip", "teacher0", "teacher1")):
            np.testing.assert_allclose(metrics[f"weight/{teacher}"], weights[k], atol=1e-12)
        np.testing.assert_allclose(metrics["loss/kd"], (golden["teacher_losses"][1:] @ weights).mean(), atol=1e-6)
        off = change(config, saturation_rule=False)
        _, metrics = move_kd.objective(params, outputs, features, {"mask": jnp.ones(2, bool)}, off)
        np.testing.assert_allclose(
            metrics["loss/kd"],
            golden["kd"] * 3 / 2 - (golden["teacher_losses"][0] @ golden["teacher_weights"][0]) / 2,
            atol=1e-6,
        )


def change(config, **method):
    return dataclasses.replace(config, method=dataclasses.replace(config.method, **method))


def close(a, b, tolerance=1e-5):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=tolerance, rtol=tolerance, err_msg=name)


def test_registered_and_asks_for_what_it_reads():
    assert get("move_kd") is move_kd
    with pytest.raises(InputError, match="did you mean 'move_kd'"):
        get("move_dk")
    config, params, outputs, features, batch = random_case()
    assert set(move_kd.requested_intermediates(config)) == set(outputs)
    odd = dataclasses.replace(config, student=dataclasses.replace(config.student, feature="pooled"))
    with pytest.raises(InputError, match="expected layers/<i> or embeddings, found 'pooled'"):
        move_kd.requested_intermediates(odd)
    _, metrics = evaluate(params, outputs, features, batch, config)
    expected = {"loss/total", "loss/kd", "loss/balance", "router/entropy", "weight/saturated"}
    for name in ("a", "b", "clip"):
        expected |= {f"loss/{name}/patches", f"weight/{name}", f"target/{name}/variance"}
    expected |= {f"router/load/{layer:02d}/{e}" for layer in range(LAYERS) for e in range(LORAS)}
    expected |= {f"router/collapse/{layer:02d}" for layer in range(LAYERS)}
    assert set(metrics) == expected
    assert all(value.shape == () for value in metrics.values())
    load = sum(metrics[f"router/load/00/{e}"] for e in range(LORAS))
    np.testing.assert_allclose(load, 1.0, rtol=1e-6)


def test_collapse_is_the_largest_share_of_a_layer():
    # Layer 0: even; layer 1: one expert gets everything; layer 2: rows disagree, and the last is padding.
    rows = jnp.array([True, True, False])
    one, two = [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]
    choice = jnp.array([[[1 / 3] * 3] * 3, [one] * 3, [one, two, one]])
    entropy = jnp.array([[1.0, 1.0, 9.0], [0.0, 0.0, 9.0], [0.5, 0.5, 9.0]])
    metrics = jax.jit(move_kd.router_metrics)(choice, entropy, rows)
    np.testing.assert_allclose([metrics[f"router/collapse/{layer:02d}"] for layer in range(3)], [1 / 3, 1.0, 0.5])
    np.testing.assert_allclose([metrics[f"router/load/02/{e}"] for e in range(3)], [0.5, 0.25, 0.25])
    np.testing.assert_allclose(metrics["router/entropy"], 0.5)
    gradient = jax.grad(lambda x: sum(move_kd.router_metrics(x, entropy, rows).values()))(choice)
    assert not np.asarray(gradient).any()


def test_scrambled_sam_is_what_the_released_wrapper_does():
    """Its steps, in torch: flatten channels with rows, take that for (tokens, channels), unshuffle by two."""
    side, channels = 4, 16
    spatial = np.random.default_rng(0).standard_normal((2, side, side, channels)).astype(np.float32)
    method = PRESETS["reference"].method
    found = np.asarray(move_kd.laid_out(method, "sam_l", jnp.asarray(spatial)))
    assert found.shape == spatial.shape and np.array_equal(np.sort(found, axis=None), np.sort(spatial, axis=None))
    # Token (i, j) holds two channels of two rows, all columns: not a place in the picture.
    first = {(c, h) for c, h in np.ndindex(channels, side) if np.isin(spatial[0, h, :, c], found[0, 0, 0]).all()}
    assert first == {(0, 0), (0, 1), (2, 0), (2, 1)}
    for other in (MoveKDConfig(), PRESETS["recommended"].method):
        assert move_kd.laid_out(other, "sam_l", spatial) is spatial
    assert move_kd.laid_out(method, "eva02_l", spatial) is spatial
    with pytest.raises(InputError, match="found 4 x 2 x 16 of expert 'sam_l'"):
        move_kd.laid_out(method, "sam_l", jnp.asarray(spatial[:, :, :2]))
    torch = pytest.importorskip("torch")
    tokens = torch.from_numpy(spatial.transpose(0, 3, 1, 2).copy()).flatten(1, 2)
    batch, count, width = tokens.shape
    square = tokens.transpose(1, 2).reshape(batch, width, math.isqrt(count), math.isqrt(count))
    theirs = torch.nn.functional.pixel_unshuffle(square, 2)
    np.testing.assert_array_equal(found, theirs.permute(0, 2, 3, 1).numpy())


def test_sam_layout_reaches_the_loss():
    config, _, outputs, features, batch = random_case(sam_expert="a")
    draw = np.random.default_rng(3)
    features = {**features, "a": ExpertFeatures(jnp.asarray(draw.standard_normal((6, 2, 2, 8)), jnp.float32))}
    cards = {name: card(name, f.patches.shape[1:3], f.patches.shape[3], name == "clip") for name, f in features.items()}
    params = move_kd.init_extra(config, cards, TOKENS, jax.random.key(0))
    scrambled = change(config, sam_layout="scrambled")
    _, metrics = evaluate(params, outputs, features, batch, scrambled)
    laid = {**features, "a": ExpertFeatures(move_kd.laid_out(scrambled.method, "a", features["a"].patches))}
    _, expected = evaluate(params, outputs, laid, batch, config)
    _, spatial = evaluate(params, outputs, features, batch, config)
    close(metrics, expected)
    assert abs(metrics["loss/a/patches"] - spatial["loss/a/patches"]) > 1e-4


def test_padded_rows_contribute_nothing():
    config, params, outputs, features, batch = random_case(saturation_threshold=0.5)
    mask = jnp.array([True, True, False, True, False, True])

    def keep(x, axis=0):
        return jnp.take(x, jnp.flatnonzero(mask), axis=axis)

    def loss(params, outputs, features, batch):
        return evaluate(params, outputs, features, batch, config)

    # What a padded row holds must not matter, NaN included.
    spoilt = jax.tree.map(lambda x: jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan), features)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, padded), gradient = step(params, outputs, features, {"mask": mask})
    (_, with_nan), _ = step(params, outputs, spoilt, {"mask": mask})
    fewer = {name: keep(x, 1 if name.startswith("adapter/") else 0) for name, x in outputs.items()}
    rows = (params, fewer, jax.tree.map(keep, features), {"mask": jnp.ones(4, bool)})
    (_, alone), expected = step(*rows)
    (_, everything), _ = step(params, outputs, features, batch)
    close(padded, alone)
    close(with_nan, alone)
    assert abs(float(everything["loss/kd"] - alone["loss/kd"])) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected)


def test_rows_without_a_picture_are_left_out_of_distillation_only():
    config, params, outputs, features, batch = random_case(kd_on_text_only=False)
    has = jnp.array([True, False, True, True, True, False])
    _, full = evaluate(params, outputs, features, batch, config)
    _, masked = evaluate(params, outputs, features, {"mask": has}, config)
    _, text = evaluate(params, outputs, features, {**batch, "has_picture": has}, config)
    np.testing.assert_allclose(text["loss/kd"], masked["loss/kd"], rtol=1e-6)
    np.testing.assert_allclose(text["loss/balance"], full["loss/balance"], rtol=1e-6)
    _, on = evaluate(params, outputs, features, {**batch, "has_picture": has}, change(config, kd_on_text_only=True))
    close(on, full)


def test_no_rows_give_zero_not_nan():
    config, params, outputs, features, batch = random_case()
    loss, metrics = evaluate(params, outputs, features, {"mask": ~batch["mask"]}, config)
    assert float(loss) == 0.0 and all(np.isfinite(value) for value in metrics.values())


def test_token_weights():
    config, _, _, features, _ = random_case()
    clip = features["clip"]
    sources = {
        source: move_kd.token_weights(change(config, token_weight_source=source).method, clip)
        for source in ("probs_softmax", "probs", "scores")
    }
    for weight in sources.values():
        np.testing.assert_allclose(weight.sum(-1), 1.0, rtol=1e-6)
    probs = np.exp(np.asarray(clip.cls_scores))
    np.testing.assert_allclose(sources["scores"], probs / probs.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(sources["probs"], sources["scores"], rtol=1e-5)
    # The spec's example: one patch of 576 with 0.3 of the attention gets 1.35 times the rest.
    peak = jnp.full((1, 576), 0.7 / 576).at[0, 0].set(0.3)
    weight = move_kd.token_weights(config.method, ExpertFeatures(peak, cls_attention=peak))
    np.testing.assert_allclose(weight[0, 0] / weight[0, 1], 1.35, atol=0.01)


def test_saturation_by_device_and_global():
    q = jnp.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4]])
    rows = jnp.ones(4, bool)
    device = MoveKDConfig(saturation_scope="device")
    result, fired = move_kd.saturation(q, rows, device, 2)
    np.testing.assert_allclose(result[:2], jax.nn.softmax(q[:2]), rtol=1e-6)
    np.testing.assert_array_equal(result[2:], q[2:])
    assert float(fired) == 0.5
    result, fired = move_kd.saturation(q, rows, MoveKDConfig(saturation_scope="global"), 2)
    np.testing.assert_array_equal(result, q)
    result, fired = move_kd.saturation(q, rows.at[2:].set(False), MoveKDConfig(), 1)
    assert float(fired) == 1.0
    np.testing.assert_allclose(result, jax.nn.softmax(q), rtol=1e-6)
    # Adding 0.2, as the code does, changes nothing.
    np.testing.assert_allclose(result, jax.nn.softmax(q + 0.2), rtol=1e-6)
    with pytest.raises(InputError, match="4 rows do not divide into 3 groups"):
        move_kd.saturation(q, rows, device, 3)


def test_stop_gradient_of_teacher_weights():
    config, params, outputs, features, batch = random_case()

    def gradient(config):
        def loss(params):
            return evaluate(params, outputs, features, batch, config)[0]

        return jax.jit(jax.grad(loss))(params)["a"]["token"]["bias"]

    flowing, stopped = gradient(config), gradient(change(config, stop_gradient_teacher_weight=True))
    assert np.abs(flowing).max() > 0 and np.abs(stopped).max() > 0
    assert np.abs(flowing - stopped).max() > 1e-5
    # With uniform weights there is nothing to stop.
    uniform = gradient(change(config, teacher_weighting=False))
    both = gradient(change(config, teacher_weighting=False, stop_gradient_teacher_weight=True))
    np.testing.assert_array_equal(uniform, both)


def test_clip_alone_has_weight_one():
    config, _, outputs, features, batch = random_case()
    config = dataclasses.replace(config, features=FeaturesConfig(experts=("clip",)))
    _, metrics = evaluate({}, outputs, {"clip": features["clip"]}, batch, config)
    assert float(metrics["weight/clip"]) == 1.0
    np.testing.assert_allclose(metrics["loss/kd"], metrics["loss/clip/patches"], rtol=1e-6)


def test_interpolated_targets():
    config, _, outputs, features, batch = random_case(target="interpolate")
    cards = {"clip": card("clip", (3, 3), WIDTH, True), "a": card("a", (2, 4), 5), "b": card("b", (1, 2), 7)}
    params = move_kd.init_extra(config, cards, TOKENS, jax.random.key(0))
    assert set(params["a"]) == {"channel"}
    _, metrics = evaluate(params, outputs, features, batch, config)
    assert np.isfinite(metrics["loss/kd"])


def test_bfloat16_student_keeps_float32_losses():
    config, params, outputs, features, batch = random_case()
    expected, _ = evaluate(params, outputs, features, batch, config)
    low = {name: x.astype(jnp.bfloat16) if name == "layers/-2" else x for name, x in outputs.items()}
    loss, _ = evaluate(params, low, features, batch, config)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=0.02)


def test_contracts_that_do_not_fit_are_refused():
    config, *_ = random_case()
    cards = {"clip": card("clip", (3, 3), WIDTH, True), "a": card("a", (2, 4), 5), "b": card("b", (1, 2), 7)}

    def init(config=config, **changed):
        key = jax.random.key(0)
        return move_kd.init_extra(config, {**cards, "clip": dataclasses.replace(cards["clip"], **changed)}, TOKENS, key)

    init()
    with pytest.raises(InputError, match="expected 9 tokens of width 8, found a 4 x 4 grid of width 8"):
        init(grid=(4, 4))
    with pytest.raises(InputError, match="gives no attention"):
        init(has_cls_attention=False)
    with pytest.raises(InputError, match="found width None"):
        init(summary_width=None)
    with pytest.raises(InputError, match="MoVE-KD needs 'clip'"):
        init(dataclasses.replace(config, features=FeaturesConfig(experts=("a",))))


def test_a_prior_fixes_the_weights_of_the_teachers_but_clip():
    fixed = {"teacher_weighting": False, "teacher_prior": (3.0, 1.0), "clip_weight": 0.5}
    config, params, outputs, features, batch = random_case(**fixed)
    _, metrics = evaluate(params, outputs, features, batch, config)
    names = move_kd.teachers(config)
    np.testing.assert_allclose([metrics[f"weight/{name}"] for name in names], [0.5, 0.375, 0.125], rtol=1e-6)
    with pytest.raises(InputError, match="teacher_prior: expected 2 weights"):
        evaluate(params, outputs, features, batch, change(config, teacher_prior=(1.0,)))
    with pytest.raises(InputError, match="not negative"):
        evaluate(params, outputs, features, batch, change(config, teacher_prior=(-1.0, 1.0)))
