"""Names of a LLaVA's arrays in every spelling, and their rules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from tove_jax.errors import InputError
from tove_jax.hf import clip, llama
from tove_jax.hf.rules import Rule

_DECODER = r"(?=(?:embed_tokens|layers|norm)\.)"
_SPELLINGS = (
    ("tower", re.compile(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?")),
    ("projector", re.compile(r"(?:model\.)?(?:multi_modal_projector|mm_projector)\.")),
    ("newline", re.compile(r"(?:model\.)?image_newline$")),
    ("head", re.compile(r"(?:model\.|language_model\.)?lm_head\.weight$")),
    ("decoder", re.compile(rf"(?:model\.)?language_model\.(?:model\.)?{_DECODER}|model\.{_DECODER}")),
)
TRANSFORMERS = {
    "tower": "vision_tower.vision_model.",
    "projector": "multi_modal_projector.",
    "newline": "image_newline",
    "head": "language_model.lm_head.weight",
    "decoder": "language_model.model.",
}
"""How the names of each part begin in transformers' layout: the spelling that every release reads."""
ORIGINAL = {
    "tower": "model.vision_tower.vision_tower.vision_model.",
    "projector": "model.mm_projector.",
    "newline": "model.image_newline",
    "head": "lm_head.weight",
    "decoder": "model.",
}
REMOTE = {
    "tower": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "newline": "model.image_newline",
    "head": "lm_head.weight",
    "decoder": "model.language_model.",
}
"""As the modules of our remote code are called."""


def sort_arrays(arrays: Mapping[str, Any], source: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Sorts arrays by the part of the model that they belong to.

    Args:
      arrays: published names, of any layout and release.
      source: what they came from, for messages.

    Returns:
      By part, the arrays under their published names; and how each part's names begin.

    Raises:
      InputError: a name that no LLaVA has, a part in two spellings.
    """
    found: dict[str, dict[str, Any]] = {part: {} for part in TRANSFORMERS}
    spelling: dict[str, str] = {}
    strangers = []
    for name, array in arrays.items():
        hits = ((part, pattern.match(name)) for part, pattern in _SPELLINGS)
        part, match = next(((part, match) for part, match in hits if match), ("", None))
        if match is None:
            strangers.append(name)
            continue
        if spelling.setdefault(part, match[0]) != match[0]:
            raise InputError(f"{source}: arrays of the {part} begin with {spelling[part]!r} and with {match[0]!r}")
        # As MoVE-KD's released code calls the MLP beside its experts.
        found[part][name.replace(".mlp.original_module.", ".mlp.") if part == "tower" else name] = array
    if strangers:
        more = f", and {len(strangers) - 8} more" if len(strangers) > 8 else ""
        raise InputError(
            f"{source}: {len(strangers)} arrays that no LLaVA has: {', '.join(sorted(strangers)[:8])}{more}"
        )
    return found, spelling


def tower_rules(prefix: str) -> tuple[Rule, ...]:
    """Returns the rules of the vision tower and its experts."""
    return tuple(dataclasses.replace(rule, name=prefix + rule.name) for rule in clip.RULES)


def language_rules(names: Mapping[str, str], kind: str) -> tuple[Rule, ...]:
    """Returns the rules of the projector and the newline, whose tree is ``{"projector", ["newline"]}``.

    Args:
      names: how each part's names begin; ``mm_projector`` has numbers for its linears.
      kind: of the projector.
    """
    prefix = names["projector"]
    parts = {"hidden": "linear_1.", "out": "linear_2."} if kind != "linear" else {"out": "linear_1."}
    if prefix.endswith("mm_projector."):
        parts = {"hidden": "0.", "out": "2."} if kind != "linear" else {"out": ""}
    rules = [Rule(names["newline"], "newline")]
    for ours, theirs in parts.items():
        rules.append(Rule(f"{prefix}{theirs}weight", f"projector/{ours}/kernel", (1, 0)))
        rules.append(Rule(f"{prefix}{theirs}bias", f"projector/{ours}/bias"))
    return tuple(rules)


def decoder_rules(names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Returns the rules of the language model."""
    return llama.table(names["decoder"], names["head"])
