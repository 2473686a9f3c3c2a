"""ToVE: a double-precision restatement, the ten properties of its specification, and its options."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax import methods
from tove_jax.config import from_file
from tove_jax.config.schema import AdapterConfig, Config, FeaturesConfig, MeshConfig, StudentConfig, ToVEConfig
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.methods import tove
from tove_jax.methods.presets import BY_METHOD
from tove_jax.models import vit
from tove_jax.parallel import first_match, logical_specs, make_mesh, shard_batch, tree_shardings
from tove_jax.train.objective import logical_axes
from tove_jax.train.state import flatten

STUDENT = StudentConfig(
    image_size=16, patch_size=4, width=16, layers=2, heads=2, mlp_width=24, feature="layers/-1",
    adapter=AdapterConfig(kind="none"),
)  # fmt: skip
# Grids below, at and above CLIP's 4 x 4; `depth` gives a map.
GRIDS = {"small": (2, 3, 5), "same": (4, 4, 7), "depth": (12, 10, 1)}
ROWS, WORDS = 4, 9
ERF = np.vectorize(math.erf)


def make_config(**method):
    defaults = {"hidden": 8, "map_experts": ("depth",), "stem_width": 16, "stem_groups": 2, "vocabulary": WORDS}
    return Config(
        student=STUDENT,
        features=FeaturesConfig(experts=("small", "same", "depth:99")),
        method=ToVEConfig(**{**defaults, "gate_init": "linear", **method}),
    )


def attach(config, *names):
    return tove.attach(config, names)


def change(config, **method):
    return dataclasses.replace(config, method=dataclasses.replace(config.method, **method))


def card(name, height, wide, width):
    known = dict.fromkeys(("title", "paper", "weights", "licence"), "")
    return ExpertCard(name=name, view=View(8), grid=(height, wide), width=width, **known)


CARDS = {name: card(name, *shape) for name, shape in GRIDS.items()}


enrich = jax.jit(tove.enrich, static_argnames="config")
objective = jax.jit(tove.objective, static_argnames="config")
forward = jax.jit(tove.forward, static_argnames=("student", "config"))
tokens_of = jax.jit(tove.tokens, static_argnames=("student", "config"))


def init_extra(config, cards=CARDS, seed=1):
    return jax.jit(lambda key: tove.init_extra(config, cards, 16, key))(jax.random.key(seed))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def module():
    return vit.from_config(STUDENT)


@pytest.fixture(scope="module")
def params(config, module):
    size = STUDENT.image_size
    student = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    return {"student": student, "method": init_extra(config)}


@pytest.fixture(scope="module")
def features():
    return {name: ExpertFeatures(draw(ROWS, *shape, seed=k)) for k, (name, shape) in enumerate(GRIDS.items())}


@pytest.fixture(scope="module")
def clip():
    return draw(ROWS, 16, STUDENT.width, seed=9)


@pytest.fixture(scope="module")
def pixels():
    return draw(ROWS, 16, 16, 3, seed=8)


BATCH = {
    "mask": jnp.array([True, True, True, False]),
    "captions": jnp.array([[1, 2], [3, 0], [0, 0], [4, 5]]),
    "caption_mask": jnp.array([[True, True], [True, False], [False, False], [True, True]]),
}


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def restated(params, clip, tokens, mask):
    """Gate, projector, residual and L_aux as the paper writes them: every U_k on its own, in numpy."""
    gate = softmax(clip @ params["gate"]["kernel"] + params["gate"]["bias"])
    result = clip.copy()
    for k, name in enumerate(tokens):
        first = params["experts"][name]["first"]
        h = tokens[name] @ first["kernel"] + first["bias"]
        u = 0.5 * h * (1 + ERF(h / np.sqrt(2))) @ params["second"]["kernel"] + params["second"]["bias"]
        result += gate[..., k, None] * u
    importance = gate[mask].sum((0, 1))
    return gate, result, (importance.std() / importance.mean()) ** 2


def test_equals_the_equations_in_double_precision():
    """Experts on CLIP's own grid, so that nothing but the equations is at work."""
    config = dataclasses.replace(make_config(map_experts=()), features=FeaturesConfig(experts=("a", "b", "c")))
    shapes = {"a": (4, 4, 5), "b": (4, 4, 7), "c": (4, 4, 3)}
    made = init_extra(config, {n: card(n, *s) for n, s in shapes.items()}, 3)
    generator = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = double(made)
        clip = generator.standard_normal((ROWS, 16, 16))
        features = {name: ExpertFeatures(generator.standard_normal((ROWS, *shape))) for name, shape in shapes.items()}
        found = enrich(params, jnp.asarray(clip), features, config)
        flat = {name: f.patches.reshape(ROWS, 16, -1) for name, f in features.items()}
        gate, tokens, aux = restated(params, clip, flat, np.asarray(BATCH["mask"]))
        assert found.tokens.dtype == jnp.float64
        np.testing.assert_allclose(found.gate, gate, atol=1e-6)
        np.testing.assert_allclose(found.tokens, tokens, atol=1e-6)
        outputs = {"tokens": found.tokens, "gate": found.gate}
        loss, metrics = objective(params, outputs, {}, BATCH, config)
        np.testing.assert_allclose(metrics["loss/aux"], aux, atol=1e-6)
        np.testing.assert_allclose(loss, metrics["loss/text"] + 0.01 * aux, atol=1e-6)
        counted = gate[np.asarray(BATCH["mask"])]
        entropy = -(counted * np.log(counted)).sum(-1).mean()
        np.testing.assert_allclose(metrics["gate/entropy"], entropy, atol=1e-6)
        for k, name in enumerate(shapes):
            np.testing.assert_allclose(metrics[f"gate/{name}"], counted[..., k].mean(), atol=1e-6)
            np.testing.assert_allclose(metrics[f"gate/share/{name}"], (counted.argmax(-1) == k).mean(), atol=1e-6)


