"""ToVE's token-aware gate and projector (arXiv 2504.00691): expert knowledge routed to each token.

With T (B, N, d) the student's tokens and S_k an expert's tokens on the student's grid:

    U_k = W_2 GELU(W_1^(k) S_k + b_1^(k)) + b_2        first layer per expert, second shared by all
    z   = W_g T + b_g,    g = softmax over the attached experts of z
    T'  = T + sum_k g_k U_k

The second layer is linear and the gates of a token sum to one, so the weighted sum of the hidden
tokens goes through it once, whatever the number of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.adapters.initializers import torch_linear
from tove_jax.adapters.map_stem import resize_grid

LOGICAL_AXES = (
    (r"(.*/)?gate/kernel", ("embed", "expert")),
    (r"(.*/)?gate/bias", ("expert",)),
    (r"(.*/)?experts/[^/]+/norm/(scale|bias)", (None,)),
    (r"(.*/)?experts/[^/]+/first/kernel", ("embed", "mlp")),
    (r"(.*/)?experts/[^/]+/first/bias", ("mlp",)),
    (r"(.*/)?second/kernel", ("mlp", "embed")),
    (r"(.*/)?second/bias", ("embed",)),
)


class TokenGate(nn.Module):
    """The gate's linear over the whole hub, of which only the attached columns are computed.

    Parameters ``kernel (d, K)`` and ``bias (K,)``.

    Attributes:
      experts: K, experts of the hub.
      start: ``zeros``: uniform gates; ``linear``: as ``torch.nn.Linear`` draws.
    """

    experts: int
    start: Literal["zeros", "linear"] = "zeros"

    @nn.compact
    def __call__(self, tokens: jax.Array, columns: Sequence[int]) -> jax.Array:
        """Returns the logits z (B, N, len(columns)) of tokens (B, N, d), float32 at the least."""
        width = tokens.shape[-1]
        draw = nn.initializers.zeros if self.start == "zeros" else torch_linear(width)
        kernel = self.param("kernel", draw, (width, self.experts))
        bias = self.param("bias", draw, (self.experts,))
        dtype = jnp.promote_types(tokens.dtype, jnp.float32)
        chosen = jnp.asarray(columns, jnp.int32)
        kernel, bias = kernel.astype(dtype)[:, chosen], bias.astype(dtype)[chosen]
        return tokens.astype(dtype) @ kernel + bias


class ExpertLayer(nn.Module):
    """The projector's first layer of one expert, from its patches to hidden tokens on the student's grid.

    Attributes:
      grid: (rows, columns) of the student's patches.
      hidden: hidden width.
      norm: ``layer`` puts a layer norm before the linear.
      dtype: compute dtype; None promotes.
    """

    grid: tuple[int, int]
    hidden: int
    norm: Literal["none", "layer"] = "none"
    dtype: Any = None

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """Maps patches (B, H, W, w_k) to GELU(W_1 S + b_1), (B, N, hidden)."""
        x = resize_grid(patches, self.grid)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.norm == "layer":
            x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm")(x)
        init = torch_linear(x.shape[-1])
        linear = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=init, bias_init=init, name="first")
        return nn.gelu(linear(x), approximate=False)


def second_layer(hidden: int, width: int, zero_init: bool, dtype: Any = None) -> nn.Dense:
    """Returns the projector's second layer, hidden to width, which all experts share."""
    init = nn.initializers.zeros if zero_init else torch_linear(hidden)
    return nn.Dense(width, dtype=dtype, kernel_init=init, bias_init=init)


def gate_weights(logits: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """Returns g (B, N, K), each row a softmax; exactly zero where an expert is not kept.

    Args:
      logits: (B, N, K).
      keep: bool (B, K), at least one a row; None keeps all.
    """
    if keep is not None:
        logits = jnp.where(keep[:, None], logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def random_keep(key: jax.Array, rows: int, experts: int, drop: float) -> jax.Array:
    """Draws which experts each row keeps, bool (rows, experts): each is dropped alone, one always stays."""
    drop_key, stay_key = jax.random.split(key)
    keep = jax.random.bernoulli(drop_key, 1 - drop, (rows, experts))
    stays = jax.random.randint(stay_key, (rows,), 0, experts)
    return keep | jax.nn.one_hot(stays, experts, dtype=bool)


def mix(gate: jax.Array, hidden: Sequence[jax.Array]) -> jax.Array:
    """Returns sum_k g_k h_k of gates (B, N, K) and K hidden tokens (B, N, H), in their dtype."""
    gate = gate.astype(hidden[0].dtype)
    return sum((gate[..., k, None] * one for k, one in enumerate(hidden[1:], 1)), gate[..., 0, None] * hidden[0])


def importance_loss(gate: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns (std_k I_k / mean_k I_k)^2, I_k the sum over counted rows and tokens of g_k.

    Population deviation: zero for uniform gates, K - 1 when one expert takes everything.

    Args:
      gate: (B, N, K), or any weights that are not negative.
      rows: bool (B,), which rows count.
    """
    total = jnp.where(rows[:, None, None], gate, 0).sum(axis=(0, 1))
    mean = total.mean()
    safe = jnp.where(mean > 0, mean, 1)
    return jnp.where(mean > 0, jnp.square(total / safe - 1).mean(), 0)


def load_probability(clean: jax.Array, noisy: jax.Array, deviation: float) -> jax.Array:
    """Returns each expert's chance to be a token's largest if its noise alone were drawn again.

    The smooth load of noisy gates (Shazeer et al., arXiv 1701.06538, with one expert chosen), which
    unlike the choice itself has a gradient.

    Args:
      clean: (B, N, K) logits.
      noisy: the same with the noise that was used.
      deviation: of the noise.
    """
    experts = clean.shape[-1]
    if experts == 1:
        return jnp.ones_like(clean)
    others = jnp.where(jnp.eye(experts, dtype=bool), -jnp.inf, noisy[..., None, :]).max(axis=-1)
    return jax.scipy.stats.norm.cdf((clean - others) / deviation)
