"""Merging: the distance, what trains, the fold into a plain tower, and the properties of its specification."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax import methods
from tove_jax.config.derive import MERGE_GROUPS
from tove_jax.config.schema import (
    AdapterConfig,
    Config,
    FeaturesConfig,
    HawaiiConfig,
    MergeConfig,
    MeshConfig,
    MoveKDConfig,
    StudentConfig,
    ToVEConfig,
)
from tove_jax.data.view import View
from tove_jax.data.vocabulary import Vocabulary
from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.hf import clip
from tove_jax.methods import merge, move_kd, tove
from tove_jax.methods.merge import fold, merge_loss
from tove_jax.models import vit
from tove_jax.parallel import first_match, logical_specs, make_mesh, shard_batch, tree_shardings
from tove_jax.train.objective import logical_axes
from tove_jax.train.state import flatten, unflatten

ROWS, WIDTH, LAYERS = 4, 8, 3
MOLE = AdapterConfig(rank=2, experts=2)
MOLA = AdapterConfig(kind="mola", rank=2, teacher_experts=2, general_experts=2, router_width=4)
KINDS = {
    "move_kd": (MoveKDConfig(), MOLE),
    "hawaii": (HawaiiConfig(), MOLA),
    "tove": (ToVEConfig(hidden=6, vocabulary=5, gate_init="linear"), AdapterConfig(kind="none")),
}
CARDS = {
    name: ExpertCard(
        name=name, view=View(8), grid=(3, 3), width=5, backend="jax",
        **dict.fromkeys(("title", "paper", "weights", "licence"), "none"),
    )
    for name in ("one", "two")
}  # fmt: skip
PIXELS = jax.random.normal(jax.random.key(7), (ROWS, 8, 8, 3))
FEATURES = {
    name: ExpertFeatures(jax.random.normal(jax.random.key(k), (ROWS, 3, 3, 5))) for k, name in enumerate(("one", "two"))
}
BATCH = {
    "mask": jnp.array([True, True, True, False]),
    "captions": jnp.array([[0, 2], [1, 0], [0, 0], [3, 4]]),
    "caption_mask": jnp.array([[True, True], [True, False], [False, False], [True, True]]),
}


def settings(kind="move_kd", feature="layers/-2", **changes):
    method, adapter = KINDS[kind]
    return Config(
        student=StudentConfig(
            image_size=8, patch_size=2, width=WIDTH, layers=LAYERS, heads=2, mlp_width=12, feature=feature,
            adapter=AdapterConfig(kind="none"),
        ),
        method=MergeConfig(source="run", source_method=method, source_adapter=adapter, **changes),
        features=FeaturesConfig(experts=("one", "two")),
    )  # fmt: skip


CACHE = {}


def source_of(kind):
    """A source's parameters, every leaf moved from where it was drawn, and its start."""
    if kind not in CACHE:
        config = merge.source_config(settings(kind))
        module = vit.from_config(config.student)
        student = jax.jit(module.init)(jax.random.key(1), PIXELS)["params"]
        start = merge.plain_tower(student)
        extra = tove.init_extra(config, CARDS, 16, jax.random.key(2)) if kind == "tove" else {"one": jnp.ones(3)}

        def moved(tree, seed):
            flat = flatten(tree)
            keys = jax.random.split(jax.random.key(seed), len(flat))
            return unflatten(
                {p: x + 0.1 * jax.random.normal(k, x.shape) for k, (p, x) in zip(list(keys), flat.items(), strict=True)}
            )

        CACHE[kind] = {"student": moved(student, 3), "method": moved(extra, 4)}, start
    return CACHE[kind]


def begun(config):
    source, start = source_of(config.method.source_method.name)
    return merge.initial(config, source, start, jax.random.key(5))


def forward(config, params):
    return merge.forward(vit.from_config(config.student), params, PIXELS, FEATURES, config, jax.random.key(0))


def loss_of(config, params):
    return merge.objective({}, forward(config, params), FEATURES, BATCH, config)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("kind", ["mse", "cosine", "cosine_smooth_l1"])