def test_property_1_gates_are_a_distribution_and_detached_ones_are_absent(config, params, features, clip):
    gate = enrich(params["method"], clip, features, config).gate
    assert gate.shape == (ROWS, 16, 3) and float(gate.min()) >= 0
    np.testing.assert_allclose(gate.sum(-1), 1, rtol=1e-6)
    fewer = enrich(params["method"], clip, features, attach(config, "small", "depth")).gate
    assert fewer.shape == (ROWS, 16, 2)
    np.testing.assert_allclose(fewer.sum(-1), 1, rtol=1e-6)
    # Dropped while training, the column stands and is exactly zero.
    dropped = enrich(params["method"], clip, features, change(config, expert_drop=1.0), jax.random.key(0)).gate
    assert (np.asarray(dropped > 0).sum(-1) == 1).all() and (np.asarray(dropped == 0).sum(-1) == 2).all()


@pytest.mark.parametrize("left", [("small", "same"), ("same", "depth"), ("depth",)])
def test_property_2_detaching_renormalises(config, params, features, clip, left):
    full = np.asarray(enrich(params["method"], clip, features, config).gate, np.float64)
    columns = [config.features.names.index(name) for name in left]
    expected = full[..., columns] / full[..., columns].sum(-1, keepdims=True)
    np.testing.assert_allclose(
        enrich(params["method"], clip, features, attach(config, *left)).gate, expected, rtol=1e-5
    )


def test_property_3_without_experts_the_tokens_are_clips_bit_for_bit(config, params, module, pixels, clip):
    bare = attach(config)
    assert tove.enrich(params["method"], clip, {}, bare).tokens is clip
    outputs = forward(module, params, pixels, {}, bare, jax.random.key(0))
    plain = jax.jit(lambda p: vit.encode(module, p, pixels, ("layers/-1",))["layers/-1"][:, 1:])(params["student"])
    np.testing.assert_array_equal(outputs["tokens"], plain)
    loss, metrics = objective(params["method"], outputs, {}, BATCH, bare)
    assert set(metrics) == {"loss/total", "loss/text"} and np.isfinite(loss)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params["method"])
    np.testing.assert_array_equal(enrich(nan, clip, {}, bare).tokens, clip)


