import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.config import Config
from tove_jax.config.schema import OptimConfig, TrainConfig
from tove_jax.errors import InputError
from tove_jax.train.optimizer import make_optimizer, make_schedule
from tove_jax.train.state import TrainState, flatten, merge, parameter_factors, split
from tove_jax.train.step import make_step

OPTIM = OptimConfig(lr=0.1, warmup=0.0, groups=((".*/moving", 1.0), (".*/slow", 0.5), (".*", None)))
PARAMS = {
    "net": {
        "moving": np.ones((3, 2), np.float32),
        "slow": np.ones(2, np.float32),
        "still": np.full(3, 1 / 3, np.float32),
    }
}


def quadratic(params, batch, key):
    net = params["net"]
    y = (batch["x"] * net["still"]) @ net["moving"] + net["slow"]
    error = ((y - batch["y"]) ** 2).mean(-1)
    total = jnp.where(batch["mask"], error, 0).sum() / jnp.maximum(batch["mask"].sum(), 1)
    return total, {"loss/total": total}


def start(config, dtype=jnp.float32):
    factors = parameter_factors(config.optim, flatten(PARAMS))
    trainable, frozen = split(PARAMS, factors, dtype)
    optimizer = make_optimizer(config.optim, config.train.steps, factors)
    state = TrainState(jnp.int32(0), trainable, frozen, optimizer.init(trainable), jnp.int32(-1))
    return state, jax.jit(make_step(config, quadratic, optimizer))


def config_of(**train):
    return Config(optim=OPTIM, train=TrainConfig(steps=10, batch=8, **train))


def batch_of(seed=0, rows=8):
    rng = np.random.default_rng(seed)
    mask = np.arange(8) < rows
    return {"x": rng.normal(size=(8, 3)), "y": rng.normal(size=(8, 2)), "mask": mask} | {"record": np.arange(8)}


def test_frozen_leaves_stay_bit_identical_and_own_no_slot():
    state, step = start(config_of(), jnp.bfloat16)
    still = np.asarray(state.frozen["net/still"])
    after, _ = step(state, batch_of())
    assert set(after.trainable) == {"net/moving", "net/slow"}
    assert after.frozen["net/still"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(still, after.frozen["net/still"])
    assert all("still" not in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(after.opt_state))
    assert not np.array_equal(state.trainable["net/moving"], after.trainable["net/moving"])


def test_the_first_update_follows_adam_and_the_group_factor():
    state, step = start(config_of())
    after, metrics = step(state, batch_of())
    # Adam's first update has size lr whatever the gradient; "slow" takes half of it.
    np.testing.assert_allclose(np.abs(after.trainable["net/moving"] - 1), 0.1, rtol=1e-4)
    np.testing.assert_allclose(np.abs(after.trainable["net/slow"] - 1), 0.05, rtol=1e-4)
    grads = jax.grad(lambda t: quadratic(merge(t, state.frozen), batch_of(), None)[0])(state.trainable)
    norm = np.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    np.testing.assert_allclose(metrics["optim/gradient_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize("rows", [8, 5])
def test_accumulation_is_exact_with_padded_rows(rows):
    state, whole = start(config_of())
    _, pieces = start(config_of(accumulation=4))
    one, four = whole(state, batch_of(rows=rows)), pieces(state, batch_of(rows=rows))
    np.testing.assert_allclose(one[1]["loss/total"], four[1]["loss/total"], rtol=1e-6)
    for name in one[0].trainable:
        np.testing.assert_allclose(one[0].trainable[name], four[0].trainable[name], rtol=2e-5)


def test_nothing_moves_after_a_loss_that_is_not_finite():
    state, step = start(config_of())
    state, _ = step(state, batch_of())
    bad = batch_of()
    bad["x"][2, 1] = np.nan
    stopped, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss/total"]) and int(stopped.bad_step) == 1
    later, _ = step(stopped, batch_of())
    for name in state.trainable:
        np.testing.assert_array_equal(state.trainable[name], later.trainable[name])
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, later.opt_state)
    assert int(later.bad_step) == 1 and int(later.step) == 1


def test_groups_are_checked():
    with pytest.raises(InputError, match="no rule covers"):
        parameter_factors(OptimConfig(groups=(("a", 1.0),)), ["a", "b"])
    with pytest.raises(InputError, match="every parameter is frozen"):
        parameter_factors(OptimConfig(groups=((".*", None),)), ["a"])
    with pytest.raises(InputError, match="expected a number or None"):
        parameter_factors(OptimConfig(groups=((".*", "fast"),)), ["a"])


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_schedules_warm_up_and_end(shape):
    schedule = make_schedule(dataclasses.replace(OPTIM, schedule=shape, warmup=0.2), 50)
    rates = np.array([float(schedule(i)) for i in range(50)])
    np.testing.assert_allclose(rates[:10], 0.01 * np.arange(1, 11), rtol=1e-5)
    assert (np.diff(rates[10:]) <= 1e-9).all()
    assert rates[-1] == pytest.approx(0.1) if shape == "constant" else rates[-1] < 0.005


def test_weight_decay_falls_on_matrices_only():
    config = OptimConfig(lr=0.1, warmup=0.0, weight_decay=0.5, groups=((".*", 1.0),))
    params = {"a/kernel": jnp.ones(2), "a/bias": jnp.ones(2)}
    optimizer = make_optimizer(config, 10, {"a/kernel": 1.0, "a/bias": 1.0})
    updates, _ = optimizer.update({n: jnp.zeros(2) for n in params}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a/kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["a/bias"], 0)
