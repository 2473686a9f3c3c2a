"""Small cases of MoVE-KD that its tests share: settings, features, cards."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.config.schema import AdapterConfig, Config, FeaturesConfig, MoveKDConfig, StudentConfig
from tove_jax.data.view import View
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.methods import move_kd

WIDTH, TOKENS, LAYERS, LORAS = 8, 9, 3, 3


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