def expert_tokens(config, params, features, clip):
    """U_k of each expert: what it adds when it is attached alone."""
    alone = {name: enrich(params, clip, features, attach(config, name)).tokens for name in config.features.names}
    return {name: np.asarray(tokens - clip) for name, tokens in alone.items()}


def test_property_4_the_second_layer_is_shared_the_first_is_not(config, params, features, clip):
    def moved(*path):
        def change_leaf(place, leaf):
            return leaf + 0.1 if [key.key for key in place] == list(path) else leaf

        changed = jax.tree_util.tree_map_with_path(change_leaf, params["method"])
        after = expert_tokens(config, changed, features, clip)
        return {name for name in before if np.abs(after[name] - before[name]).max() > 1e-5}

    before = expert_tokens(config, params["method"], features, clip)
    everyone = {"small", "same", "depth"}
    assert moved("second", "kernel") == everyone and moved("second", "bias") == everyone
    for name in everyone:
        assert moved("experts", name, "first", "kernel") == {name}
    assert moved("experts", "depth", "stem", "conv0", "kernel") == {"depth"}
    assert moved("gate", "kernel") == set()


def test_property_5_no_gradient_reaches_clip_or_the_experts(config, params, module, features, pixels):
    def loss(params, features):
        outputs = tove.forward(module, params, pixels, features, config, jax.random.key(0))
        return tove.objective(params["method"], outputs, features, BATCH, config)[0]

    of_params, of_features = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, features)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((of_params["student"], of_features)))
    still = [path for path, leaf in flatten(of_params["method"]).items() if not np.any(leaf)]
    assert still == []
    # What is detached stays still: its first layer, and its column of the gate.
    some = attach(config, "small", "same")
    outputs = lambda p: tove.forward(module, p, pixels, features, some, jax.random.key(0))  # noqa: E731
    slope = jax.jit(jax.grad(lambda p: tove.objective(p["method"], outputs(p), features, BATCH, some)[0]))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope["method"]["experts"]["depth"]))
    assert not np.any(slope["method"]["gate"]["kernel"][:, 2]) and np.any(slope["method"]["gate"]["kernel"][:, 0])


def test_property_6_the_balance_loss_is_zero_when_uniform_and_k_minus_1_when_alone(config, params, clip):
    for count, names in ((3, ()), (2, ("small", "same"))):
        asked = attach(config, *names) if names else config
        for gate, expected in (
            (jnp.full((ROWS, 16, count), 1 / count), 0.0),
            (jax.nn.one_hot(jnp.full((ROWS, 16), 1), count), count - 1.0),
        ):
            _, metrics = objective(params["method"], {"tokens": clip, "gate": gate}, {}, BATCH, asked)
            np.testing.assert_allclose(metrics["loss/aux"], expected, atol=1e-6)


@pytest.mark.parametrize("names", [(), ("small",), ("small", "depth"), ("small", "same", "depth")])
def test_property_7_the_tokens_keep_their_shape_whatever_the_experts(config, params, module, features, pixels, names):
    asked = attach(config, *names)
    found = jax.eval_shape(lambda p: tove.tokens(module, p, pixels, features, asked), params)
    assert found.shape == (ROWS, 16, STUDENT.width) and found.dtype == jnp.float32


def test_property_8_the_merged_encoder_is_plain_clip():
    """The student has no adapter, so its tree and its operations are those of a tower that knows no method."""
    plain = dict(image_size=16, patch_size=4, width=16, depth=2, heads=2, mlp_width=24)
    tower, pixels = vit.VisionTransformer(**plain), jnp.zeros((2, 16, 16, 3))
    ours = vit.from_config(make_config().student)
    shapes = [jax.eval_shape(module.init, jax.random.key(0), pixels) for module in (tower, ours)]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes[0]) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes[1]
    )

    def cost(module):
        lowered = jax.jit(lambda p, x: module.apply(p, x)[0]).lower(shapes[0], pixels)
        return lowered.cost_analysis()["flops"]

    assert cost(tower) == cost(ours) > 0


