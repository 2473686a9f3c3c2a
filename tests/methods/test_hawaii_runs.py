"""HAWAII in a run: its start, devices, dropout, cost, full size, dtypes, and contracts that are refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.hawaii_cases import (
    CARDS,
    HAS_PICTURE,
    MASK,
    ROWS,
    TEXT,
    WIDTH,
    card,
    draw,
    evaluate,
    loss_of,
    make_config,
    objective_case,
)
from tove_jax.config import door
from tove_jax.config.schema import (
    AdapterConfig,
    FeaturesConfig,
    HawaiiConfig,
    MeshConfig,
)
from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertFeatures
from tove_jax.methods import get, hawaii, move_kd
from tove_jax.methods.presets import HAWAII_PRESETS
from tove_jax.models import vit
from tove_jax.parallel import logical_specs, make_mesh, shard_batch, tree_shardings
from tove_jax.train.objective import logical_axes
from tove_jax.train.state import flatten, parameter_factors


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
    assert heads["text"]["hidden"]["kernel"].shape == (config.language.width, 1024) == (4096, 1024)

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
    assert heads["text"]["hidden"]["kernel"].shape == (config.language.width, 1024) == (4096, 1024)
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
