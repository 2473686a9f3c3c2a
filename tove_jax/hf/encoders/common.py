"""Pieces of which the tables of ViT-like encoders are made."""

from __future__ import annotations

from tove_jax.hf.rules import Rule

_MATRIX = (0, 2, 1)  # (layer, out, in) -> (layer, in, out)


def linear(name: str, path: str, part: tuple[int, int] | None = None) -> tuple[Rule, Rule]:
    """Rules of one torch ``Linear``, weight and bias; stacked where the name has a placeholder.

    A bias that the model lacks has no leaf, and its rule is not used.

    Args:
      name: published name without ``.weight``.
      path: ours without ``/kernel``.
      part: see `tove_jax.hf.rules.Rule`.
    """
    axes = _MATRIX if "{" in name else (1, 0)
    return Rule(f"{name}.weight", f"{path}/kernel", axes, part), Rule(f"{name}.bias", f"{path}/bias", None, part)


def norm(name: str, path: str) -> tuple[Rule, Rule]:
    """Rules of one norm."""
    return Rule(f"{name}.weight", f"{path}/scale"), Rule(f"{name}.bias", f"{path}/bias")


def patch_embed(name: str) -> tuple[Rule, Rule]:
    """Rules of a convolution that embeds patches."""
    return (
        Rule(f"{name}.weight", "patch_embed/kernel", (2, 3, 1, 0)),  # OIHW -> HWIO
        Rule(f"{name}.bias", "patch_embed/bias"),
    )


def fused(name: str, path: str, weight: str = "in_proj_weight", bias: str = "in_proj_bias") -> tuple[Rule, ...]:
    """Rules of torch's ``MultiheadAttention``: query, key and value in one array, and ``out_proj``.

    Args:
      name: published name of the attention.
      path: ours.
      weight, bias: what the fused arrays are called.
    """
    axes = _MATRIX if "{" in name else (1, 0)
    rules = []
    for index, which in enumerate(("query", "key", "value")):
        rules.append(Rule(f"{name}.{weight}", f"{path}/{which}/kernel", axes, (index, 3)))
        rules.append(Rule(f"{name}.{bias}", f"{path}/{which}/bias", None, (index, 3)))
    return (*rules, *linear(f"{name}.out_proj", f"{path}/out"))
