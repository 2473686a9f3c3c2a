"""The transformer layer that every ViT here is made of, and the patch embedding before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from tove_jax.models.attention import Implementation, attention, attention_row_scores
from tove_jax.models.rotary import Rotary
from tove_jax.models.window import partition, unpartition
from tove_jax.parallel import constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}

# Of a stack of blocks and of a patch embedding, under any prefix.
LOGICAL_AXES = (
    (r"(.*/)?patch_embed/kernel", ("patch", None, None, "embed")),
    (r"(.*/)?patch_embed/bias", ("embed",)),
    (r"(.*/)?layers/norm[12]/(scale|bias)", ("layers", "embed")),
    (r"(.*/)?layers/scale[12]", ("layers", "embed")),
    (r"(.*/)?layers/attention/(query|key|value)/kernel", ("layers", "embed", "heads")),
    (r"(.*/)?layers/attention/(query|key|value)/bias", ("layers", "heads")),
    (r"(.*/)?layers/attention/norm/(scale|bias)", ("layers", "heads")),
    (r"(.*/)?layers/attention/out/kernel", ("layers", "heads", "embed")),
    (r"(.*/)?layers/attention/out/bias", ("layers", "embed")),
    (r"(.*/)?layers/mlp/(fc1|gate)/kernel", ("layers", "embed", "mlp")),
    (r"(.*/)?layers/mlp/(fc1|gate)/bias", ("layers", "mlp")),
    (r"(.*/)?layers/mlp/norm/(scale|bias)", ("layers", "mlp")),
    (r"(.*/)?layers/mlp/fc2/kernel", ("layers", "mlp", "embed")),
    (r"(.*/)?layers/mlp/fc2/bias", ("layers", "embed")),
)

TOKENS = ("batch", "tokens", "embed")
PROJECTIONS = ("query", "key", "value", "out")

Norm = Literal["layer", "rms"]


def layer_norm(name: str, epsilon: float, dtype: Any) -> nn.Module:
    """Returns a layer norm with float32 statistics; the two-pass variance, as torch computes it."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def make_norm(kind: Norm, name: str, epsilon: float, dtype: Any) -> nn.Module:
    """Returns a layer norm, or a root-mean-square norm (no mean, no bias); float32 statistics."""
    if kind == "layer":
        return layer_norm(name, epsilon, dtype)
    return nn.RMSNorm(epsilon=epsilon, dtype=dtype, name=name)