def test_property_10_the_loss_is_zero_when_the_student_returns_the_target(kind):
    target = draw(ROWS, 16, WIDTH)
    other = target + 0.3 * draw(ROWS, 16, WIDTH, seed=4)
    np.testing.assert_allclose(merge_loss(target, target, kind), 0, atol=1e-6)
    assert float(merge_loss(other, target, kind)) > 1e-3
    slopes = jax.grad(lambda s, t: merge_loss(s, t, kind), argnums=(0, 1))(other, target)
    assert np.any(slopes[0]) and not np.any(slopes[1])
    rows = jnp.array([True, False, True, False])
    np.testing.assert_allclose(
        merge_loss(other.at[1].set(9.0), target, kind, rows), merge_loss(other[::2], target[::2], kind), rtol=1e-5
    )


def test_merge_losses_by_their_definitions():
    target = draw(ROWS, 16, WIDTH)
    s, t = (np.asarray(x, np.float64) for x in (target + 0.3 * draw(ROWS, 16, WIDTH, seed=4), target))
    cosine = 1 - (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    gap = np.abs(s - t)
    smooth = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean(-1)
    expected = {
        "mse": (gap**2).mean(),
        "cosine": cosine.mean(),
        "cosine_smooth_l1": (0.9 * cosine + 0.1 * smooth).mean(),
    }
    for kind, value in expected.items():
        np.testing.assert_allclose(merge_loss(jnp.asarray(s, jnp.float32), target, kind), value, rtol=1e-5)
    with pytest.raises(InputError, match="found 'l1'"):
        merge_loss(target, target, "l1")


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_the_deployed_source(kind):
    config = settings(kind)
    source, _ = source_of(kind)
    own = merge.source_config(config)
    module = vit.from_config(own.student)
    expected = methods.get(kind).tokens(module, source, PIXELS, FEATURES, own)
    found = forward(config, begun(config))
    np.testing.assert_array_equal(found["target"], expected)
    assert merge.training_experts(config) == (("one", "two") if kind == "tove" else ())
    assert merge.deployed_experts(config) == ()
    plain = vit.encode(vit.from_config(config.student), merge.plain_tower(source["student"]), PIXELS, ("layers/-2",))
    np.testing.assert_array_equal(found["tokens"], plain["layers/-2"][:, 1:])
    assert not np.allclose(found["tokens"], found["target"], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"blocks": 1}, {"lora_rank": 2}], ids=["all", "last", "lora"])
def test_gradients_reach_the_student_alone_and_each_of_its_leaves(kind, changes):
    config = settings(kind, **changes)
    params = begun(config)
    if changes.get("lora_rank"):  # Beside B = 0 the gradient of A is zero.
        params["student"] = jax.tree.map(lambda x: x + 0.1, params["student"])
    slopes = flatten(jax.jit(jax.grad(lambda p: loss_of(config, p)[0]))(params))
    # Softmax does not see a constant added to all scores of a row.
    exact = {path for path in slopes if path.startswith("student/") and "key/bias" not in path}
    for path, slope in slopes.items():
        assert bool(np.any(slope)) == (path in exact) or "key/bias" in path, path
    first_match(MERGE_GROUPS, flatten(params), "groups")
    logical_specs(flatten(params), logical_axes(config), "logical axes")


@pytest.mark.parametrize("feature,blocks,expected", [
    ("layers/-2", 0, (0, 2)), ("layers/-2", 1, (1, 2)), ("layers/1", 2, (0, 2)), ("layers/-1", 2, (1, 3)),
])  # fmt: skip
def test_blocks_are_counted_up_to_the_feature_and_the_others_stay(feature, blocks, expected):
    config = settings(feature=feature, blocks=blocks)
    assert merge.trained_blocks(config) == expected
    params = begun(config)
    student = jax.tree.map(lambda x: x + 1.0, params["student"])
    first, stop = expected
    base = flatten(merge.plain_tower(params["teacher"]["student"]))
    for path, leaf in flatten(fold({**params, "student": student}, config)).items():
        change = np.asarray(leaf) - np.asarray(base[path])
        if path.startswith("layers/"):
            assert np.all(change[first:stop] != 0)
            np.testing.assert_array_equal(
                np.delete(leaf, range(first, stop), 0), np.delete(base[path], range(first, stop), 0)
            )
        else:
            assert np.any(change) == (not blocks and not path.startswith("post_norm"))


