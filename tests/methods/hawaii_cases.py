"""Small cases of HAWAII that its tests share: settings, parameters, features, batches."""

from __future__ import annotations

import jax
import numpy as np

from tove_jax.config.schema import (
    AdapterConfig,
    Config,
    FeaturesConfig,
    HawaiiConfig,
    OptimConfig,
    StudentConfig,
)
from tove_jax.data.view import View
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.methods import hawaii
from tove_jax.models import vit

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
