"""One vision transformer for the experts: what CLIP, SigLIP, DINO and EVA-02 share, their differences as fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.errors import InputError
from tove_jax.models import block as blocks
from tove_jax.models.attention import Implementation, attention
from tove_jax.models.block import TOKENS, Block, Mlp, PatchEmbed, layer_norm, stacked_init
from tove_jax.models.position import resize_map
from tove_jax.models.rotary import Rotary
from tove_jax.models.stack import parse, run_stack
from tove_jax.parallel import constrain

LOGICAL_AXES = (
    (r"(.*/)?class_embed", ("embed",)),
    (r"(.*/)?registers", (None, "embed")),
    (r"(.*/)?position_embed", ("tokens", "embed")),
    (r"(.*/)?(pre|post)_norm/(scale|bias)", ("embed",)),
    (r"(.*/)?pool/probe", ("embed",)),
    (r"(.*/)?pool/norm/(scale|bias)", ("embed",)),
    (r"(.*/)?pool/(query|key|value)/kernel", ("embed", "heads")),
    (r"(.*/)?pool/(query|key|value)/bias", ("heads",)),
    (r"(.*/)?pool/out/kernel", ("heads", "embed")),
    (r"(.*/)?pool/out/bias", ("embed",)),
    (r"(.*/)?pool/mlp/fc1/kernel", ("embed", "mlp")),
    (r"(.*/)?pool/mlp/fc1/bias", ("mlp",)),
    (r"(.*/)?pool/mlp/fc2/kernel", ("mlp", "embed")),
    (r"(.*/)?pool/mlp/fc2/bias", ("embed",)),
    *blocks.LOGICAL_AXES,
)


class AttentionPool(nn.Module):
    """One learned query looks at every token, then an MLP (the head of SigLIP, Zhai et al., arXiv:2303.15343).

    Parameters: ``probe`` (D,), ``{query,key,value,out}/{kernel,bias}``, ``norm/{scale,bias}``,
    ``mlp/{fc1,fc2}/{kernel,bias}``.

    Attributes:
      heads, mlp_width, activation, norm_epsilon, dtype, implementation: as in `tove_jax.models.block.Block`.
    """

    heads: int
    mlp_width: int
    activation: str
    norm_epsilon: float
    dtype: Any
    implementation: Implementation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, D) of tokens (B, T, D)."""
        width = x.shape[-1]
        init = nn.initializers.normal(width**-0.5)
        probe = self.param("probe", init, (width,)).astype(self.dtype)

        def heads(name: str, y: jax.Array) -> jax.Array:
            y = nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)(y)
            return y.reshape(*y.shape[:-1], self.heads, width // self.heads)

        query = jnp.broadcast_to(heads("query", probe[None, None]), (x.shape[0], 1, self.heads, width // self.heads))
        y = attention(query, heads("key", x), heads("value", x), self.implementation).reshape(-1, 1, width)
        y = nn.Dense(width, dtype=self.dtype, kernel_init=init, name="out")(y)
        mlp = Mlp(self.mlp_width, self.activation, width**-0.5, self.dtype, name="mlp")
        return (y + mlp(layer_norm("norm", self.norm_epsilon, self.dtype)(y))[0])[:, 0]


class VisionBackbone(nn.Module):
    """A vision transformer over all patches of a picture of any size.

    Parameters, the options' in brackets, everything under ``layers/`` stacked on a leading axis of length ``depth``
    (see `tove_jax.models.block.Block`)::

        patch_embed/{kernel (p, p, 3, D), [bias (D,)]}   [class_embed (D,)]   [registers (R, D)]
        [position_embed ([1 +] N, D)]   [pre_norm/{scale,bias} (D,)]   post_norm/{scale,bias} (D,)
        layers/...   [pool/..., see `AttentionPool`]

    Tokens are CLS, registers, patches, in this order.

    Attributes:
      patch_size: side of a patch, pixels; what is left over at the right and bottom is cut off.
      width: D.
      depth: number of layers L.
      heads: attention heads; divides the width.
      mlp_width: F.
      activation: a name in `tove_jax.models.block.ACTIVATIONS`.
      norm_epsilon: of every layer norm.
      position_grid: rows and columns of the learned positions, resized to the picture's; None: there are none.
        CLS has one of its own, registers have none.
      antialias: whether that resize filters, see `tove_jax.models.position`.
      rotary: ``(head width, (rows, columns)) -> Rotary``, or None.
      class_token: whether there is one.
      registers: number of register tokens R (Darcet et al., arXiv:2309.16588).
      patch_bias: whether the patch embedding has a bias.
      pre_norm: whether a norm comes before the first layer.
      pool: what ``pooled`` is: ``cls``, the post-norm of CLS; ``map``, attention pooling of the post-normed tokens.
      block: fields of `tove_jax.models.block.Block` other than the above.
      dtype: compute dtype; norm statistics and softmax are float32 at the least.
      attention: see `tove_jax.models.attention.choose`.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    position_grid: tuple[int, int] | None = None
    antialias: bool = False
    rotary: Callable[[int, tuple[int, int]], Rotary] | None = None
    class_token: bool = True
    registers: int = 0
    patch_bias: bool = True
    pre_norm: bool = False
    pool: Literal["cls", "map"] = "cls"
    block: Mapping[str, Any] | None = None
    dtype: Any = jnp.float32
    attention: Implementation = "auto"

    @property
    def leading(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + self.registers

    def grid(self, pixels: Any) -> tuple[int, int]:
        """Returns rows and columns of the patches of pixels (B, H, W, 3)."""
        return pixels.shape[1] // self.patch_size, pixels.shape[2] // self.patch_size

    @nn.compact
    def __call__(
        self, pixels: jax.Array, *, intermediates: Sequence[str] = (), final: bool = True
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Encodes pictures; what is not asked for is not computed.

        Args:
          pixels: float (B, H, W, 3), normalised, at least a patch high and wide.
          intermediates: names among ``embeddings`` (B, T, D), the input of the first layer; ``layers/{i}``
            (B, T, D), the output of layer i, negative counting from the end; ``layers/{i}/attention_cls`` and
            ``layers/{i}/attention_cls_scores`` (B, heads, T), the row of CLS after and before the softmax;
            ``normed`` (B, T, D), the post-norm of the last layer's tokens; ``pooled`` (B, D).
          final: whether the last layer's tokens are wanted; without them, layers after the last one asked for are
            not run.

        Returns:
          (B, T, D), the last layer's tokens without a norm (None unless ``final``), and a dict with exactly the names
          asked for.

        Raises:
          InputError: pixels of another shape, an unknown name, a layer out of range.
        """
        if pixels.ndim != 4 or pixels.shape[3] != 3 or min(pixels.shape[1:3]) < self.patch_size:
            raise InputError(
                f"pixels: expected (batch, height, width, 3) of at least {self.patch_size} x {self.patch_size}, "
                f"found {pixels.shape}"
            )
        asked = parse(intermediates, self.depth, ("embeddings", "normed", "pooled"))
        if asked.rows and not self.class_token:
            raise InputError("attention_cls: the encoder has no class token")
        normed = self.is_initializing() or bool({"normed", "pooled"} & set(intermediates))
        x = self._embed(pixels)
        found = {"embeddings": x}
        block = Block(
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            norm_epsilon=self.norm_epsilon,
            depth=self.depth,
            dtype=self.dtype,
            implementation=self.attention,
            parent=None,
            **(self.block or {}),
        )
        stacked = self.param("layers", stacked_init(block, self.depth, jnp.zeros((1, 1, self.width), jnp.float32)))
        rotary = None if self.rotary is None else self.rotary(self.width // self.heads, self.grid(pixels))
        x, told = run_stack(block, stacked, x, asked, output_wanted=final or normed, rotary=rotary)
        found.update(told)
        if normed:
            # Only what `pooled` or `normed` uses of it is kept by the compiler.
            found["normed"] = y = layer_norm("post_norm", self.norm_epsilon, self.dtype)(x)
            if self.pool == "cls":
                found["pooled"] = y[:, 0]
            elif self.is_initializing() or "pooled" in intermediates:
                pool = AttentionPool(
                    self.heads,
                    self.mlp_width,
                    self.activation,
                    self.norm_epsilon,
                    self.dtype,
                    self.attention,
                    name="pool",
                )
                found["pooled"] = pool(y)
        return (x if final else None), {name: found[name] for name in intermediates}

    def _embed(self, pixels: jax.Array) -> jax.Array:
        width, init = self.width, nn.initializers.normal(self.width**-0.5)
        x = PatchEmbed(self.patch_size, width, self.patch_bias, self.dtype, name="patch_embed")(pixels)
        batch, grid = x.shape[0], self.grid(pixels)
        x = x.reshape(batch, -1, width)
        front = []
        if self.class_token:
            front.append(self.param("class_embed", init, (width,))[None])
        if self.position_grid is not None:
            rows, columns = self.position_grid
            count = len(front)
            position = self.param("position_embed", init, (count + rows * columns, width))
            table = resize_map(position[count:].reshape(rows, columns, width), grid, antialias=self.antialias)
            x = x + table.reshape(-1, width).astype(self.dtype)
            front = [token + position[:1] for token in front]
        if self.registers:
            front.append(self.param("registers", init, (self.registers, width)))
        if front:
            tokens = jnp.concatenate(front).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(tokens, (batch, *tokens.shape)), x], axis=1)
        if self.pre_norm:
            x = layer_norm("pre_norm", self.norm_epsilon, self.dtype)(x)
        return constrain(x, TOKENS)