def test_the_last_blocks_learn_the_same_for_less():
    def step(config):
        params = begun(config)
        function = jax.jit(jax.grad(lambda s: loss_of(config, {**params, "student": s})[0]))
        lowered = function.lower(params["student"])
        return flatten(lowered.compile()(params["student"])), lowered.cost_analysis()["flops"]

    (whole, dear), (part, cheap) = step(settings(feature="layers/-1")), step(settings(feature="layers/-1", blocks=1))
    assert set(part) == {path for path in whole if path.startswith("layers/")}
    for path, slope in part.items():
        np.testing.assert_allclose(slope, whole[path][2:], rtol=1e-4, atol=1e-6)
    # Of 2 x 3 blocks forward and 2 x 3 backward, 2 x 2 backward are not computed.
    np.testing.assert_allclose(cheap / dear, 8 / 12, atol=0.06)


def test_low_rank_updates_begin_at_nothing_and_end_up_in_the_kernels():
    config = settings(lora_rank=2, blocks=1)
    params = begun(config)
    tower = merge.plain_tower(params["teacher"]["student"])
    jax.tree.map(np.testing.assert_array_equal, fold(params, config), tower)
    student = jax.tree.map(lambda x: x + 0.5, params["student"])
    found = flatten(fold({**params, "student": student}, config))
    kernels = {path for path in found if path.startswith("layers/") and path.endswith("kernel")}
    assert len(kernels) == 6
    for path, before in flatten(tower).items():
        expected = np.array(before)
        if path in kernels:
            pair = (
                flatten(student)[path.replace("kernel", "a_kernel")],
                flatten(student)[path.replace("kernel", "b_kernel")],
            )
            expected[1] += np.asarray(pair[0][0]) @ np.asarray(pair[1][0])
        np.testing.assert_allclose(found[path], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"blocks": 1}, {"lora_rank": 2}, {"begin": "start"}])
def test_property_8_the_merged_tower_has_the_tree_and_the_cost_of_plain_clip(changes):
    config = settings("hawaii", **changes)
    tree = fold(begun(config), config)
    assert {path: leaf.shape for path, leaf in flatten(tree).items()} == clip.shapes(config.student)
    module = vit.from_config(config.student)
    plain = jax.eval_shape(module.init, jax.random.key(0), PIXELS)["params"]

    def cost(function, params):
        return jax.jit(function).lower(params, PIXELS).cost_analysis()["flops"]

    ours = cost(lambda p, x: merge.tokens(module, {"student": p}, x, {}, config), tree)
    assert ours == cost(lambda p, x: vit.encode(module, p, x, ("layers/-2",))["layers/-2"][:, 1:], plain)


def test_training_may_begin_at_the_start():
    config = settings(begin="start")
    _, start = source_of("move_kd")
    found = begun(config)["student"]
    np.testing.assert_array_equal(found["class_embed"], start["class_embed"])
    np.testing.assert_array_equal(found["layers"]["mlp"]["fc1"]["kernel"], start["layers"]["mlp"]["fc1"]["kernel"][:2])


def test_only_what_the_target_needs_is_kept():
    assert set(begun(settings("move_kd"))["teacher"]) == {"student"}
    source, _ = source_of("tove")
    assert set(source["method"]) == {"gate", "second", "experts", "caption_head"}
    assert set(begun(settings("tove"))["teacher"]["method"]) == {"gate", "second", "experts"}
    assert "caption_head" in begun(settings("tove", text_weight=1.0))["teacher"]["method"]
    alone = dataclasses.replace(KINDS["tove"][0], attach_all=False, attached=())
    config = settings("tove")
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, source_method=alone))
    params = begun(config)
    assert set(params["teacher"]) == {"student"} and merge.training_experts(config) == ()
    found = forward(config, params)
    np.testing.assert_array_equal(found["target"], found["tokens"])


