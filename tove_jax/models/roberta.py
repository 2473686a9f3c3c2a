"""RoBERTa made causal, with cross-attention to picture tokens and bottleneck adaptors: ToVE's language model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.errors import InputError
from tove_jax.models.attention import Implementation, attention
from tove_jax.models.block import LOGICAL_AXES as BLOCK_AXES
from tove_jax.models.block import PROJECTIONS, TOKENS, Linear, Mlp, layer_norm, stacked_init
from tove_jax.models.causal import (
    Cache,
    Memory,
    check_rows,
    make_cache,
    parse_names,
    place_rows,
    run_layers,
    visible,
)
from tove_jax.models.llama import CausalAttention
from tove_jax.models.stack import Remat
from tove_jax.parallel import constrain

LOGICAL_AXES = (
    (r"(.*/)?layers/cross/(query|key|value)/kernel", ("layers", "embed", "heads")),
    (r"(.*/)?layers/cross/(query|key|value)/bias", ("layers", "heads")),
    (r"(.*/)?layers/cross/out/kernel", ("layers", "heads", "embed")),
    (r"(.*/)?layers/adaptor/down/kernel", ("layers", "embed", "mlp")),
    (r"(.*/)?layers/adaptor/down/bias", ("layers", "mlp")),
    (r"(.*/)?layers/adaptor/up/kernel", ("layers", "mlp", "embed")),
    (r"(.*/)?layers/(cross/out|adaptor/up)/bias", ("layers", "embed")),
    (r"(.*/)?layers/(attention|cross|adaptor|mlp)_norm/(scale|bias)", ("layers", "embed")),
    *BLOCK_AXES,
    (r"(.*/)?token_embed", ("vocab", "embed")),
    (r"(.*/)?(position|type)_embed", (None, None)),  # small, and looked up by every row
    (r"(.*/)?embed_norm/(scale|bias)", ("embed",)),
    (r"(.*/)?head/dense/kernel", ("embed", None)),
    (r"(.*/)?head/(dense/bias|norm/scale|norm/bias)", ("embed",)),
    (r"(.*/)?head/bias", ("vocab",)),
)
"""First-match rules from parameter paths to logical axis names, under any prefix."""


class Pictures(NamedTuple):
    """What cross-attention reads: the tokens of each row's pictures, or the keys and values made of them.

    Attributes:
      tokens: (B, M, Dv), or None where keys and values are there.
      keys, values: (L, B, M, heads, head width), of one layer without L; or None where tokens are there.
      mask: bool (B, M), False for what is no picture token; or None, where all are.
      owner: int32 (N,), for rows that share pictures: which of the B each row sees; None: each its own.
    """

    tokens: jax.Array | None = None
    keys: jax.Array | None = None
    values: jax.Array | None = None
    mask: jax.Array | None = None
    owner: jax.Array | None = None

    def of_rows(self, array: jax.Array) -> jax.Array:
        """Returns an array (B, ...) a row each."""
        return array if self.owner is None else array[self.owner]


class PictureCache(NamedTuple):
    """What was read so far: the text, and its pictures once they were given.

    Attributes:
      text: see `tove_jax.models.causal.Cache`.
      pictures: keys and values of all layers, or None.
    """

    text: Cache
    pictures: Pictures | None = None

    def take(self, rows: jax.Array) -> PictureCache:
        """Returns the rows with the given numbers; pictures are shared by such rows, not copied."""
        pictures = self.pictures
        if pictures is not None:
            pictures = pictures._replace(owner=rows if pictures.owner is None else pictures.owner[rows])
        return PictureCache(self.text.take(rows), pictures)


class CrossAttention(nn.Module):
    """Text looks at picture tokens.

    Attributes: see `Roberta`; `out_std` is the standard deviation of the output projection's initial weights.
    """

    width: int
    heads: int
    out_std: float
    dtype: Any
    implementation: Implementation

    def setup(self) -> None:
        init, axes = nn.initializers.normal, ("batch", "tokens", "heads")
        # Keys and values are drawn for tokens of about unit size, whatever their width.
        self.query, self.key, self.value = (
            Linear(self.width, dtype=self.dtype, kernel_init=nn.initializers.lecun_normal(), axes=axes)
            for _ in range(3)
        )
        self.out = nn.Dense(self.width, dtype=self.dtype, kernel_init=init(self.out_std))

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, self.width // self.heads)

    def read(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values (B, M, heads, head width) of picture tokens (B, M, Dv)."""
        return self._split(self.key(tokens)), self._split(self.value(tokens))

    def __call__(self, x: jax.Array, pictures: Pictures) -> jax.Array:
        """Returns (B, T, D) of text (B, T, D)."""
        keys, values = pictures.keys, pictures.values
        if pictures.tokens is not None:
            keys, values = self.read(pictures.tokens)
        assert keys is not None and values is not None
        query = self._split(self.query(x))
        keys, values = (pictures.of_rows(array).astype(query.dtype) for array in (keys, values))
        mask = None if pictures.mask is None else pictures.of_rows(pictures.mask)
        y = attention(query, keys, values, self.implementation, mask=mask)
        return self.out(y.reshape(x.shape))


