"""Language models of the Llama family in and out of Hugging Face folders, array by array."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tove_jax.errors import InputError, nearest
from tove_jax.files.atomic import atomic_folder, atomic_write_json
from tove_jax.files.slices import Readable, index_arrays, write_array_files
from tove_jax.hf.load import locate, read_json
from tove_jax.hf.place import pending_arrays, place_arrays
from tove_jax.hf.rules import Rule, flatten
from tove_jax.models.causal import Rope
from tove_jax.models.llama import LOGICAL_AXES, Llama, abstract_params

# transformers' defaults, which a config.json may leave out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None},
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
    },
}
_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
IGNORED = (r"(.*\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Published names that hold nothing of their own."""


def table(prefix: str = "model.", head: str = "lm_head.weight") -> tuple[Rule, ...]:
    """Returns the rules of the family, published names <-> the tree of `tove_jax.models.llama.Llama`.

    Args:
      prefix: what stands before the decoder's names; LLaVA has another.
      head: name of the head.
    """
    layer = prefix + "layers.{layer}."
    parts = {"attention/" + ours: f"self_attn.{theirs}_proj" for ours, theirs in _PROJECTIONS.items()}
    parts |= {"mlp/gate": "mlp.gate_proj", "mlp/fc1": "mlp.up_proj", "mlp/fc2": "mlp.down_proj"}
    rules = [
        Rule(prefix + "embed_tokens.weight", "token_embed"),
        Rule(prefix + "norm.weight", "norm/scale"),
        Rule(head, "head/kernel", (1, 0)),
        Rule(layer + "input_layernorm.weight", "layers/norm1/scale"),
        Rule(layer + "post_attention_layernorm.weight", "layers/norm2/scale"),
    ]
    for ours, theirs in parts.items():
        rules.append(Rule(f"{layer}{theirs}.weight", f"layers/{ours}/kernel", (0, 2, 1)))
        rules.append(Rule(f"{layer}{theirs}.bias", f"layers/{ours}/bias"))
    return tuple(rules)


_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def from_config(config: Mapping[str, Any], source: str = "config.json", **options: Any) -> Llama:
    """Builds the model that a config.json describes; nothing is read.

    Args:
      config: as transformers writes it, of any release.
      source: what it came from, for messages.
      **options: attributes of `Llama` that it does not describe: ``dtype``, ``attention``, ``remat``, ``lora_*``.

    Raises:
      InputError: another kind of model, or an option of it that is not known here.
    """
    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        raise InputError(
            f"{source}: model_type: expected {', '.join(_DEFAULTS)}, found {kind!r}{nearest(str(kind), _DEFAULTS)}"
        )
    found = _COMMON | _DEFAULTS[kind] | {k: v for k, v in config.items() if v is not None or k == "sliding_window"}
    if found["hidden_act"] != "silu":
        raise InputError(f"{source}: hidden_act: expected silu, found {found['hidden_act']!r}")
    heads, width = found["num_attention_heads"], found["hidden_size"]
    kv_heads = found["num_key_value_heads"] or heads
    head_width = found.get("head_dim") or width // heads
    for name, value in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads), ("head_dim", head_width)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{source}: {name}: expected a positive integer, found {value!r}")
    if heads % kv_heads or head_width % 2:
        raise InputError(f"{source}: {heads} heads of {head_width} channels and {kv_heads} key heads do not fit")
    biases: tuple[str, ...] = ()
    window, window_from = None, 0
    if kind == "qwen2":
        biases = ("query", "key", "value")
        if found.get("use_sliding_window"):
            window, window_from = found["sliding_window"], _window_from(found, source)
    elif kind == "mistral":
        window = found["sliding_window"]
    elif found.get("attention_bias"):
        biases = ("query", "key", "value", "out")
    return Llama(
        vocabulary=found["vocab_size"],
        width=width,
        depth=found["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=found["intermediate_size"],
        rope=_rope(found, source),
        norm_epsilon=float(found["rms_norm_eps"]),
        window=window,
        window_from=window_from,
        biases=biases,
        mlp_bias=kind == "llama" and bool(found.get("mlp_bias")),
        tied=bool(found["tie_word_embeddings"]),
        **options,
    )


def _window_from(config: Mapping[str, Any], source: str) -> int:
    kinds = config.get("layer_types")
    if kinds is None:
        return config.get("max_window_layers", 28)
    first = kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)
    expected = ["full_attention"] * first + ["sliding_attention"] * (len(kinds) - first)
    if kinds != expected or len(kinds) != config["num_hidden_layers"]:
        raise InputError(f"{source}: layer_types: expected full_attention, then sliding_attention, found {kinds}")
    return first


def _rope(config: Mapping[str, Any], source: str) -> Rope:
    # transformers 5 writes rope_parameters, earlier releases rope_scaling beside rope_theta.
    given = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(given.get("rope_theta", config["rope_theta"]))
    kind: Any = given.get("rope_type", given.get("type", "default"))
    kind = "none" if kind == "default" else kind
    if kind not in ("none", "linear", "dynamic", "llama3"):
        raise InputError(f"{source}: rotary embedding: expected default, linear, dynamic or llama3, found {kind!r}")
    if kind == "none":
        return Rope(theta)
    try:
        if kind == "llama3":
            low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
            return Rope(theta, kind, float(given["factor"]), low, high, int(given["original_max_position_embeddings"]))
        length = int(config["max_position_embeddings"]) if kind == "dynamic" else 0
        return Rope(theta, kind, float(given["factor"]), length=length)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source}: rotary embedding {kind!r}: {error} is missing or no number") from error