def test_property_9_permuting_tokens_permutes_gates(config, params, features, clip):
    order = np.random.default_rng(0).permutation(16)
    gate = enrich(params["method"], clip, features, config).gate
    np.testing.assert_allclose(
        enrich(params["method"], clip[:, order], features, config).gate, gate[:, order], rtol=1e-5
    )


def test_a_detached_expert_is_neither_traced_nor_needed(config, params, module, features, pixels):
    """What is no array would stop the trace; and the traced program has none of the stem's convolutions."""
    some = attach(config, "small", "same")
    assert tove.training_experts(some) == tove.deployed_experts(some) == ("small", "same")
    spoilt = {**features, "depth": object()}
    key = jax.random.key(0)

    def program(config, features):
        trained = {k: v for k, v in params["method"]["experts"].items() if k in tove.deployed_experts(config)}
        given = {**params, "method": {**params["method"], "experts": trained}}
        return str(jax.make_jaxpr(lambda p: tove.forward(module, p, pixels, features, config, key))(given))

    detached = program(some, spoilt)
    assert detached == program(some, {name: features[name] for name in ("small", "same")})
    assert "conv_general_dilated" not in detached and "conv_general_dilated" in program(config, features)
    assert "10,1]" not in detached and "10,1]" in program(config, features)


def test_noise_and_expert_drop_act_in_training_alone(config, params, module, features, pixels):
    plain = forward(module, params, pixels, features, config, jax.random.key(0))
    assert set(plain) == {"tokens", "gate"}
    noisy = change(config, noise=True)
    first, second = (forward(module, params, pixels, features, noisy, jax.random.key(k)) for k in (0, 1))
    assert np.abs(first["gate"] - second["gate"]).max() > 0.01 and first["load"].shape == (ROWS, 16, 3)
    # The noise's deviation is 1 / K.
    many = jnp.zeros((ROWS, 16, 3))
    logits = np.log(np.asarray(first["gate"])) - np.log(np.asarray(plain["gate"])) + many
    noise = logits - logits.mean(-1, keepdims=True)
    np.testing.assert_allclose(noise.std() * math.sqrt(3 / 2), 1 / 3, rtol=0.15)
    _, metrics = objective(params["method"], first, features, BATCH, noisy)
    _, without = objective(params["method"], {k: first[k] for k in ("tokens", "gate")}, features, BATCH, noisy)
    assert abs(float(metrics["loss/aux"]) - float(without["loss/aux"])) > 1e-6
    for asked in (noisy, change(config, expert_drop=0.5)):
        np.testing.assert_array_equal(tokens_of(module, params, pixels, features, asked), plain["tokens"])


def test_options_of_the_projector(config, params, features, clip):
    one = enrich(params["method"], clip, features, config).tokens - clip
    half = enrich(params["method"], clip, features, change(config, scale=0.5)).tokens - clip
    np.testing.assert_allclose(half, one / 2, atol=1e-5)
    config = dataclasses.replace(change(config, map_experts=()), features=FeaturesConfig(experts=("small", "same")))
    zero = init_extra(change(config, zero_init=True))
    np.testing.assert_array_equal(enrich(zero, clip, features, config).tokens, clip)
    normed = change(config, norm="layer")
    made = init_extra(normed)
    louder = {**features, "same": ExpertFeatures(100 * features["same"].patches + 3)}
    found = [enrich(made, clip, given, normed).tokens for given in (features, louder)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)
    assert "norm" in made["experts"]["same"]


