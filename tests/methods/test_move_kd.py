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

from tove_jax.bench.cost import EXPERTS
from tove_jax.config import door
from tove_jax.config.schema import AdapterConfig, Config, FeaturesConfig, MoveKDConfig, StudentConfig
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.methods import get, move_kd
from tove_jax.methods.presets import PRESETS
from tove_jax.models import vit
from tove_jax.train.state import flatten, parameter_factors

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = sorted(path.stem.removeprefix("kd_objective_") for path in GOLDENS.glob("kd_objective_*.npz"))


def grid_of(tokens):
    side = math.isqrt(tokens)
    assert side * side == tokens
    return side, side


def make_config(experts, width, adapter=None, **method):
    return Config(
        student=StudentConfig(width=width, heads=1, adapter=adapter or AdapterConfig(kind="none")),
        features=FeaturesConfig(experts=tuple(experts)),
        method=MoveKDConfig(**method),
    )


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


WIDTH, TOKENS, LAYERS, LORAS = 8, 9, 3, 3


def random_case(rows=6, seed=0, **method):
    """A float32 case with a MoLE student and two teachers of other grids."""
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    config = make_config(("b", "clip", "a"), WIDTH, AdapterConfig(), **method)
    probs = jax.nn.softmax(normal(LAYERS, rows, 5, LORAS))
    choice = jax.nn.one_hot(probs.argmax(-1), LORAS)
    outputs = {
        "layers/-2": normal(rows, 1 + TOKENS, WIDTH),
        "adapter/router_probs_mean": probs.mean(-2),
        "adapter/router_choice_mean": choice.mean(-2),
        "adapter/router_entropy": jax.scipy.special.entr(probs).sum(-1).mean(-1),
    }
    log_attention = jax.nn.log_softmax(normal(rows, 1 + TOKENS))[:, 1:]
    features = {
        "clip": ExpertFeatures(normal(rows, 3, 3, WIDTH), normal(rows, WIDTH), jnp.exp(log_attention), log_attention),
        "a": ExpertFeatures(normal(rows, 2, 4, 5)),
        "b": ExpertFeatures(normal(rows, 1, 2, 7)),
    }
    cards = {
        name: card(name, f.patches.shape[1:3], f.patches.shape[3], clip=name == "clip") for name, f in features.items()
    }
    params = move_kd.init_extra(config, cards, TOKENS, jax.random.key(seed))
    return config, params, outputs, features, {"mask": jnp.ones(rows, bool)}


def evaluate(params, outputs, features, batch, config):
    return jax.jit(lambda *args: move_kd.objective(*args, config))(params, outputs, features, batch)


def card(name, grid, width, clip=False):
    return ExpertCard(
        name=name,
        title=name,
        paper="",
        weights="",
        licence="",
        view=View(size=8),
        grid=grid,
        width=width,
        summary_width=WIDTH if clip else None,
        has_cls_attention=clip,
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


def test_presets():
    reference = PRESETS["reference"]
    assert reference.method == MoveKDConfig(saturation_scope="device", sam_layout="scrambled")
    assert reference.adapter == AdapterConfig()
    assert PRESETS["paper"].method.token_weight_source == "scores"
    recommended = PRESETS["recommended"]
    assert recommended.adapter.b_init == "zeros" and recommended.method.stop_gradient_teacher_weight
    for preset in PRESETS.values():
        config, params, outputs, features, batch = random_case(**dataclasses.asdict(preset.method))
        loss, _ = evaluate(params, outputs, features, batch, config)
        assert np.isfinite(loss)


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


# Published sizes of the encoder adapters; Pix2Struct is in no set of the paper's tables.
ENCODER_ADAPTERS = {"sam_l": 2_623_040, "eva02_l": 3_409_472, "pix2struct_l": 2_164_288, "convnext_xxl": 3_737_152}
CONFIG = str(Path(__file__).parents[2] / "configs" / "move_kd_vit_l.py")


def full_size(config):
    """Shapes of every parameter of a full-size run, flat."""
    cards = {name: card(name, EXPERTS[name][:2], EXPERTS[name][2]) for name in config.features.names if name != "clip"}
    cards["clip"] = dataclasses.replace(card("clip", (24, 24), 1024, clip=True), summary_width=1024)
    module = vit.from_config(config.student)
    student = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 336, 336, 3)))["params"]
    extra = jax.eval_shape(lambda: move_kd.init_extra(config, cards, module.grid**2, jax.random.key(0)))
    return flatten({"student": student, "method": extra})


def count(shapes, *words):
    return sum(math.prod(leaf.shape) for path, leaf in shapes.items() if any(word in path for word in words))


