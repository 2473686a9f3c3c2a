"""The tables for CLIP's vision tower and for the LoRA experts in it.

Canonical published names are those of `transformers.CLIPVisionModel` (release 5: no prefix), with MoLE's
experts named as in MoVE-KD's released adapter file and MoLA's alike (ours; HAWAII released none). `canonical` brings every other spelling to them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from tove_jax.adapters import mola
from tove_jax.config.schema import StudentConfig
from tove_jax.errors import InputError
from tove_jax.hf.rules import Rule

Array = TypeVar("Array")
_LAYER = "encoder.layers.{layer}."
_MATRIX = (0, 2, 1)  # (layer, out, in) -> (layer, in, out)


def _linear(name: str, path: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{_LAYER}{name}.weight", f"layers/{path}/kernel", _MATRIX),
        Rule(f"{_LAYER}{name}.bias", f"layers/{path}/bias"),
    )


def _norm(name: str, path: str) -> tuple[Rule, Rule]:
    return Rule(f"{name}.weight", f"{path}/scale"), Rule(f"{name}.bias", f"{path}/bias")


def _experts(published: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{published}.lora_A.weight", f"{ours}/a_kernel", (0, 3, 1, 2)),  # (L, E, r, in) -> (L, in, E, r)
        Rule(f"{published}.lora_A.bias", f"{ours}/a_bias"),
        Rule(f"{published}.lora_B.weight", f"{ours}/b_kernel", (0, 1, 3, 2)),  # (L, E, out, r) -> (L, E, r, out)
        Rule(f"{published}.lora_B.bias", f"{ours}/b_bias"),
    )


def _mole(name: str, path: str) -> tuple[Rule, ...]:
    return _experts(f"{_LAYER}mlp.{name}.{{expert}}", f"layers/mlp/adapter/{path}")


def _mola(group: str) -> tuple[Rule, ...]:
    found = [*_linear(f"mlp.router_{group}.0", f"mlp/adapter/router_{group}/hidden")]
    found += _linear(f"mlp.router_{group}.2", f"mlp/adapter/router_{group}/out")
    for site in ("down", "up", "ffn"):
        published, ours = f"{_LAYER}mlp.mola_{group}_{site}.{{expert}}", f"layers/mlp/adapter/{group}_{site}"
        found += [rule for rule in _experts(published, ours) if not rule.path.endswith("_bias")]
        found.append(Rule(f"{published}.lora_magnitude", f"{ours}/magnitude"))
    return tuple(found)


TOWER_RULES: tuple[Rule, ...] = (
    Rule("embeddings.class_embedding", "class_embed"),
    Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", (2, 3, 1, 0)),  # OIHW -> HWIO
    Rule("embeddings.position_embedding.weight", "position_embed"),
    *_norm("pre_layrnorm", "pre_norm"),  # the published name has this spelling
    *_norm("post_layernorm", "post_norm"),
    *_norm(f"{_LAYER}layer_norm1", "layers/norm1"),
    *_norm(f"{_LAYER}layer_norm2", "layers/norm2"),
    *_linear("self_attn.q_proj", "attention/query"),
    *_linear("self_attn.k_proj", "attention/key"),
    *_linear("self_attn.v_proj", "attention/value"),
    *_linear("self_attn.out_proj", "attention/out"),
    *_linear("mlp.fc1", "mlp/fc1"),
    *_linear("mlp.fc2", "mlp/fc2"),
)
ADAPTER_RULES: tuple[Rule, ...] = (
    *_linear("mlp.router", "mlp/adapter/router"),
    *_mole("moe_down", "down"),
    *_mole("moe_up", "up"),
    *_mole("moe_ffn", "ffn"),
    *_mola("teacher"),
    *_mola("general"),
)
RULES = TOWER_RULES + ADAPTER_RULES

# What a CLIP checkpoint holds beside the vision tower, and buffers of older releases.
IGNORE = (
    r"(.*\.)?text_model\..*",
    r"(.*\.)?(visual|text)_projection(\.weight)?",
    r"(.*\.)?logit_scale",
    r"(.*\.)?embeddings\.position_ids",
)


def shapes(student: StudentConfig) -> dict[str, tuple[int, ...]]:
    """Returns every path of the student's parameter tree with its shape.

    Raises:
      InputError: a patch larger than the image, or heads that do not divide the width.
    """
    size, patch, width = student.image_size, student.patch_size, student.width
    layers, hidden = student.layers, student.mlp_width
    if not 0 < patch <= size:
        raise InputError(f"student.patch_size: {patch} does not fit student.image_size {size}")
    if student.heads < 1 or width % student.heads:
        raise InputError(f"student.width: {width} is not a multiple of student.heads {student.heads}")
    result: dict[str, tuple[int, ...]] = {
        "patch_embed/kernel": (patch, patch, 3, width),
        "class_embed": (width,),
        "position_embed": (1 + (size // patch) ** 2, width),
    }
    for norm, lead in (("pre_norm", ()), ("post_norm", ()), ("layers/norm1", (layers,)), ("layers/norm2", (layers,))):
        result |= {f"{norm}/scale": (*lead, width), f"{norm}/bias": (*lead, width)}

    def linear(path: str, inputs: int, outputs: int) -> None:
        result[f"layers/{path}/kernel"] = (layers, inputs, outputs)
        result[f"layers/{path}/bias"] = (layers, outputs)

    for part in ("query", "key", "value", "out"):
        linear(f"attention/{part}", width, width)
    linear("mlp/fc1", width, hidden)
    linear("mlp/fc2", hidden, width)
    adapter = student.adapter
    if adapter.kind == "none":
        return result
    sites = {"ffn": (width, width)} if adapter.site == "ffn" else {"down": (width, hidden), "up": (hidden, width)}

    def experts(path: str, count: int, inputs: int, outputs: int) -> None:
        result[f"{path}/a_kernel"] = (layers, inputs, count, adapter.rank)
        result[f"{path}/b_kernel"] = (layers, count, adapter.rank, outputs)

    if adapter.kind == "mole":
        linear("mlp/adapter/router", width, adapter.experts)
        for site, (inputs, outputs) in sites.items():
            path = f"layers/mlp/adapter/{site}"
            experts(path, adapter.experts, inputs, outputs)
            result[f"{path}/a_bias"] = (layers, adapter.experts, adapter.rank)
            result[f"{path}/b_bias"] = (layers, adapter.experts, outputs)
        return result
    mola.check(adapter)
    for group, count in zip(mola.GROUPS, (adapter.teacher_experts, adapter.general_experts), strict=True):
        if not count:
            continue
        linear(f"mlp/adapter/router_{group}/hidden", width, adapter.router_width)
        linear(f"mlp/adapter/router_{group}/out", adapter.router_width, count)
        for site, (inputs, outputs) in sites.items():
            path = f"layers/mlp/adapter/{group}_{site}"
            experts(path, count, inputs, outputs)
            if adapter.dora:
                result[f"{path}/magnitude"] = (layers, count, outputs)
    return result


def canonical(arrays: Mapping[str, Array], source: str = "arrays") -> dict[str, Array]:
    """Brings the names of a CLIP vision tower to their canonical spelling.

    Whatever stands before ``encoder.layers.`` (``vision_model.``, ``model.vision_tower.vision_model.``, ...)
    is taken off, and ``mlp.original_module.fc1`` becomes ``mlp.fc1``. Names without that prefix stay, for
    the caller to ignore or refuse.

    Args:
      arrays: published name to array, or to what tells of one.
      source: what they came from, for messages.

    Returns:
      The same arrays under new names.

    Raises:
      InputError: no vision tower, or several, or two spellings of one name.
    """
    prefixes = set()
    for name in arrays:
        match = re.match(r"(|.*\.)encoder\.layers\.\d+\.", name)
        if match and "text_model." not in match[1]:
            prefixes.add(match[1])
    if len(prefixes) != 1:
        found = f"several: {', '.join(map(repr, sorted(prefixes)))}" if prefixes else "none"
        some = ", ".join(sorted(arrays)[:4])
        raise InputError(
            f"{source}: expected one vision tower (names with encoder.layers.0.), found {found}; "
            f"it holds {len(arrays)} arrays: {some}{', ...' if len(arrays) > 4 else ''}"
        )
    prefix = prefixes.pop()
    renamed: dict[str, Array] = {}
    for name, array in arrays.items():
        new = name.removeprefix(prefix).replace(".mlp.original_module.", ".mlp.")
        if new in renamed:
            raise InputError(f"{source}: two arrays are called {new!r} once prefixes are taken off")
        renamed[new] = array
    return renamed


def released(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Brings canonical names to those of MoVE-KD's released adapter file (``mole_encoder.bin``)."""
    return {re.sub(r"\.mlp\.(fc[12])\.", r".mlp.original_module.\1.", name): a for name, a in arrays.items()}


