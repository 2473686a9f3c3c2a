"""What the tests of RoBERTa share: tiny configurations, weights drawn by a rule, transformers' model of them."""

from __future__ import annotations

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.hf import roberta as hf
from tove_jax.hf.rules import flatten, to_tree
from tove_jax.models.roberta import abstract_params

VOCABULARY = 23
CONFIG = {
    "model_type": "roberta",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 34,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "is_decoder": True,
    "add_cross_attention": True,
}
ENCODER = {name: value for name, value in CONFIG.items() if name not in ("is_decoder", "add_cross_attention")}
PICTURES = np.random.RandomState(11).standard_normal((4, 5, 16)).astype(np.float32)
PICTURES_MASK = np.arange(5) < np.array([[5], [3], [4], [1]])


def names_and_shapes(config):
    """Published names and shapes of a configuration, written down apart from `tove_jax.hf.roberta`."""
    width, mlp, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"lm_head.bias": (vocabulary,), "lm_head.dense.weight": (width, width), "lm_head.dense.bias": (width,)}
    norms = ["lm_head.layer_norm", "roberta.embeddings.LayerNorm"]
    for name, rows in (("word", vocabulary), ("position", config["max_position_embeddings"]),
                       ("token_type", config["type_vocab_size"])):  # fmt: skip
        shapes[f"roberta.embeddings.{name}_embeddings.weight"] = (rows, width)
    for i in range(config["num_hidden_layers"]):
        layer = f"roberta.encoder.layer.{i}."
        linears = {"intermediate.dense": (mlp, width), "output.dense": (width, mlp)}
        for part in ["attention"] + ["crossattention"] * bool(config.get("add_cross_attention")):
            linears |= {f"{part}.self.{name}": (width, width) for name in ("query", "key", "value")}
            linears[f"{part}.output.dense"] = (width, width)
            norms.append(f"{layer}{part}.output.LayerNorm")
        norms.append(f"{layer}output.LayerNorm")
        for name, shape in linears.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def draw(config, scale=3.0):
    """Draws weights: the i-th name in sorted order from ``RandomState(i)``; large enough that answers differ."""
    shapes, weights = names_and_shapes(config), {}
    for number, name in enumerate(sorted(shapes)):
        drawn = np.random.RandomState(number).standard_normal(shapes[name])
        if name.lower().endswith(("layernorm.weight", "layer_norm.weight")):
            drawn = 1 + 0.1 * drawn
        elif "embeddings" in name and drawn.ndim > 1:
            drawn = (3.0 if "position" in name else 0.5) * drawn
        elif drawn.ndim > 1:
            drawn = drawn * scale / np.sqrt(drawn.shape[1])
        else:
            drawn = 0.3 * drawn
        weights[name] = drawn.astype(np.float32)
    return weights


def build(config=CONFIG, **options):
    """Our model with these weights; what is not published is drawn by jax."""
    module = hf.from_config(config, **options)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
    return module, jax.tree.map(jnp.asarray, to_tree(draw(config), hf.table(), shapes))


def reference(config=CONFIG, weights=None, **options):
    """transformers' causal model with these weights."""
    import torch
    import transformers

    fields = {name: value for name, value in config.items() if name != "model_type"}
    with contextlib.redirect_stderr(io.StringIO()):
        settings = transformers.RobertaConfig(**fields, **options)
        settings._attn_implementation = "eager"
        model = transformers.RobertaForCausalLM(settings).eval()
    state = {name: torch.tensor(array) for name, array in (weights or draw(config)).items()}
    state["lm_head.decoder.weight"] = state["roberta.embeddings.word_embeddings.weight"]
    state["lm_head.decoder.bias"] = state["lm_head.bias"]
    model.load_state_dict(state, strict=True)
    return model