class Adaptor(nn.Module):
    """``Up(ReLU(Down x)^2)``; Up starts at zero.

    Attributes:
      hidden: width between the two.
      dtype: compute dtype.
    """

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, T, D), to be added to x."""
        down = Linear(self.hidden, dtype=self.dtype, axes=("batch", "tokens", "mlp"), name="down")(x)
        zeros = nn.initializers.zeros
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=zeros, name="up")(jnp.square(nn.relu(down)))


class Layer(nn.Module):
    """One layer of `Roberta`, whose attributes these are."""

    heads: int
    mlp_width: int
    picture_width: int
    adaptor_width: int
    norm_epsilon: float
    out_std: float
    dtype: Any
    implementation: Implementation

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: Memory | None, mask: jax.Array | None, pictures: Pictures | None
    ) -> tuple[jax.Array, Memory | None]:
        """Returns (B, T, D) and the extended memory; see `CausalAttention`. Without pictures nothing looks at any."""
        width = x.shape[-1]

        def joined(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
            return constrain(layer_norm(f"{name}_norm", self.norm_epsilon, self.dtype)(x + y), TOKENS)

        attend = CausalAttention(
            self.heads,
            self.heads,
            width // self.heads,
            self.out_std,
            self.dtype,
            self.implementation,
            PROJECTIONS,
            name="attention",
        )
        y, memory = attend(x, memory, None, mask)
        x = joined("attention", x, y)
        if pictures is not None:
            cross = CrossAttention(width, self.heads, self.out_std, self.dtype, self.implementation, name="cross")
            looked = joined("cross", x, cross(x, pictures))
            if pictures.mask is not None:
                # A row without a picture goes on as a text alone does.
                some = pictures.of_rows(pictures.mask.any(axis=1))
                looked = jnp.where(some[:, None, None], looked, x)
            x = looked
        if self.adaptor_width:
            x = joined("adaptor", x, Adaptor(self.adaptor_width, self.dtype, name="adaptor")(x))
        y, _ = Mlp(self.mlp_width, "gelu", self.out_std, self.dtype, name="mlp")(x)
        return joined("mlp", x, y), memory


class Head(nn.Module):
    """Logits from the token embedding after a dense layer, exact GELU and a norm; attributes see `Roberta`."""

    norm_epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, token_embed: jax.Array) -> jax.Array:
        """Returns float32 (..., V) of (..., D) and the embedding (V, D)."""
        vocabulary, width = token_embed.shape
        x = nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name="dense")(x)
        x = layer_norm("norm", self.norm_epsilon, self.dtype)(jax.nn.gelu(x, approximate=False))
        bias = self.param("bias", nn.initializers.zeros, (vocabulary,))
        precise = jnp.promote_types(self.dtype, jnp.float32)
        kernel = token_embed.astype(self.dtype)
        y = jnp.einsum("...d,vd->...v", x, kernel, preferred_element_type=precise) + bias.astype(precise)
        return constrain(y, ("batch", *("tokens",) * (y.ndim - 2), "vocab"))


class Roberta(nn.Module):
    """RoBERTa (arXiv:1907.11692) that reads from left to right and looks at pictures, ToVE's decoder.

    A layer is ``x = N(x + SelfAttention(x)); x = N(x + CrossAttention(x, pictures)); x = N(x + Up(ReLU(Down x)^2));
    x = N(x + MLP(x))`` with a layer norm N of its own each; without the third, equal to transformers'
    `RobertaForCausalLM` (``is_decoder``, ``add_cross_attention``), dropout apart. Parameters, everything under
    ``layers/`` stacked on a leading axis of length ``depth``, A = adaptor_width, Dv = picture_width::

        token_embed (V, D)    position_embed (longest + position_offset, D)    type_embed (K, D)
        embed_norm/{scale,bias} (D,)
        layers/attention/{query,key,value,out}/{kernel (L, D, D), bias (L, D)}          layers/attention_norm/{scale,bias}
        layers/cross/{query,out}/{kernel (L, D, D), bias}                               layers/cross_norm/{scale,bias}
        layers/cross/{key,value}/{kernel (L, Dv, D), bias (L, D)}
        layers/adaptor/down/{kernel (L, D, A), bias}  layers/adaptor/up/{kernel (L, A, D), bias}
                                                                                        layers/adaptor_norm/{scale,bias}
        layers/mlp/fc1/{kernel (L, D, F), bias}       layers/mlp/fc2/{kernel (L, F, D), bias}
                                                                                        layers/mlp_norm/{scale,bias}
        head/dense/{kernel (D, D), bias}   head/norm/{scale,bias}   head/bias (V,)      (its last matrix is token_embed)

    They are float32 when initialised, may be stored in another dtype, and are cast at use.

    Attributes:
      vocabulary: V, number of tokens.
      width: D.
      depth: number of layers L.
      heads: attention heads; divides the width.
      mlp_width: F.
      picture_width: Dv, width of the picture tokens; 0: no cross-attention.
      adaptor_width: A; 0: no adaptors.
      longest: tokens of a row at most, each with a position of its own.
      position_offset: row of `position_embed` of the first token; RoBERTa's is its padding id + 1.
      types: K, token types, of which the first is used.
      norm_epsilon: of every layer norm.
      dtype: compute dtype; norm statistics, softmax and logits are float32 at the least.
      attention: see `tove_jax.models.attention.choose`.
      remat: see `tove_jax.models.vit.VisionTransformer`.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    picture_width: int = 0
    adaptor_width: int = 0
    longest: int = 512
    position_offset: int = 2
    types: int = 1
    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32
    attention: Implementation = "auto"
    remat: Remat = "none"

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        self.token_embed = self.param("token_embed", init, (self.vocabulary, self.width))
        places = self.longest + self.position_offset
        self.position_embed = self.param("position_embed", init, (places, self.width))
        self.type_embed = self.param("type_embed", init, (self.types, self.width))
        self.embed_norm = layer_norm("embed_norm", self.norm_epsilon, self.dtype)
        self.layers = self.param("layers", self._init_layers)
        self.head = Head(self.norm_epsilon, self.dtype)

    @property
    def block(self) -> Layer:
        """One layer."""
        return Layer(
            heads=self.heads,
            mlp_width=self.mlp_width,
            picture_width=self.picture_width,
            adaptor_width=self.adaptor_width,
            norm_epsilon=self.norm_epsilon,
            out_std=self._out_std,
            dtype=self.dtype,
            implementation=self.attention,
            parent=None,
        )

    @property
    def _out_std(self) -> float:
        return self.width**-0.5 * (2 * self.depth) ** -0.5

    def _init_layers(self, rng: jax.Array) -> Any:
        pictures = Pictures(tokens=jnp.zeros((1, 1, self.picture_width))) if self.picture_width else None
        return stacked_init(self.block, self.depth, jnp.zeros((1, 1, self.width)), None, None, pictures)(rng)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns (B, T, D) of token ids int (B, T), in the compute dtype; positions are added later."""
        return jnp.take(self.token_embed, tokens, axis=0).astype(self.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 (..., V) of final hidden states (..., D)."""
        return self.head(hidden.astype(self.dtype), self.token_embed)

    def make_cache(self, batch: int, size: int, dtype: Any = None) -> PictureCache:
        """Returns an empty cache for `size` tokens a row, in the compute dtype unless told."""
        head_width = self.width // self.heads
        return PictureCache(make_cache(self.depth, batch, size, self.heads, head_width, dtype or self.dtype))

    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        embeddings: jax.Array | None = None,
        pictures: jax.Array | None = None,
        pictures_mask: jax.Array | None = None,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: PictureCache | None = None,
        at: jax.Array | None = None,
        intermediates: Sequence[str] = (),
        final: bool = True,
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Reads rows of tokens, as `tove_jax.models.llama.Llama` does; what is not asked for is not computed.

        Args:
          tokens: int (B, T); or
          embeddings: (B, T, D), in place of what `embed` returns.
          pictures: (B, M, Dv), tokens of each row's pictures; None: those that the cache holds, or none, and then
            cross-attention and its norm are left out.
          pictures_mask: bool (B, M), False for what is no picture token; a row without any is read as if there were
            no pictures.
          mask, cache, at, final: see `Llama`. The cache also holds the pictures' keys and values.
          positions: int (B, T), counted from 0; None: within each text, padding left out.
          intermediates: names among ``embeddings`` (B, T, D), the input of the first layer; ``layers/{i}``, the
            output of layer i, negative counting from the end; ``hidden``, that of the last.

        Returns:
          Logits, float32 (B, T, V) or (B, K, V) (None unless `final`), and a dict with exactly the names asked
          for, and ``cache`` where one was given.

        Raises:
          InputError: both or neither of tokens and embeddings, arrays that do not fit, rows or a cache longer than
            `longest`, pictures without cross-attention, an unknown name.
        """
        text = None if cache is None else cache.text
        shape = check_rows(self.width, tokens, embeddings, mask, text)
        held = self._pictures(pictures, pictures_mask, shape[0], cache)
        packed = mask is not None and mask.dtype != jnp.bool_
        size = shape[1] if text is None else text.mask.shape[1]
        if size > self.longest and not packed:
            raise InputError(f"tokens: expected at most {self.longest} a row, new ones among them, found {size}")
        asked = parse_names(intermediates, self.depth)
        rows = place_rows(shape, mask, positions, text)
        x = self.embed(tokens) if tokens is not None else jnp.asarray(embeddings, self.dtype)
        places = jnp.take(self.position_embed, rows.positions + self.position_offset, axis=0)
        x = constrain(self.embed_norm(x + (places + self.type_embed[0]).astype(self.dtype)), TOKENS)
        found: dict[str, Any] = {"embeddings": x}
        seen = None if mask is None and cache is None else visible(rows.own, rows.keys, rows.first)
        stored = None if held is None or held.keys is None else (held.keys, held.values)

        def call(own: Any) -> tuple[Any, ...]:
            return seen, held if held is None or own is None else held._replace(keys=own[0], values=own[1])

        wanted = final or "hidden" in intermediates or self.is_initializing()
        x, told, text_after = run_layers(
            self.block,
            self.layers,
            x,
            asked,
            data=stored,
            cache=text,
            remat=self.remat,
            output_wanted=wanted,
            call=call,
        )
        found.update(told)
        if text_after is not None:
            found["cache"] = PictureCache(rows.advance(text_after), held)
        logits = None
        if wanted:
            found["hidden"] = x
            if final:
                if at is not None:
                    x = jnp.take_along_axis(x, at[..., None], axis=1)
                logits = self.logits(x)
        names = (*intermediates, "cache") if cache is not None else intermediates
        return logits, {name: found[name] for name in names}

    def _pictures(self, tokens: Any, mask: Any, rows: int, cache: PictureCache | None) -> Pictures | None:
        """Returns what cross-attention reads; with a cache, keys and values of all layers."""
        if tokens is None:
            if mask is not None:
                raise InputError("pictures_mask: expected pictures beside it, found none")
            return None if cache is None else cache.pictures
        if not self.picture_width:
            raise InputError("pictures: this language model has no cross-attention")
        if tokens.ndim != 3 or tokens.shape[0] != rows or tokens.shape[2] != self.picture_width:
            raise InputError(f"pictures: expected ({rows}, tokens, {self.picture_width}), found {tokens.shape}")
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise InputError(f"pictures_mask: expected {tokens.shape[:2]}, found {mask.shape}")
        tokens = constrain(tokens.astype(self.dtype), TOKENS)
        if cache is None:
            return Pictures(tokens=tokens, mask=mask)
        cross = CrossAttention(self.width, self.heads, self._out_std, self.dtype, self.attention, parent=None)
        read: Any = jax.vmap(lambda own: cross.apply({"params": own}, tokens, method="read"))
        keys, values = read(self.layers["cross"])
        return Pictures(keys=keys, values=values, mask=mask)


@functools.lru_cache(maxsize=32)
def abstract_params(module: Roberta) -> Any:
    """Returns the parameter tree as `jax.ShapeDtypeStruct`, float32; nothing is computed."""
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    found: Any = jax.eval_shape(module.init, jax.random.key(0), example)
    return found["params"]