def test_the_text_loss_is_that_of_the_sources_own_head(tmp_path):
    config = settings("tove", text_weight=0.5)
    params = begun(config)
    loss, metrics = loss_of(config, params)
    assert set(metrics) == {"loss/total", "loss/merge", "loss/text", "merge/error"}
    np.testing.assert_allclose(loss, metrics["loss/merge"] + 0.5 * metrics["loss/text"], rtol=1e-6)
    outputs = forward(config, params)
    head = source_of("tove")[0]["method"]
    losses, told = tove.text_losses(head, outputs["tokens"], BATCH["captions"], BATCH["caption_mask"])
    np.testing.assert_allclose(metrics["loss/text"], np.asarray(losses)[:2].mean(), rtol=1e-6)
    Vocabulary(("a", "b"), 3).write(tmp_path)
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, source=str(tmp_path)))
    assert merge.vocabulary(config, ["other words"]) == Vocabulary(("a", "b"), 3)
    assert merge.vocabulary(settings(), ["a a"]) is None


def test_the_error_is_relative_and_padded_rows_are_left_out():
    config = settings(loss="cosine")
    outputs = forward(config, begun(config))
    loss, metrics = merge.objective({}, outputs, {}, BATCH, config)
    s, t = (np.asarray(outputs[name], np.float64)[:3] for name in ("tokens", "target"))
    expected = ((s - t) ** 2).mean() / ((t - t.mean(axis=(0, 1))) ** 2).mean()
    np.testing.assert_allclose(metrics["merge/error"], expected, rtol=1e-5)
    spoilt = jax.tree.map(lambda x: x.at[3].set(jnp.nan), outputs)
    again, _ = merge.objective({}, spoilt, {}, BATCH, config)
    assert float(again) == float(loss) == float(metrics["loss/merge"])
    none, _ = merge.objective({}, outputs, {}, {"mask": BATCH["mask"] & False}, config)
    assert float(none) == 0


def test_the_same_on_eight_devices():
    config = settings("tove", feature="layers/-1", lora_rank=2)
    params = jax.tree.map(lambda x: x + 0.01, begun(config))
    module = vit.from_config(config.student)
    batch = (PIXELS, FEATURES, BATCH)

    def step(params, batch):
        pixels, features, given = batch
        outputs = merge.forward(module, params, pixels, features, config, jax.random.key(0))
        return merge.objective({}, outputs, features, given, config)[0]

    one, slope = jax.jit(jax.value_and_grad(step))(params, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        flat = flatten(params)
        specs = logical_specs(flat, logical_axes(config), "logical axes")
        placed = unflatten(jax.device_put(flat, tree_shardings(flat, specs, mesh)))
        eight, other = jax.jit(jax.value_and_grad(step))(placed, shard_batch(batch, mesh))
    np.testing.assert_allclose(eight, one, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), slope["student"], other["student"])


def test_bad_settings_are_named():
    def init(config, kind="move_kd"):
        source, start = source_of(kind)
        merge.initial(config, source, start, jax.random.key(0))

    with pytest.raises(InputError, match="blocks: expected 0 to 2, the blocks up to layers/-2, found 3"):
        init(settings(blocks=3))
    with pytest.raises(InputError, match="feature: expected layers/<i> of 3 layers, found 'layers/3'"):
        init(settings(feature="layers/3"))
    with pytest.raises(InputError, match="begin: 'start' trains the whole tower"):
        init(settings(begin="start", blocks=1))
    with pytest.raises(InputError, match="text_weight: expected 0, the source .move_kd. has no caption head"):
        init(settings(text_weight=1.0))
    with pytest.raises(InputError, match="lora_rank: expected 0 or more, found -1"):
        init(settings(lora_rank=-1))
    config = settings()
    adapted = dataclasses.replace(config, student=dataclasses.replace(config.student, adapter=MOLE))
    with pytest.raises(InputError, match="a merged tower is plain: expected 'none', found 'mole'"):
        init(adapted)


def test_every_other_method_can_be_merged():
    assert set(merge.SOURCES) == set(methods.METHODS) - {"merge"} and merge.SOURCES["move_kd"] is move_kd


def test_the_page_has_every_field_with_its_default():
    text = (Path(__file__).parents[2] / "docs/methods/merge.md").read_text()
    for field in dataclasses.fields(MergeConfig):
        if field.default is not dataclasses.MISSING:
            assert f"| `{field.name}` | `{field.default or (field.default if field.type != 'str' else '')}` |" in text
        else:
            assert f"| `{field.name}` | that of the run |" in text