def to_config(module: Llama) -> dict[str, Any]:
    """Returns config.json of a model, as transformers of every release since 4.43 reads it.

    Raises:
      InputError: a mixture of options that none of Llama, Mistral and Qwen2 has.
    """
    if module.biases == ("query", "key", "value") and not module.mlp_bias:
        kind = "qwen2"
    elif module.window is not None and not module.window_from and not module.biases and not module.mlp_bias:
        kind = "mistral"
    elif module.window is None and module.biases in ((), ("query", "key", "value", "out")):
        kind = "llama"
    else:
        raise InputError("language model: transformers has no model with this window and these biases")
    rope = module.rope
    scaling: dict[str, Any] = {"rope_type": "default" if rope.scaling == "none" else rope.scaling}
    if rope.scaling != "none":
        scaling["factor"] = rope.factor
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
        scaling["original_max_position_embeddings"] = rope.length
    config: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": module.vocabulary,
        "hidden_size": module.width,
        "intermediate_size": module.mlp_width,
        "num_hidden_layers": module.depth,
        "num_attention_heads": module.heads,
        "num_key_value_heads": module.kv_heads,
        "head_dim": module.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": module.norm_epsilon,
        "tie_word_embeddings": module.tied,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "none" else scaling,
    }
    if rope.scaling == "dynamic":
        config["max_position_embeddings"] = rope.length
    if kind == "mistral":
        config["sliding_window"] = module.window
    elif kind == "qwen2":
        config["use_sliding_window"] = module.window is not None
        if module.window is not None:
            config |= {"sliding_window": module.window, "max_window_layers": module.window_from}
    else:
        config |= {"attention_bias": bool(module.biases), "mlp_bias": module.mlp_bias}
    return config


def load(
    folder_or_hub_id: str | Path, *, mesh: Mesh | None = None, store: Any = None, **options: Any
) -> tuple[Llama, dict[str, Any]]:
    """Reads a language model straight onto the devices.

    Every process reads those parts of each array that its own devices hold, one published array at a time, so
    its memory holds little more than the largest array (a token embedding, or one layer's matrix) in the stored
    dtype, whatever the model.

    Args:
      folder_or_hub_id: with config.json and safetensors, whole or in shards.
      mesh: where the parameters go, split by their logical axes; None: the first device.
      store: dtype of the parameters; None: that of the file.
      **options: see `from_config`.

    Returns:
      The model and its parameters.

    Raises:
      InputError: not such a folder; arrays that are missing, unknown or of another shape, all named.
    """
    folder = locate(folder_or_hub_id)
    module = from_config(read_json(folder / "config.json"), str(folder / "config.json"), **options)
    return module, load_params(module, index_arrays(folder), mesh=mesh, store=store, source=str(folder))


def load_params(
    module: Llama,
    arrays: Mapping[str, Readable],
    *,
    rules: Sequence[Rule] | None = None,
    mesh: Mesh | None = None,
    store: Any = None,
    source: str = "arrays",
) -> dict[str, Any]:
    """Reads a model's parameters out of indexed files; see `load`.

    Args:
      module: the model.
      arrays: every published array; `tove_jax.files.slices.index_arrays` finds them.
      rules: published names <-> tree; None: `table()`.
      mesh, store: see `load`.
      source: what the arrays came from, for messages.
    """
    rules = table() if rules is None else rules
    tree = abstract_params(module)
    unused = [re.escape(rule.name) for rule in rules if rule.path == "head/kernel" and "head" not in tree]
    return place_arrays(
        tree, arrays, rules, LOGICAL_AXES, mesh=mesh, store=store, ignore=(*IGNORED, *unused), source=source
    )


def export(
    module: Llama,
    params: Mapping[str, Any],
    folder: Path | str,
    *,
    config: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that transformers loads, whole or not at all; dtypes as in the tree.

    Arrays are fetched and written one at a time.

    Args:
      module: the model.
      params: its parameters.
      folder: target; an older one is replaced.
      config: config.json as it was read, kept but for the dtype; None: `to_config`.
      generation: generation_config.json; None: none is written.
      shard_bytes: see `tove_jax.files.slices.write_array_files`.

    Raises:
      InputError: parameters or a config that do not fit the model, a folder that cannot be written.
    """
    leaves, expected = flatten(params), flatten(abstract_params(module))
    wrong = [
        f"{path}: found {tuple(leaves[path].shape) if path in leaves else 'nothing'}, expected "
        f"{expected[path].shape if path in expected else 'nothing'}"
        for path in sorted({*leaves, *expected})
        if path not in leaves or path not in expected or tuple(leaves[path].shape) != expected[path].shape
    ]
    if wrong:
        raise InputError(f"parameters do not fit the language model: {'; '.join(wrong[:8])}")
    names = ("dtype", "attention", "remat", "lora_rank", "lora_alpha")
    options = {name: getattr(module, name) for name in names}
    content = dict(config if config is not None else to_config(module))
    if from_config(content, "config", **options) != module:
        raise InputError("config: describes another language model than the one to be exported")
    content.pop("torch_dtype", None)
    content["dtype"] = np.dtype(leaves["token_embed"].dtype).name
    with atomic_folder(folder) as temporary:
        write_array_files(temporary, pending_arrays(params, table()), shard_bytes=shard_bytes)
        atomic_write_json(temporary / "config.json", content)
        if generation is not None:
            atomic_write_json(temporary / "generation_config.json", dict(generation))


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Returns the tokens at which an answer ends, as generation_config.json or else config.json tells."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (int(found),)
    return ()