def test_padded_rows_and_rows_without_a_caption_are_left_out(config, params, module, features, pixels):
    outputs = forward(module, params, pixels, features, config, jax.random.key(0))
    _, metrics = objective(params["method"], outputs, features, BATCH, config)
    spoilt = jax.tree.map(lambda x: x.at[3].set(jnp.nan), outputs)
    _, same = objective(params["method"], spoilt, features, BATCH, config)
    fewer = jax.tree.map(lambda x: x[:3], (outputs, BATCH))
    _, alone = objective(params["method"], fewer[0], features, fewer[1], config)
    for name, value in metrics.items():
        np.testing.assert_allclose([same[name], alone[name]], value, rtol=1e-5, err_msg=name)
    captioned = jax.tree.map(lambda x: x[:2], (outputs, BATCH))
    _, two = objective(params["method"], captioned[0], features, captioned[1], config)
    np.testing.assert_allclose(two["loss/text"], metrics["loss/text"], rtol=1e-5)
    loss, none = objective(params["method"], outputs, features, {**BATCH, "mask": BATCH["mask"] & False}, config)
    assert float(loss) == 0 and all(np.isfinite(value) for value in none.values())


def test_metrics_and_the_method_without_text(config, params, module, features, pixels):
    outputs = forward(module, params, pixels, features, config, jax.random.key(0))
    loss, metrics = objective(params["method"], outputs, features, BATCH, config)
    names = {"small", "same", "depth"}
    expected = {"loss/total", "loss/text", "loss/aux", "gate/entropy"}
    assert set(metrics) == expected | {f"gate/{n}" for n in names} | {f"gate/share/{n}" for n in names}
    assert all(value.shape == () for value in metrics.values()) and float(metrics["loss/total"]) == float(loss)
    silent = change(config, text_weight=0.0)
    assert tove.vocabulary(silent, ["a a"]) is None
    assert "caption_head" not in jax.eval_shape(lambda key: tove.init_extra(silent, CARDS, 16, key), jax.random.key(0))
    loss, metrics = objective(params["method"], outputs, features, {"mask": BATCH["mask"]}, silent)
    np.testing.assert_allclose(loss, 0.01 * metrics["loss/aux"], rtol=1e-6)
    assert tove.vocabulary(config, ["a b a", "b"]).words == ("a", "b")


def test_the_same_on_eight_devices(config, params, module, features, pixels):
    rows = 2 * ROWS
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), (BATCH, features, pixels))
    noisy = change(config, noise=True)

    def loss(params, batch, key):
        given, features, pixels = batch
        outputs = tove.forward(module, params, pixels, features, noisy, key)
        return tove.objective(params["method"], outputs, features, given, noisy)

    step = jax.value_and_grad(loss, has_aux=True)
    key = jax.random.key(5)
    (_, one), slope = jax.jit(step)(params, batch, key)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.size == 8 and rows % 4 == 0
    with jax.set_mesh(mesh):
        flat = {path: leaf for path, leaf in flatten(params).items()}
        specs = logical_specs(flat, logical_axes(noisy), "logical axes")
        placed = jax.device_put(flat, tree_shardings(flat, specs, mesh))
        nested = jax.tree.unflatten(jax.tree.structure(params), [placed[p] for p in _paths(params)])
        assert len(placed["method/second/kernel"].sharding.device_set) == 8
        (_, eight), other = jax.jit(step)(nested, shard_batch(batch, mesh), key)
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), slope["method"], other["method"])


def _paths(tree):
    return ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_bad_settings_are_named(config):
    def init(config, cards=CARDS):
        return tove.init_extra(config, cards, 16, jax.random.key(0))

    with pytest.raises(InputError, match="attached: 'smal' is not in .*did you mean 'small'"):
        tove.deployed_experts(attach(config, "smal"))
    with pytest.raises(InputError, match="map_experts: 'edges' is not in"):
        init(change(config, map_experts=("edges",)))
    with pytest.raises(InputError, match="map of 1 to 3 channels from 'same', found 7"):
        init(change(config, map_experts=("same",)))
    adapted = dataclasses.replace(config.student, adapter=AdapterConfig())
    with pytest.raises(InputError, match="expected 'none', found 'mole'"):
        init(dataclasses.replace(config, student=adapted))
    moving = dataclasses.replace(config.optim, groups=((".*", 1.0),))
    with pytest.raises(InputError, match="ToVE's CLIP is frozen"):
        init(dataclasses.replace(config, optim=moving))


