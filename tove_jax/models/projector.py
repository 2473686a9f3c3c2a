"""From the student's tokens to the language model's."""

from __future__ import annotations

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.errors import InputError, nearest
from tove_jax.models.block import ACTIVATIONS, Linear

Kind = Literal["mlp2x_gelu", "linear"]

LOGICAL_AXES = (
    (r"(.*/)?projector/hidden/kernel", ("embed", "mlp")),
    (r"(.*/)?projector/hidden/bias", ("mlp",)),
    (r"(.*/)?projector/out/kernel", ("mlp", "embed")),
    (r"(.*/)?projector/out/bias", ("embed",)),
)
"""First-match rules from parameter paths to logical axis names, of a tree called ``projector`` under any prefix."""


class Projector(nn.Module):
    """LLaVA's projector (Liu et al., arXiv:2304.08485: one linear; 2310.03744: two with an exact GELU between).

    Parameters: ``out/{kernel (W or D, W), bias (W,)}``, and for two linears ``hidden/{kernel (D, W), bias (W,)}``.

    Attributes:
      width: W, the language model's.
      kind: ``mlp2x_gelu`` or ``linear``.
      dtype: compute dtype.
      bias: whether the linears have one.
    """

    width: int
    kind: Kind = "mlp2x_gelu"
    dtype: Any = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns (..., W) of tokens (..., D).

        Raises:
          InputError: an unknown kind.
        """
        kinds = get_args(Kind)
        if self.kind not in kinds:
            raise InputError(
                f"projector: expected {' or '.join(kinds)}, found {self.kind!r}{nearest(str(self.kind), kinds)}"
            )
        middle = ("tokens", *(None,) * (tokens.ndim - 3)) if tokens.ndim > 2 else ()

        def linear(name: str, axis: str) -> nn.Module:
            axes = ("batch", *middle, axis)
            init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as torch draws a linear's weights
            return Linear(self.width, self.bias, dtype=self.dtype, kernel_init=init, axes=axes, name=name)

        x = tokens
        if self.kind == "mlp2x_gelu":
            x = ACTIVATIONS["gelu"](linear("hidden", "mlp")(x))
        return linear("out", "embed")(x)