@pytest.mark.parametrize("teachers", ["v1_0", "v1_1"])
def test_full_size_config(teachers):
    first = door.from_file(f"{CONFIG}:teachers={teachers}")
    names = first.features.names
    assert set(names) == {"clip", "eva02_l", "convnext_xxl"} | ({"sam_l"} if teachers == "v1_1" else set())
    shapes = full_size(first)
    assert count(shapes, "method/") == sum(ENCODER_ADAPTERS[name] for name in names if name != "clip")
    for name in names:
        assert count(shapes, f"method/{name}/") == ENCODER_ADAPTERS.get(name, 0)
    # The paper's one site has half of the experts; the released code's has the published number.
    reference = full_size(door.from_file(f"{CONFIG}:teachers={teachers},preset=reference"))
    assert count(reference, "/adapter/") == 24_040_008
    assert count(shapes, "student/") - count(shapes, "/adapter/") == 303_507_456
    factors = parameter_factors(first.optim, shapes)
    trained = {path for path, factor in factors.items() if factor is not None}
    assert trained == {path for path in shapes if "/adapter/" in path or path.startswith("method/")}
    assert (first.optim.lr, first.train.batch, first.train.steps) == (1e-3, 256, 2180)
    assert (first.student.view.fit, first.features.views, first.train.seed) == ("crop", "published", 42)
    second = door.from_file(f"{CONFIG}:teachers={teachers},stage=2")
    assert None not in parameter_factors(second.optim, shapes).values()
    assert (second.optim.lr, second.train.batch, second.train.steps) == (2e-5, 128, 5197)
    assert (second.student.view.fit, second.features.views) == ("pad", "student")
    for config in (first, second):
        o = config.optim
        assert (o.b1, o.b2, o.eps, o.weight_decay, o.schedule, o.warmup, o.clip_norm) == (
            0.9, 0.999, 1e-8, 0.0, "cosine", 0.03, 1.0,
        )  # fmt: skip
        assert config.train.dtype == "bfloat16"
        assert config.student.initialize == "openai/clip-vit-large-patch14-336"


def test_full_size_config_takes_presets_and_refuses_the_rest():
    for name, preset in PRESETS.items():
        config = door.from_file(f"{CONFIG}:preset={name},seed=7")
        assert (config.method, config.student.adapter) == (preset.method, preset.adapter)
        assert config.train.seed == 7 and config.features.views == ("student" if name == "recommended" else "published")
    assert door.from_file(CONFIG) == door.from_file(f"{CONFIG}:preset=paper,teachers=v1_0,stage=1,seed=42")
    smoke = door.from_file(f"{CONFIG}:smoke,teachers=v1_1,stage=2")
    assert len(smoke.features.experts) == 4 and smoke.train.steps < 10 and smoke.optim.lr == 2e-5
    for wrong, message in {
        "teachers=v1_2": "did you mean 'v1_1'|did you mean 'v1_0'",
        "stage=3": "expected 1 or 2, found 3",
        "preset=papr": "did you mean 'paper'",
    }.items():
        with pytest.raises(InputError, match=message):
            door.from_file(f"{CONFIG}:{wrong}")


def test_pix2struct_encoder_adapter_has_its_size():
    config = make_config(("clip", "pix2struct_l"), 1024)
    assert count(full_size(config), "method/") == ENCODER_ADAPTERS["pix2struct_l"]


# The quirks of the released code, by their number on the page: field and the code's value. 10 is a crash.
QUIRKS = {
    1: {"method.token_weight_source": "probs_softmax"},
    2: {"method.teacher_score_scale": "one"},
    3: {"method.saturation_rule": True, "method.saturation_scope": "device"},
    4: {"method.clip_weight": 0.8},
    5: {"method.stop_gradient_teacher_weight": False},
    6: {"student.adapter.site": "linears"},
    7: {"student.adapter.b_init": "kaiming"},
    8: {"student.adapter.router_gradient": "none"},
    9: {"method.sam_layout": "scrambled"},
    11: {"student.feature": "layers/-2"},
    12: {"method.balance_pool": "all"},
    13: {"method.kd_on_text_only": True},
    14: {"features.views": "published"},
}


def test_every_quirk_is_a_field_that_the_reference_follows():
    config = door.from_file(f"{CONFIG}:preset=reference,teachers=v1_1")
    page = (Path(__file__).parents[2] / "docs/methods/move_kd.md").read_text()
    listed = page[page.index("## Quirks of the released code") :]
    for number, fields in QUIRKS.items():
        entry = listed[listed.index(f"\n{number}. ") :]
        entry = entry[: entry.find(f"\n{number + 1}. ")] if f"\n{number + 1}. " in entry else entry
        for path, value in fields.items():
            found = config
            for part in path.split("."):
                found = getattr(found, part)
            assert found == value, path
            assert f"`{path}`" in entry or f"`{path.rpartition('.')[2]}`" in entry, path