def test_every_method_has_the_whole_contract():
    functions = ("init_extra", "forward", "objective", "tokens", "training_experts", "deployed_experts", "vocabulary")
    for name, module in methods.METHODS.items():
        assert [f for f in (*functions, "LOGICAL_AXES") if not hasattr(module, f)] == [], name


def test_presets(config):
    presets = BY_METHOD["tove"]
    assert presets["paper"].method == ToVEConfig() and presets["recommended"].method.norm == "layer"
    for preset in presets.values():
        assert preset.adapter.kind == "none"


def test_the_page_has_every_field_with_its_default():
    text = (Path(__file__).parents[2] / "docs/methods/tove.md").read_text()
    for name, value in dataclasses.asdict(ToVEConfig()).items():
        assert f"| `{name}` | `{value}` |" in text, name


@pytest.mark.parametrize("preset", ["paper", "recommended"])
def test_full_size_parameters(preset):
    """ViT-B/16 at 224 with five experts: the count by its formula, and every path has axes and a group."""
    config = from_file(f"{Path(__file__).parents[2]}/configs/tove_vit_b.py:preset={preset},language=none")
    shapes = {"depth": (384, 384, 1), "normals": (480, 640, 3), "edges": (352, 352, 1)}
    shapes |= {"dinov2_b": (16, 16, 768), "eva02_clip_b": (14, 14, 768)}
    cards = {name: card(name, *shape) for name, shape in shapes.items()}
    assert tuple(shapes) == config.features.names and config.student.image_size == 224
    made = jax.eval_shape(lambda key: tove.init_extra(config, cards, 196, key), jax.random.key(0))
    flat = {f"method/{path}": leaf for path, leaf in flatten(made).items()}
    count = {name: sum(math.prod(leaf.shape) for path, leaf in flat.items() if f"/{name}/" in path) for name in
             ("gate", "second", "caption_head", *shapes)}  # fmt: skip
    d = h = w = 768
    linear = d * h + h
    assert count["gate"] == d * 5 + 5 and count["second"] == linear

    def stem(channels):
        widths = [channels, w // 8, w // 4, w // 2, w]
        convolutions = sum(9 * a * b + 2 * b for a, b in zip(widths[:-1], widths[1:], strict=True))
        return convolutions + w * w + w

    norm = 2 * 768 if preset == "recommended" else 0
    for name, (_, _, channels) in shapes.items():
        assert count[name] == linear + norm + (stem(channels) if channels <= 3 else 0), name
    words = config.method.vocabulary
    assert count["caption_head"] == d + 2 * d + d * words + words
    hub = 5 * (linear + norm) + 2 * stem(1) + stem(3)
    expected = (d * 5 + 5) + linear + hub
    assert (
        sum(count.values()) - count["caption_head"]
        == expected
        == {"paper": 15_783_077, "recommended": 15_790_757}[preset]
    )
    logical_specs(flat, logical_axes(config), "logical axes")
    first_match(config.optim.groups, flat, "groups")
    given = {name: ExpertFeatures(jax.ShapeDtypeStruct((1, *shape), jnp.float32)) for name, shape in shapes.items()}
    clip = jax.ShapeDtypeStruct((1, 196, 768), jnp.float32)

    def cost(config):
        lowered = jax.jit(lambda p, t, f: tove.enrich(p, t, f, config).tokens).lower(made, clip, given)
        return lowered.cost_analysis()["flops"]

    np.testing.assert_allclose(cost(config), 12.2e9, rtol=0.02)
    np.testing.assert_allclose(cost(attach(config, "dinov2_b", "eva02_clip_b")), 0.73e9, rtol=0.02)
