"""What the language models' tests share: tiny configurations, weights drawn by a rule, transformers' models of them."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np

VOCABULARY = 23
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 4, "rope_theta": 10000.0},
    "llama3": {"model_type": "llama", **SMALL, "rope_theta": 5000.0, "rope_scaling": LLAMA3, "attention_bias": True,
               "mlp_bias": True, "tie_word_embeddings": True},
    "linear": {"model_type": "llama", **SMALL, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "dynamic": {"model_type": "llama", **SMALL, "max_position_embeddings": 6,
                "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "mistral": {"model_type": "mistral", **SMALL, "sliding_window": 4, "head_dim": 8},
    "qwen2": {"model_type": "qwen2", **SMALL, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 3,
              "max_window_layers": 1, "tie_word_embeddings": True, "rope_theta": 1000000.0},
}  # fmt: skip


def names_and_shapes(config):
    """Published names and shapes of a configuration, written down apart from `tove_jax.hf.llama`."""
    width, vocabulary, mlp = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    rows = {"q": config["num_attention_heads"] * head, "k": config["num_key_value_heads"] * head}
    rows["v"] = rows["k"]
    biased = config["model_type"] == "qwen2" or config.get("attention_bias")
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, width)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, size in rows.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (size, width)
            if biased:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (size,)
        shapes[layer + "self_attn.o_proj.weight"] = (width, rows["q"])
        if config.get("attention_bias"):
            shapes[layer + "self_attn.o_proj.bias"] = (width,)
        for name, shape in (("gate", (mlp, width)), ("up", (mlp, width)), ("down", (width, mlp))):
            shapes[f"{layer}mlp.{name}_proj.weight"] = shape
            if config.get("mlp_bias"):
                shapes[f"{layer}mlp.{name}_proj.bias"] = shape[:1]
        shapes[layer + "input_layernorm.weight"] = shapes[layer + "post_attention_layernorm.weight"] = (width,)
    return shapes


def draw(config, scale=2.0):
    """Draws weights: the i-th name in sorted order from ``RandomState(i)``; large enough that answers differ."""
    shapes, weights = names_and_shapes(config), {}
    for number, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        drawn = np.random.RandomState(number).standard_normal(shape)
        if name.endswith("norm.weight"):
            drawn = 1 + 0.1 * drawn
        elif len(shape) > 1:
            drawn = drawn * scale / np.sqrt(shape[1])
        else:
            drawn = 0.3 * drawn
        weights[name] = drawn.astype(np.float32)
    return weights


def write_folder(folder, config, weights, shard_bytes=None):
    """Writes a folder by the safetensors library itself, in shards where a size is given."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards, filled = [{}], 0
    for name, array in weights.items():
        if shard_bytes and filled and filled + array.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def reference(config, weights, **options):
    """transformers' model with these weights."""
    import torch
    import transformers

    fields = {k: v for k, v in config.items() if k != "model_type"}
    with contextlib.redirect_stderr(io.StringIO()):
        settings = transformers.AutoConfig.for_model(config["model_type"], **fields, **options)
        model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    state = {name: torch.tensor(array) for name, array in weights.items()}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model