def adapter_fields(arrays: Mapping[str, np.ndarray], source: str = "arrays") -> dict[str, Any]:
    """Reads the number of MoLE's experts, rank and site from canonical names and shapes.

    Returns:
      Fields of `tove_jax.config.schema.AdapterConfig` that the arrays tell; ``{"kind": "none"}`` where
      there are no experts.

    Raises:
      InputError: a router without experts or the reverse.
    """
    pattern = re.compile(r"encoder\.layers\.0\.mlp\.moe_(down|up|ffn)\.(\d+)\.lora_A\.weight")
    found = [(match[1], int(match[2]), a) for n, a in arrays.items() if (match := pattern.fullmatch(n))]
    router = arrays.get("encoder.layers.0.mlp.router.weight")
    if not found and router is None:
        return {"kind": "none"}
    if not found or router is None:
        absent = "router.weight" if router is None else "moe_down.0.lora_A.weight"
        raise InputError(f"{source}: array encoder.layers.0.mlp.{absent} is missing")
    return {
        "kind": "mole",
        "experts": 1 + max(expert for _, expert, _ in found),
        "rank": found[0][2].shape[0],
        "site": "ffn" if found[0][0] == "ffn" else "linears",
    }


def without_adapter(student: StudentConfig) -> StudentConfig:
    """Returns the same student as a plain CLIP tower."""
    return dataclasses.replace(student, adapter=dataclasses.replace(student.adapter, kind="none"))