class PatchEmbed(nn.Module):
    """A linear map of every patch, as one matrix product; what is left over at the right and bottom is cut off.

    Parameters: ``kernel`` (p, p, 3, D), and ``bias`` (D,) where there is one.

    Attributes:
      patch_size: side of a patch p, pixels.
      width: D.
      bias: whether there is one.
      dtype: compute dtype.
    """

    patch_size: int
    width: int
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Returns (B, rows, columns, D) of pixels (B, H, W, 3)."""
        side, width = self.patch_size, self.width
        rows, columns = pixels.shape[1] // side, pixels.shape[2] // side
        kernel = self.param("kernel", nn.initializers.normal(0.02), (side, side, 3, width))
        x = pixels[:, : rows * side, : columns * side].astype(self.dtype)
        x = x.reshape(-1, rows, side, columns, side, 3).swapaxes(2, 3)
        x = x.reshape(-1, rows, columns, side * side * 3) @ kernel.reshape(-1, width).astype(self.dtype)
        if self.bias:
            x = x + self.param("bias", nn.initializers.zeros, (width,)).astype(self.dtype)
        return x


class Attention(nn.Module):
    """Multi-head self-attention that can also return the row of CLS.

    Attributes:
      heads: divides the width.
      out_std: standard deviation of the output projection's initial weights.
      dtype: compute dtype.
      implementation: see `tove_jax.models.attention.choose`.
      biases: which of `PROJECTIONS` have one.
      inner_norm: a norm between the heads and the output projection (EVA-02's sub-LN).
      norm_epsilon: of that norm.
      scale: of the scores; None: 1 / sqrt(head width).
      position: factory ``(name=...) -> module`` with ``module(query (B, T, heads, d), before the scale) ->
        (B, heads, T, T)`` scores added before the softmax; or None.
    """

    heads: int
    out_std: float
    dtype: Any
    implementation: Implementation
    biases: tuple[str, ...] = PROJECTIONS
    inner_norm: bool = False
    norm_epsilon: float = 1e-5
    scale: float | None = None
    position: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rows: frozenset[str] = frozenset(),
        *,
        rotary: Rotary | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (B, T, D) and the rows asked for.

        Args:
          x: (B, T, D).
          rows: among ``attention_cls`` and ``attention_cls_scores``, (B, heads, T), see
            `tove_jax.models.attention.attention_row_scores`; without `position` and `mask` only.
          rotary: turns queries and keys of the last tokens.
          mask: bool (B, T), False for tokens that none may look at.
        """
        width = x.shape[-1]

        def heads(name: str) -> jax.Array:
            init = nn.initializers.normal(width**-0.5)
            y = nn.Dense(width, name in self.biases, dtype=self.dtype, kernel_init=init, name=name)(x)
            y = y.reshape(*y.shape[:-1], self.heads, width // self.heads)
            return constrain(y, ("batch", "tokens", "heads", None))

        query, key, value = heads("query"), heads("key"), heads("value")
        if rotary is not None:
            query, key = rotary(query), rotary(key)
        bias = None if self.position is None else self.position(name="position")(query)
        found = {}
        if rows:
            scores = attention_row_scores(query, key, scale=self.scale)
            if "attention_cls_scores" in rows:
                found["attention_cls_scores"] = scores
            if "attention_cls" in rows:
                found["attention_cls"] = jax.nn.softmax(scores, axis=-1)
        y = attention(query, key, value, self.implementation, scale=self.scale, bias=bias, mask=mask).reshape(x.shape)
        if self.inner_norm:
            y = layer_norm("norm", self.norm_epsilon, self.dtype)(y)
        init = nn.initializers.normal(self.out_std)
        return nn.Dense(width, "out" in self.biases, dtype=self.dtype, kernel_init=init, name="out")(y), found


class Linear(nn.Dense):
    """A Dense whose output follows the given logical axes, where there are any; adapters may read its kernel.

    Where the variables ``lora`` hold ``a_kernel`` (d_in, r) and ``b_kernel`` (r, d_out) for it, ``x A B`` is added.
    """

    axes: tuple[str | None, ...] = ()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (..., features)."""
        y = super().__call__(x)
        if self.has_variable("lora", "a_kernel"):
            a: Any = self.get_variable("lora", "a_kernel")
            b: Any = self.get_variable("lora", "b_kernel")
            x, a, b = promote_dtype(x, a, b, dtype=self.dtype)
            y = y + (x @ a) @ b
        return constrain(y, self.axes) if self.axes else y


class Mlp(nn.Module):
    """Two linears and an activation, run by the adapter where there is one.

    Attributes:
      mlp_width: F.
      activation: a name in `ACTIVATIONS`.
      out_std: standard deviation of the second linear's initial weights.
      dtype: compute dtype.
      adapter: see `Block`.
      gated: ``fc2(activation(gate(x)) * fc1(x))`` (SwiGLU with silu; Shazeer, arXiv:2002.05202).
      inner_norm: a norm before ``fc2`` (EVA-02's sub-LN).
      norm_epsilon: of that norm.
      bias: whether the linears have one.
    """

    mlp_width: int
    activation: str
    out_std: float
    dtype: Any
    adapter: Callable[..., nn.Module] | None = None
    gated: bool = False
    inner_norm: bool = False
    norm_epsilon: float = 1e-5
    bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        adapter_inputs: Any = None,
        deterministic: bool = True,
        reports: frozenset[str] = frozenset(),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the shape of x, and the adapter's reports."""
        width = x.shape[-1]
        init = nn.initializers.normal
        axes = ("batch", *("tokens", None)[: x.ndim - 2], "mlp")
        hidden = {"dtype": self.dtype, "kernel_init": init((2 * width) ** -0.5), "axes": axes, "use_bias": self.bias}
        first = Linear(self.mlp_width, name="fc1", **hidden)
        second = Linear(width, self.bias, dtype=self.dtype, kernel_init=init(self.out_std), name="fc2")
        act = ACTIVATIONS[self.activation]
        if self.adapter is not None:
            if self.gated or self.inner_norm:
                raise ValueError("an adapter needs a plain MLP")
            experts = self.adapter(name="adapter")
            return experts(x, first, act, second, inputs=adapter_inputs, deterministic=deterministic, reports=reports)
        y = act(Linear(self.mlp_width, name="gate", **hidden)(x)) * first(x) if self.gated else act(first(x))
        if self.inner_norm:
            y = layer_norm("norm", self.norm_epsilon, self.dtype)(y)
        return second(y), {}


class Block(nn.Module):
    """One pre-norm transformer layer.

    Parameters, the options' in brackets::

        norm{1,2}/{scale,bias} (D,)          [scale{1,2} (D,)]
        attention/{query,key,value,out}/{kernel (D, D), bias (D,)}      [attention/norm/{scale,bias} (D,)]
        mlp/fc1/{kernel (D, F), bias (F,)}   mlp/fc2/{kernel (F, D), bias (D,)}
        [mlp/gate/{kernel (D, F), bias (F,)}]   [mlp/norm/{scale,bias} (F,)]
        [attention/position/...]             [mlp/adapter/...]

    Attributes:
      heads: attention heads; divides the width.
      mlp_width: F.
      activation: a name in `ACTIVATIONS`.
      norm_epsilon: of every norm.
      depth: number of layers, for the initialisation.
      dtype: compute dtype; norm statistics and softmax are float32 at the least.
      implementation: see `tove_jax.models.attention.choose`.
      adapter: factory ``(name=...) -> module`` called as `tove_jax.adapters.mole.MoLE` is, or None.
      biases: see `Attention`.
      mlp_bias: see `Mlp.bias`.
      gated: see `Mlp`.
      attention_norm: see `Attention.inner_norm`.
      mlp_norm: see `Mlp.inner_norm`.
      layer_scale: each branch is multiplied by a vector before it is added (CaiT, arXiv:2103.17239).
      norm: kind of norm before each branch.
      attention_scale: see `Attention.scale`.
      position: see `Attention`.
      window: for maps: side of the windows within which attention looks, see `tove_jax.models.window`;
        0: everywhere. Windows are cut after the norm, so padding is zero there.
    """

    heads: int
    mlp_width: int
    activation: str
    norm_epsilon: float
    depth: int
    dtype: Any = jnp.float32
    implementation: Implementation = "auto"
    adapter: Callable[..., nn.Module] | None = None
    biases: tuple[str, ...] = PROJECTIONS
    mlp_bias: bool = True
    gated: bool = False
    attention_norm: bool = False
    mlp_norm: bool = False
    layer_scale: bool = False
    norm: Norm = "layer"
    attention_scale: float | None = None
    position: Callable[..., nn.Module] | None = None
    window: int = 0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        adapter_inputs: Any = None,
        *,
        rows: frozenset[str] = frozenset(),
        reports: frozenset[str] = frozenset(),
        deterministic: bool = True,
        rotary: Rotary | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """Runs the layer.

        Args:
          x: tokens (B, T, D), or a map (B, H, W, D).
          adapter_inputs: pytree given to the adapter.
          rows: attention rows wanted, see `Attention`.
          reports: the adapter's reports wanted.
          deterministic: no dropout; otherwise the rng ``dropout`` is needed.
          rotary: see `Attention`; with a window, of its places.
          mask: see `Attention`; for tokens only.

        Returns:
          The shape of x, the attention rows, and the adapter's reports.
        """
        width = x.shape[-1]
        axes = TOKENS if x.ndim == 3 else ("batch", "tokens", None, "embed")
        out_std = width**-0.5 * (2 * self.depth) ** -0.5
        norm1 = make_norm(self.norm, "norm1", self.norm_epsilon, self.dtype)
        norm2 = make_norm(self.norm, "norm2", self.norm_epsilon, self.dtype)
        attend = Attention(
            self.heads,
            out_std,
            self.dtype,
            self.implementation,
            biases=self.biases,
            inner_norm=self.attention_norm,
            norm_epsilon=self.norm_epsilon,
            scale=self.attention_scale,
            position=self.position,
            name="attention",
        )
        mlp = Mlp(
            self.mlp_width,
            self.activation,
            out_std,
            self.dtype,
            self.adapter,
            gated=self.gated,
            inner_norm=self.mlp_norm,
            norm_epsilon=self.norm_epsilon,
            bias=self.mlp_bias,
            name="mlp",
        )

        def scaled(name: str, y: jax.Array) -> jax.Array:
            if not self.layer_scale:
                return y
            return y * self.param(name, nn.initializers.ones, (width,)).astype(self.dtype)

        y = norm1(x)
        windows = partition(y, self.window) if x.ndim == 4 and self.window else y
        tokens = windows.reshape(windows.shape[0], -1, width)
        y, found = attend(tokens, rows, rotary=rotary, mask=mask)
        y = y.reshape(windows.shape)
        if x.ndim == 4 and self.window:
            y = unpartition(y, (x.shape[1], x.shape[2]))
        x = constrain(x + scaled("scale1", y), axes)
        y, told = mlp(norm2(x), adapter_inputs, deterministic, reports)
        return constrain(x + scaled("scale2", y), axes), found, told


def stacked_init(block: nn.Module, depth: int, *example: Any) -> Callable[[jax.Array], Any]:
    """Returns an initialiser of `depth` layers' parameters, stacked on a leading axis, every layer drawing its own.

    Args:
      block: one layer.
      depth: number of layers.
      *example: inputs to initialise it with; their first axes may be 1.
    """

    def init(rng: jax.Array) -> Any:
        return jax.vmap(lambda key: block.init(key, *example)["params"])(jax.random.split(rng, depth))

    return init
