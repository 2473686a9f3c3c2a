"""One update is the same on one device and on meshes of eight, with and without a language model.

MoVE-KD's are in test_loop.py and test_language.py, on other meshes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.config import Config
from tove_jax.config.schema import (
    AdapterConfig,
    DataConfig,
    FeaturesConfig,
    HawaiiConfig,
    LanguageConfig,
    MeshConfig,
    OptimConfig,
    StudentConfig,
    TextConfig,
    ToVEConfig,
    TrainConfig,
)
from tove_jax.parallel import make_mesh
from tove_jax.plan.abstract import abstract_run, on_mesh
from tove_jax.train.optimizer import make_optimizer
from tove_jax.train.state import parameter_factors

LENGTH = 24
STUDENT = StudentConfig(image_size=16, patch_size=4, width=16, layers=1, heads=4, mlp_width=32, feature="layers/-1")
LANGUAGE = LanguageConfig(vocabulary=32, width=16, layers=1, heads=4, kv_heads=4, mlp_width=32, adaptor_width=8)
METHODS = {
    "hawaii": (HawaiiConfig(), AdapterConfig(kind="mola", rank=2, dropout=0.0, general_experts=2, router_width=8)),
    "tove": (
        ToVEConfig(hidden=16, stem_width=16, vocabulary=16, caption_words=4),
        AdapterConfig(kind="none"),
    ),
}
CASES = {
    ("hawaii", "none"): (1, 2, 4),
    ("tove", "none"): (4, 2, 1),
    ("hawaii", "llava"): (2, 1, 4),
    ("tove", "tove"): (4, 1, 2),
}


def config_of(method, language):
    chosen, adapter = METHODS[method]
    if method == "tove" and language != "none":
        chosen = dataclasses.replace(chosen, text_weight=0.0)
    if method == "hawaii" and language != "none":
        chosen = dataclasses.replace(chosen, instruction_width=16, instruction_tokens=4)
    groups = (*((("student/.*", None),) if method == "tove" else ()), (".*", 1.0))
    return Config(
        student=dataclasses.replace(STUDENT, adapter=adapter),
        method=chosen,
        data=DataConfig(source="folder"),
        text=TextConfig(limit=LENGTH, buckets=(LENGTH,)),
        language=dataclasses.replace(LANGUAGE, kind=language),
        features=FeaturesConfig(experts=("clip", "efficientnet_lite0:64"), codec="float32"),
        optim=OptimConfig(groups=groups, warmup=0.0, eps=1e-3),
        train=TrainConfig(steps=2, batch=8, dtype="float32", replicated_limit_mb=1e3),
    )


def filled(run, config):
    """Returns a state and a batch of plausible numbers in the shapes of a run."""
    rng = np.random.default_rng(0)
    draw = lambda shapes: {path: np.float32(0.3 * rng.normal(size=leaf.shape)) for path, leaf in shapes.items()}
    trainable, frozen = draw(run.state.trainable), draw(run.state.frozen)
    optimizer = make_optimizer(config.optim, config.train.steps, parameter_factors(config.optim, trainable))
    slots = jax.tree.map(np.asarray, optimizer.init(trainable))
    state = run.state._replace(
        step=np.int32(0), trainable=trainable, frozen=frozen, opt_state=slots, bad_step=np.int32(-1)
    )

    def fill(leaf):
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        if leaf.dtype == np.uint8:
            return rng.integers(0, 256, leaf.shape, np.uint8)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return rng.integers(0, 16, leaf.shape).astype(leaf.dtype)
        return rng.random(leaf.shape).astype(leaf.dtype)

    batch = jax.tree.map(fill, run.batch)
    batch["mask"][-1] = False  # a padded row
    if "text" in batch and config.language.kind == "llava":
        batch["text"]["input_ids"][:, 2:18] = -200
        batch["text"]["labels"][:, :18] = -100
    return state, batch


@pytest.mark.parametrize(("method", "language"), CASES)
def test_meshes_give_the_step_of_one_device(method, language):
    config = config_of(method, language)
    run = abstract_run(config)
    state, batch = filled(run, config)
    found = {}
    for sizes in ((1, 1, 1), CASES[method, language]):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        shapes = on_mesh(config, run, mesh)
        place = lambda tree, like: jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), tree, like)
        with jax.set_mesh(mesh):
            after, metrics = jax.jit(run.step)(place(state, shapes[0]), place(batch, shapes[1]), {})
        found[sizes] = jax.device_get((after.trainable, metrics))
    (one, expected), *others = found.values()
    moved = {path: np.abs(leaf - state.trainable[path]).max() for path, leaf in one.items()}
    assert np.isfinite(expected["loss/total"]) and np.median(list(moved.values())) > 1e-5
    for params, metrics in others:
        for name in ("loss/total", "optim/gradient_norm"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name
        for path, leaf in params.items():
            np.testing.assert_allclose(leaf, one[path], atol=2e-5, err_msg=path)
