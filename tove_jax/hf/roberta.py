"""RoBERTa in and out of Hugging Face folders, as the language model that looks at pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tove_jax.errors import InputError, nearest
from tove_jax.files.atomic import atomic_folder, atomic_write_json
from tove_jax.files.slices import Held, write_array_files
from tove_jax.files.weights import read_arrays
from tove_jax.hf.load import locate, read_json
from tove_jax.hf.place import pending_arrays, place_arrays
from tove_jax.hf.rules import Rule, flatten, match_shapes, unflatten
from tove_jax.models.roberta import LOGICAL_AXES, Roberta, abstract_params
from tove_jax.parallel import logical_specs, tree_shardings

OWN = "tove_roberta"
"""``model_type`` of a folder that only `load` reads: with adaptors, or pictures of another width than the text."""

# transformers' defaults, which a config.json may leave out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",
    "add_cross_attention": False,
}
# A file may lack these as a whole: RoBERTa is published without, and without head as a bare encoder.
_FRESH = r"layers/(cross|adaptor)(_norm)?/.*|head/.*"
_IGNORED = (r".*\.position_ids", r".*\.token_type_ids", r".*pooler\.dense\..*", r"lm_head\.decoder\.(weight|bias)")


def table(prefix: str = "roberta.") -> tuple[Rule, ...]:
    """Returns the rules, published names <-> the tree of `tove_jax.models.roberta.Roberta`.

    The adaptors' names are ours; the others are transformers'.

    Args:
      prefix: what stands before the names of everything but the head.
    """
    layer = prefix + "encoder.layer.{layer}."
    embeddings = prefix + "embeddings."
    rules = [
        Rule(embeddings + "word_embeddings.weight", "token_embed"),
        Rule(embeddings + "position_embeddings.weight", "position_embed"),
        Rule(embeddings + "token_type_embeddings.weight", "type_embed"),
        Rule("lm_head.dense.weight", "head/dense/kernel", (1, 0)),
        Rule("lm_head.dense.bias", "head/dense/bias"),
        Rule("lm_head.bias", "head/bias"),
    ]
    norms = {embeddings + "LayerNorm": "embed_norm", "lm_head.layer_norm": "head/norm"}
    linears = {"adaptor.down": "adaptor/down", "adaptor.up": "adaptor/up"}
    linears |= {"intermediate.dense": "mlp/fc1", "output.dense": "mlp/fc2"}
    for theirs, ours in (("attention", "attention"), ("crossattention", "cross")):
        linears |= {f"{theirs}.self.{name}": f"{ours}/{name}" for name in ("query", "key", "value")}
        linears[f"{theirs}.output.dense"] = f"{ours}/out"
        norms[f"{layer}{theirs}.output.LayerNorm"] = f"layers/{ours}_norm"
    norms |= {f"{layer}output.LayerNorm": "layers/mlp_norm", f"{layer}adaptor.LayerNorm": "layers/adaptor_norm"}
    for theirs, ours in linears.items():
        rules.append(Rule(f"{layer}{theirs}.weight", f"layers/{ours}/kernel", (0, 2, 1)))
        rules.append(Rule(f"{layer}{theirs}.bias", f"layers/{ours}/bias"))
    for theirs, ours in norms.items():
        rules += [Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")]
    return tuple(rules)


def from_config(config: Mapping[str, Any], source: str = "config.json", **options: Any) -> Roberta:
    """Builds the model that a config.json describes; nothing is read.

    Args:
      config: of a RoBERTa, encoder or decoder, as transformers writes it; or of what `export` wrote.
      source: what it came from, for messages.
      **options: attributes of `Roberta` in place of those described: ``picture_width``, ``adaptor_width``,
        ``dtype``, ``attention``, ``remat``.

    Raises:
      InputError: another kind of model, or an option of it that is not known here.
    """
    kind = config.get("model_type")
    if kind not in ("roberta", OWN):
        raise InputError(f"{source}: model_type: expected roberta, found {kind!r}{nearest(str(kind), ('roberta',))}")
    found = _DEFAULTS | {name: value for name, value in config.items() if value is not None}
    for name, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("tie_word_embeddings", True)):
        if found[name] != only:
            raise InputError(f"{source}: {name}: expected {only!r}, found {found[name]!r}")
    width, heads = found["hidden_size"], found["num_attention_heads"]
    longest = found["max_position_embeddings"] - found["pad_token_id"] - 1
    if width % heads or longest < 1:
        raise InputError(f"{source}: width {width} and {heads} heads, or {longest} positions, do not fit")
    fields = {
        "picture_width": found.get("picture_width", width if found["add_cross_attention"] else 0),
        "adaptor_width": found.get("adaptor_width", 0),
    }
    return Roberta(
        vocabulary=found["vocab_size"],
        width=width,
        depth=found["num_hidden_layers"],
        heads=heads,
        mlp_width=found["intermediate_size"],
        longest=longest,
        position_offset=found["pad_token_id"] + 1,
        types=found["type_vocab_size"],
        norm_epsilon=float(found["layer_norm_eps"]),
        **(fields | options),
    )


def to_config(module: Roberta) -> dict[str, Any]:
    """Returns config.json of a decoder; its ``model_type`` is `OWN` where transformers has no such model."""
    config: dict[str, Any] = {
        "architectures": ["RobertaForCausalLM"],
        "model_type": "roberta",
        "vocab_size": module.vocabulary,
        "hidden_size": module.width,
        "num_hidden_layers": module.depth,
        "num_attention_heads": module.heads,
        "intermediate_size": module.mlp_width,
        "hidden_act": "gelu",
        "max_position_embeddings": module.longest + module.position_offset,
        "type_vocab_size": module.types,
        "layer_norm_eps": module.norm_epsilon,
        "pad_token_id": module.position_offset - 1,
        "tie_word_embeddings": True,
        "is_decoder": True,
        "add_cross_attention": bool(module.picture_width),
    }
    if module.adaptor_width or module.picture_width not in (0, module.width):
        config |= {"model_type": OWN, "architectures": ["Roberta"]}
        config |= {"picture_width": module.picture_width, "adaptor_width": module.adaptor_width}
    return config


class Loaded(NamedTuple):
    """A language model as read.

    Attributes:
      module: the model.
      params: its tree.
      fresh: paths of the parameters that the file lacks and that were drawn, sorted.
    """

    module: Roberta
    params: dict[str, Any]
    fresh: tuple[str, ...]


def load(
    folder_or_hub_id: str | Path,
    *,
    mesh: Mesh | None = None,
    store: Any = None,
    rng: jax.Array | None = None,
    **options: Any,
) -> Loaded:
    """Reads a published RoBERTa; cross-attention, adaptors or a head that the file lacks are drawn.

    Args:
      folder_or_hub_id: with config.json and weights: safetensors or pickled, read without running code; names
        with ``roberta.`` in front or without. The pooler of an encoder is left out.
      mesh: where the parameters go, split by their logical axes; None: the first device.
      store: dtype of the parameters; None: that of the file, and float32 of those drawn.
      rng: key of what is drawn; None: key 0.
      **options: see `from_config`.

    Raises:
      InputError: not such a folder; arrays that are missing in part, unknown or of another shape, all named.
    """
    folder = locate(folder_or_hub_id)
    module = from_config(read_json(folder / "config.json"), str(folder / "config.json"), **options)
    arrays = read_arrays(folder)
    if "lm_head.bias" not in arrays and "lm_head.decoder.bias" in arrays:
        arrays["lm_head.bias"] = arrays["lm_head.decoder.bias"]
    rules = table("roberta." if any(name.startswith("roberta.") for name in arrays) else "")
    by_path = {rule.path: rule for rule in rules}
    tree = abstract_params(module)
    leaves = flatten(tree)
    groups: dict[str, list[str]] = {}
    for path in leaves:
        if re.fullmatch(_FRESH, path):
            groups.setdefault(path.split("/")[path.startswith("layers/")].removesuffix("_norm"), []).append(path)
    fresh = {
        path
        for paths in groups.values()
        if not any(name in arrays for path in paths for name in by_path[path].names(leaves[path].shape))
        for path in paths
    }
    wanted = unflatten({path: leaf for path, leaf in leaves.items() if path not in fresh})
    # What the settings leave out on purpose may stand in the file.
    left_out = [rule.pattern.pattern for rule in rules if rule.path not in leaves]
    held = {name: Held(array) for name, array in arrays.items()}
    params = place_arrays(
        wanted,
        held,
        rules,
        LOGICAL_AXES,
        mesh=mesh,
        store=store,
        ignore=(*_IGNORED, *left_out),
        source=str(folder),
    )
    drawn = _draw(module, sorted(fresh), jax.random.key(0) if rng is None else rng, mesh, store)
    return Loaded(module, unflatten(flatten(params) | drawn), tuple(sorted(fresh)))


def _draw(module: Roberta, paths: list[str], rng: jax.Array, mesh: Mesh | None, store: Any) -> dict[str, jax.Array]:
    if not paths:
        return {}

    def init(rng: jax.Array) -> dict[str, jax.Array]:
        params: Any = module.init(rng, jnp.zeros((1, 1), jnp.int32))
        leaves = flatten(params["params"])
        return {path: leaves[path].astype(store or leaves[path].dtype) for path in paths}

    if mesh is None:
        return jax.jit(init)(rng)
    tree = abstract_params(module)
    shardings = flatten(tree_shardings(tree, logical_specs(tree, LOGICAL_AXES, "logical axes"), mesh))
    return jax.jit(init, out_shardings={path: shardings[path] for path in paths})(rng)


def export(
    module: Roberta,
    params: Mapping[str, Any],
    folder: Path | str,
    *,
    config: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    own: bool = False,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that transformers loads as `RobertaForCausalLM`, whole or not at all; dtypes as in the tree.

    Adaptors are unknown there. Those that add nothing, as they do when they are fresh, are left out; their norm
    takes the place of the norm before it, so that rows with pictures give the same logits to about the norms'
    epsilon.

    Args:
      module: the model.
      params: its parameters.
      folder: target; an older one is replaced.
      config: config.json as it was read; its fields that do not describe the model's shape are kept.
      generation: generation_config.json; None: none is written.
      own: write adaptors, and pictures of another width than the text, under a ``model_type`` of our own, which
        `load` reads and transformers refuses.
      shard_bytes: see `tove_jax.files.slices.write_array_files`.

    Raises:
      InputError: parameters that do not fit the model; a model that transformers has not, unless `own`.
    """
    leaves = flatten(params)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
    match_shapes(leaves, shapes, "parameters do not fit the language model")
    if not own:
        if module.picture_width not in (0, module.width):
            raise InputError(
                f"export: RobertaForCausalLM looks at pictures as wide as its text, {module.width}, found "
                f"{module.picture_width}; own=True writes a folder that tove_jax alone reads"
            )
        if module.adaptor_width:
            module, leaves = _without_adaptors(module, leaves)
    content = {**(config or {}), **to_config(module)}
    content.pop("torch_dtype", None)
    content["dtype"] = np.dtype(leaves["token_embed"].dtype).name
    with atomic_folder(folder) as temporary:
        write_array_files(temporary, pending_arrays(unflatten(leaves), table()), shard_bytes=shard_bytes)
        atomic_write_json(temporary / "config.json", content)
        if generation is not None:
            atomic_write_json(temporary / "generation_config.json", dict(generation))


def _without_adaptors(module: Roberta, leaves: Mapping[str, Any]) -> tuple[Roberta, dict[str, Any]]:
    """Returns the same model without adaptors, where they add nothing."""
    before = "layers/cross_norm" if module.picture_width else "layers/attention_norm"
    silent = all(not np.any(leaves[f"layers/adaptor/up/{part}"]) for part in ("kernel", "bias"))
    scale, bias = (np.asarray(leaves[f"{before}/{part}"], np.float32) for part in ("scale", "bias"))
    # A norm undoes a scale and a shift that all channels share.
    plain = bool((scale == scale[:, :1]).all() and (scale > 0).all() and (bias == bias[:, :1]).all())
    if not (silent and plain):
        raise InputError(
            "export: RobertaForCausalLM has no adaptors, and these change the text; own=True writes a folder that "
            "tove_jax alone reads"
        )
    kept = {path: leaf for path, leaf in leaves.items() if not re.match(r"layers/adaptor(_norm)?/", path)}
    kept |= {f"{before}/{part}": leaves[f"layers/adaptor_norm/{part}"] for part in ("scale", "bias")}
    return module.clone(adaptor_width=0), kept
