"""Llama and its kin (Vicuna, Mistral, Qwen2 and 2.5): one decoder, its layers stacked and scanned."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.errors import InputError
from tove_jax.models.attention import Implementation, attention
from tove_jax.models.block import LOGICAL_AXES as BLOCK_AXES
from tove_jax.models.block import TOKENS, Linear, Mlp, make_norm, stacked_init
from tove_jax.models.causal import (
    Cache,
    Memory,
    Rope,
    Rows,
    check_rows,
    make_cache,
    parse_names,
    place_rows,
    run_layers,
    turn,
    visible,
)
from tove_jax.models.stack import Remat
from tove_jax.parallel import constrain, flat_paths, map_paths

LOGICAL_AXES = (
    (r"(.*/)?layers/attention/(key|value)/kernel", ("layers", "embed", "kv_heads")),
    (r"(.*/)?layers/attention/(key|value)/bias", ("layers", "kv_heads")),
    *BLOCK_AXES,
    (r"(.*/)?layers/attention/(query|key|value)/a_kernel", ("layers", "embed", None)),
    (r"(.*/)?layers/attention/query/b_kernel", ("layers", None, "heads")),
    (r"(.*/)?layers/attention/(key|value)/b_kernel", ("layers", None, "kv_heads")),
    (r"(.*/)?layers/attention/out/a_kernel", ("layers", "heads", None)),
    (r"(.*/)?layers/mlp/(fc1|gate)/a_kernel", ("layers", "embed", None)),
    (r"(.*/)?layers/mlp/(fc1|gate)/b_kernel", ("layers", None, "mlp")),
    (r"(.*/)?layers/mlp/fc2/a_kernel", ("layers", "mlp", None)),
    (r"(.*/)?layers/(attention/out|mlp/fc2)/b_kernel", ("layers", None, "embed")),
    (r"(.*/)?token_embed", ("vocab", "embed")),
    (r"(.*/)?norm/scale", ("embed",)),
    (r"(.*/)?head/kernel", ("embed", "vocab")),
)
"""First-match rules from parameter paths to logical axis names, under any prefix."""


class CausalAttention(nn.Module):
    """Self-attention of a decoder, several query heads sharing a key and a value head.

    Attributes: see `Llama`; `out_std` is the standard deviation of the output projection's initial weights.
    """

    heads: int
    kv_heads: int
    head_width: int
    out_std: float
    dtype: Any
    implementation: Implementation
    biases: tuple[str, ...]

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: Memory | None,
        tables: tuple[jax.Array, jax.Array] | None,
        mask: jax.Array | None,
        window: int | None = None,
    ) -> tuple[jax.Array, Memory | None]:
        """Returns (B, T, D) and the extended memory.

        Without a mask attention is causal, within `window`; without tables, positions are the tokens' own affair.
        """
        width = x.shape[-1]

        def heads(name: str, count: int, axis: str) -> jax.Array:
            init = nn.initializers.normal(width**-0.5)
            size = count * self.head_width
            y = Linear(size, name in self.biases, dtype=self.dtype, kernel_init=init, name=name)(x)
            return constrain(y.reshape(*y.shape[:-1], count, self.head_width), ("batch", "tokens", axis, None))

        query, key = heads("query", self.heads, "heads"), heads("key", self.kv_heads, "kv_heads")
        if tables is not None:
            query, key = turn(query, tables), turn(key, tables)
        value = heads("value", self.kv_heads, "kv_heads")
        if memory is not None:
            memory, key, value = memory.extend(key, value)
        open_ = mask is None
        y = attention(query, key, value, self.implementation, mask=mask, causal=open_, window=window if open_ else None)
        init = nn.initializers.normal(self.out_std)
        out = Linear(width, "out" in self.biases, dtype=self.dtype, kernel_init=init, name="out")
        return out(y.reshape(*x.shape[:-1], -1)), memory


class Layer(nn.Module):
    """One layer of `Llama`, whose attributes these are."""

    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_epsilon: float
    out_std: float
    dtype: Any
    implementation: Implementation
    biases: tuple[str, ...]
    mlp_bias: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: Memory | None,
        tables: tuple[jax.Array, jax.Array],
        mask: jax.Array | None,
        window: int | None = None,
    ) -> tuple[jax.Array, Memory | None]:
        """Returns (B, T, D) and the extended memory; see `CausalAttention`."""
        attend = CausalAttention(
            self.heads,
            self.kv_heads,
            self.head_width,
            self.out_std,
            self.dtype,
            self.implementation,
            self.biases,
            name="attention",
        )
        mlp = Mlp(self.mlp_width, "silu", self.out_std, self.dtype, gated=True, bias=self.mlp_bias, name="mlp")
        y, memory = attend(make_norm("rms", "norm1", self.norm_epsilon, self.dtype)(x), memory, tables, mask, window)
        x = constrain(x + y, TOKENS)
        y, _ = mlp(make_norm("rms", "norm2", self.norm_epsilon, self.dtype)(x))
        return constrain(x + y, TOKENS), memory


class Llama(nn.Module):
    """Decoder of the Llama family, equal to transformers' Llama, Mistral and Qwen2 models.

    Llama (arXiv:2302.13971, 2307.09288; Vicuna has its architecture), Mistral (arXiv:2310.06825: a sliding window,
    fewer key heads), Qwen2 and Qwen2.5 (arXiv:2407.10671: biases on query, key and value). Parameters, everything
    under ``layers/`` stacked on a leading axis of length ``depth``::

        token_embed (V, D)                   norm/scale (D,)        head/kernel (D, V), unless tied
        layers/norm{1,2}/scale (L, D)
        layers/attention/query/kernel (L, D, heads * d)             layers/attention/out/kernel (L, heads * d, D)
        layers/attention/{key,value}/kernel (L, D, kv_heads * d)    [layers/attention/*/bias]
        layers/mlp/{gate,fc1}/kernel (L, D, F)                      layers/mlp/fc2/kernel (L, F, D)     [biases]

    They are float32 when initialised, may be stored in another dtype, and are cast at use.

    Low-rank updates (LoRA, arXiv:2106.09685) stand in a tree of their own, which `init_lora` draws: beside every
    linear of the layers ``a_kernel`` (L, d_in, r) and ``b_kernel`` (L, r, d_out) under the linear's path. With
    ``module.apply({"params": params, "lora": lora}, ...)`` a linear is ``x W + (x A) B lora_alpha / r``: no kernel is
    merged, and none has a gradient unless it is asked for.

    Attributes:
      vocabulary: V, number of tokens.
      width: D.
      depth: number of layers L.
      heads: attention heads.
      kv_heads: key and value heads; divides `heads`.
      head_width: channels a head d.
      mlp_width: F.
      rope: rotary positions.
      norm_epsilon: of every root-mean-square norm.
      window: tokens that a token sees at most, itself among them; None: all before it.
      window_from: the first layer that has the window.
      biases: which of ``query``, ``key``, ``value`` and ``out`` have one.
      mlp_bias: whether the MLP's linears have one.
      tied: the head is the token embedding.
      lora_rank: rank r of the low-rank updates; 0: none can be given.
      lora_alpha: they are multiplied by lora_alpha / lora_rank.
      dtype: compute dtype; norm statistics, softmax, rotation and logits are float32 at the least.
      attention: see `tove_jax.models.attention.choose`.
      remat: see `tove_jax.models.vit.VisionTransformer`.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    rope: Rope = Rope()
    norm_epsilon: float = 1e-6
    window: int | None = None
    window_from: int = 0
    biases: tuple[str, ...] = ()
    mlp_bias: bool = False
    tied: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    dtype: Any = jnp.float32
    attention: Implementation = "auto"
    remat: Remat = "none"

    def setup(self) -> None:
        init = nn.initializers.normal
        self.token_embed = self.param("token_embed", init(0.02), (self.vocabulary, self.width))
        self.layers = self.param("layers", self._init_layers)
        self.norm = make_norm("rms", "norm", self.norm_epsilon, self.dtype)
        if not self.tied:
            self.head = self.param("head", lambda rng: {"kernel": init(0.02)(rng, (self.width, self.vocabulary))})

    @property
    def block(self) -> Layer:
        """One layer."""
        return Layer(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            mlp_width=self.mlp_width,
            norm_epsilon=self.norm_epsilon,
            out_std=self.width**-0.5 * (2 * self.depth) ** -0.5,
            dtype=self.dtype,
            implementation=self.attention,
            biases=self.biases,
            mlp_bias=self.mlp_bias,
            parent=None,
        )

    def _init_layers(self, rng: jax.Array) -> Any:
        tables = (jnp.ones((1, 1, 1, self.head_width)),) * 2
        block = self.block
        # The memory and the mask are absent, which vmapped initialisation takes as they are.
        return stacked_init(block, self.depth, jnp.zeros((1, 1, self.width)), None, tables, None)(rng)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns (B, T, D) of token ids int (B, T), in the compute dtype."""
        return jnp.take(self.token_embed, tokens, axis=0).astype(self.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 (..., V) of final hidden states (..., D), after the norm."""
        kernel = (self.token_embed.T if self.tied else self.head["kernel"]).astype(self.dtype)
        precise = jnp.promote_types(self.dtype, jnp.float32)
        y = jnp.einsum("...d,dv->...v", hidden.astype(self.dtype), kernel, preferred_element_type=precise)
        return constrain(y, ("batch", *("tokens",) * (y.ndim - 2), "vocab"))

    def make_cache(self, batch: int, size: int, dtype: Any = None) -> Cache:
        """Returns an empty cache for `size` tokens a row, in the compute dtype unless told."""
        return make_cache(self.depth, batch, size, self.kv_heads, self.head_width, dtype or self.dtype)

    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        embeddings: jax.Array | None = None,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        at: jax.Array | None = None,
        intermediates: Sequence[str] = (),
        final: bool = True,
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Reads rows of tokens; what is not asked for is not computed.

        Args:
          tokens: int (B, T); or
          embeddings: (B, T, D), in place of tokens, such as text merged with picture tokens.
          mask: bool (B, T), False for padding on either side; or int, numbers of the texts packed into a row,
            rising from 1, 0 for padding: a token sees its own text alone (without a cache). None: all are
            tokens. Rows padded on the right need no mask, for no token looks ahead; without one, flash attention
            is used where there is one.
          positions: int (B, T) for the rotary embedding; None: counted within each text, padding left out.
          cache: what was read before; the tokens are appended to it.
          at: int (B, K), places whose logits are wanted; None: all.
          intermediates: names among ``embeddings`` (B, T, D), the input of the first layer; ``layers/{i}``
            (B, T, D), the output of layer i, negative counting from the end; ``hidden`` (B, T, D), the last
            layer's output after the final norm.
          final: whether logits are wanted; without them, layers after the last one asked for are not run.

        Returns:
          Logits, float32 (B, T, V) or (B, K, V) (None unless `final`), and a dict with exactly the names asked
          for, and ``cache`` where one was given.

        Raises:
          InputError: both or neither of tokens and embeddings, arrays that do not fit, an unknown name.
        """
        shape = check_rows(self.width, tokens, embeddings, mask, cache)
        asked = parse_names(intermediates, self.depth)
        x = constrain(self.embed(tokens) if tokens is not None else jnp.asarray(embeddings, self.dtype), TOKENS)
        found: dict[str, Any] = {"embeddings": x}
        rows = place_rows(shape, mask, positions, cache)
        tables = self.rope.tables(self.head_width, rows.positions)
        call, data = self._masks(mask is None and cache is None, rows, tables)
        wanted = final or "hidden" in intermediates
        x, told, cache_after = run_layers(
            self.block,
            self.layers,
            x,
            asked,
            data=data,
            cache=cache,
            beside=self._lora(),
            remat=self.remat,
            output_wanted=wanted or self.is_initializing(),
            call=call,
        )
        found.update(told)
        if cache is not None and cache_after is not None:
            found["cache"] = rows.advance(cache_after)
        logits = None
        if wanted or self.is_initializing():
            hidden = found["hidden"] = self.norm(x)
            if final:
                if at is not None:
                    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
                logits = self.logits(hidden)
        names = (*intermediates, "cache") if cache is not None else intermediates
        return logits, {name: found[name] for name in names}

    def _lora(self) -> dict[str, Any]:
        """Returns the layers' low-rank updates, scaled, as a collection of variables."""
        if not self.has_variable("lora", "layers"):
            return {}
        if not self.lora_rank:
            raise InputError("lora: found low-rank updates, but the model's lora_rank is 0")
        scale = self.lora_alpha / self.lora_rank
        layers: Any = self.get_variable("lora", "layers")
        return {"lora": map_paths(lambda path, leaf: leaf * scale if path.endswith("b_kernel") else leaf, layers)}

    def _masks(self, open_: bool, rows: Rows, tables: Any) -> tuple[Any, Any]:
        """Returns what each layer is called with, as a function of its own data, and that data."""
        mixed = self.window is not None and 0 < self.window_from < self.depth
        window = None if self.window is None or self.window_from >= self.depth else self.window
        if open_ and not mixed:
            return (lambda _: (tables, None, window)), None
        near = visible(rows.own, rows.keys, rows.first, window)
        if not mixed:
            return (lambda _: (tables, near, None)), None
        far = visible(rows.own, rows.keys, rows.first)
        # All layers share one compiled body, so the choice between the two masks is data.
        return (lambda own: (tables, jnp.where(own, near, far), None)), jnp.arange(self.depth) >= self.window_from


@functools.lru_cache(maxsize=32)
def abstract_params(module: Llama) -> Any:
    """Returns the parameter tree as `jax.ShapeDtypeStruct`, float32; nothing is computed."""
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    found: Any = jax.eval_shape(module.init, jax.random.key(0), example)
    return found["params"]


def init_lora(module: Llama, rng: jax.Array) -> dict[str, Any]:
    """Draws fresh updates: A uniform within 1 / sqrt(d_in), as peft draws it, B zero, so the model is as before.

    Args:
      module: with a `lora_rank`.
      rng: key.

    Returns:
      ``{"layers": ...}``, float32.

    Raises:
      InputError: its rank is not positive.
    """
    if module.lora_rank < 1:
        raise InputError(f"lora: expected a rank of at least 1, found {module.lora_rank}")
    tree: dict[str, Any] = {}
    for number, (path, kernel) in enumerate(_kernels(abstract_params(module)).items()):
        depth, width, features = kernel.shape
        bound = 1 / math.sqrt(width)
        a_shape = (depth, width, module.lora_rank)
        a = jax.random.uniform(jax.random.fold_in(rng, number), a_shape, jnp.float32, -bound, bound)
        node = tree
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node |= {"a_kernel": a, "b_kernel": jnp.zeros((depth, module.lora_rank, features))}
    return tree


def merge_lora(module: Llama, params: Any, lora: Any) -> dict[str, Any]:
    """Returns parameters whose kernels hold the updates: ``W + A B alpha / r``, summed in float32.

    Args:
      module: with the `lora_rank` and `lora_alpha` of the training.
      params: its tree; the dtypes stay.
      lora: what `init_lora` returned, trained.

    Raises:
      InputError: updates for something else, or of another rank.
    """
    kernels, found = _kernels(params), flat_paths(lora)
    expected = {}
    for path, kernel in kernels.items():
        depth, width, features = kernel.shape
        expected[f"{path}/a_kernel"] = (depth, width, module.lora_rank)
        expected[f"{path}/b_kernel"] = (depth, module.lora_rank, features)
    shapes = {path: np.shape(leaf) for path, leaf in found.items()}
    if shapes != expected:
        wrong = sorted(path for path in {*shapes, *expected} if shapes.get(path) != expected.get(path))
        raise InputError(
            f"lora: {wrong[0]}: expected {expected.get(wrong[0], 'nothing')}, found {shapes.get(wrong[0], 'nothing')}"
        )
    scale = module.lora_alpha / module.lora_rank

    def merged(path: str, leaf: Any) -> Any:
        name = path.removesuffix("/kernel")
        if name == path or name not in kernels:
            return leaf
        a, b = (jnp.asarray(found[f"{name}/{part}_kernel"], jnp.float32) for part in "ab")
        precise = jnp.promote_types(leaf.dtype, jnp.float32)
        return (jnp.asarray(leaf, precise) + scale * jnp.einsum("lir,lro->lio", a, b)).astype(leaf.dtype)

    return map_paths(merged, params)


def _kernels(params: Any) -> dict[str, Any]:
    """Returns the layers' kernels by path, without the last part."""
    return {
        path.removesuffix("/kernel"): leaf
        for path, leaf in flat_paths(params).items()
        if path.startswith("layers/") and path.endswith("/kernel")
    }
