"""CLIP's vision transformer, its layers stacked and scanned, with named intermediates on request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.adapters import encoder_adapter, mola, mole
from tove_jax.config.schema import StudentConfig
from tove_jax.errors import InputError
from tove_jax.models import block as blocks
from tove_jax.models.attention import Implementation
from tove_jax.models.block import TOKENS, Block, PatchEmbed, layer_norm, stacked_init
from tove_jax.models.stack import parse, run_stack
from tove_jax.parallel import constrain

LOGICAL_AXES = (
    (r"(.*/)?class_embed", ("embed",)),
    (r"(.*/)?position_embed", ("tokens", "embed")),
    (r"(.*/)?(pre|post)_norm/(scale|bias)", ("embed",)),
    *blocks.LOGICAL_AXES,
)


def logical_axes() -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Returns first-match rules from parameter paths to logical axis names, a name a dimension.

    They cover the student, its adapters and the method's encoder adapters, under any prefix.
    """
    return LOGICAL_AXES + mole.LOGICAL_AXES + mola.LOGICAL_AXES + encoder_adapter.LOGICAL_AXES


class VisionTransformer(nn.Module):
    """CLIP's vision tower (Radford et al., arXiv 2103.00020), equal to transformers' CLIPVisionModel.

    Parameters, everything under ``layers/`` stacked on a leading axis of length ``depth``::

        patch_embed/kernel (p, p, 3, D)   class_embed (D,)   position_embed (1+N, D)
        pre_norm/{scale,bias} (D,)        post_norm/{scale,bias} (D,)
        layers/norm{1,2}/{scale,bias}
        layers/attention/{query,key,value,out}/{kernel (L, D, D), bias (L, D)}
        layers/mlp/fc1/{kernel (L, D, F), bias}    layers/mlp/fc2/{kernel (L, F, D), bias}
        layers/mlp/adapter/...                     the adapter's own

    They are float32 when initialised, may be stored in another dtype, and are cast at use. Random
    initialisation is that of OpenAI's released CLIP.

    Attributes:
      image_size: side of the picture, pixels.
      patch_size: side of a patch, pixels; what is left over at the right and bottom is cut off.
      width: D.
      depth: number of layers L.
      heads: attention heads; divides the width.
      mlp_width: F.
      activation: ``quick_gelu`` or (exact) ``gelu``.
      norm_epsilon: of every layer norm.
      adapter: factory ``(name=...) -> module`` called as `tove_jax.adapters.mole.MoLE` is, or None; the
        MLP's own maps that it is given are bound `flax.linen.Dense`.
      dtype: compute dtype; norm statistics and softmax are float32 at the least.
      attention: see `tove_jax.models.attention.choose`.
      remat: ``none``; ``dots`` keeps the products with weights and computes the rest of a layer
        again in the backward pass; ``full`` keeps only each layer's input.
      frozen_below: the backward pass ends at this layer's input: layers before it and the embedding get no
        gradient, and none is computed.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_epsilon: float = 1e-5
    adapter: Callable[..., nn.Module] | None = None
    dtype: Any = jnp.float32
    attention: Implementation = "auto"
    remat: Literal["none", "dots", "full"] = "none"
    frozen_below: int = 0

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @nn.compact
    def __call__(
        self,
        pixels: jax.Array,
        *,
        intermediates: Sequence[str] = (),
        final: bool = True,
        deterministic: bool = True,
        adapter_inputs: Any = None,
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Encodes pictures; what is not asked for is not computed.

        Args:
          pixels: float (B, image_size, image_size, 3), normalised.
          intermediates: names among ``embeddings`` (B, 1+N, D), the input of the first layer, after
            the pre-norm; ``layers/{i}`` (B, 1+N, D), the output of layer i, negative counting from
            the end (``layers/-2`` is transformers' ``hidden_states[-2]``); ``layers/{i}/attention_cls``
            and ``layers/{i}/attention_cls_scores`` (B, heads, 1+N), the row of CLS after and before
            the softmax; ``adapter/{report}`` (L, B, ...), what every layer's adapter reports;
            ``pooled`` (B, D), the post-norm of the last layer's CLS.
          final: whether the last layer's tokens are wanted; without them, layers after the last one
            asked for are not run (the adapters' reports ask for every layer's router).
          deterministic: no dropout; otherwise the rng ``dropout`` is needed.
          adapter_inputs: pytree given to the adapter of every layer alike.

        Returns:
          (B, 1+N, D), the last layer's tokens without a norm (None unless ``final``), and a dict
          with exactly the names asked for.

        Raises:
          InputError: pixels of another shape, an unknown name, a layer out of range.
        """
        size, depth = self.image_size, self.depth
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise InputError(f"pixels: expected (batch, {size}, {size}, 3), found {pixels.shape}")
        asked = parse(intermediates, depth, ("embeddings", "pooled"), adapter=self.adapter is not None)
        pooled = "pooled" in intermediates or self.is_initializing()
        x = self._embed(pixels)
        found = {"embeddings": x}
        block = Block(
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            norm_epsilon=self.norm_epsilon,
            depth=depth,
            dtype=self.dtype,
            implementation=self.attention,
            adapter=self.adapter,
            parent=None,
        )
        stacked = self.param("layers", stacked_init(block, depth, jnp.zeros((1, 1, self.width), jnp.float32)))
        keys = None
        if not deterministic and self.adapter is not None:
            keys = jax.random.split(self.make_rng("dropout"), depth)
        x, told = run_stack(
            block,
            stacked,
            x,
            asked,
            output_wanted=final or pooled,
            inputs=adapter_inputs,
            keys=keys,
            remat=self.remat,
            frozen_below=self.frozen_below,
        )
        found.update(told)
        post_norm = layer_norm("post_norm", self.norm_epsilon, self.dtype)
        if pooled:
            found["pooled"] = post_norm(x[:, 0])
        return (x if final else None), {name: found[name] for name in intermediates}

    def _embed(self, pixels: jax.Array) -> jax.Array:
        grid, width = self.grid, self.width
        init = nn.initializers.normal
        patches = PatchEmbed(self.patch_size, width, dtype=self.dtype, name="patch_embed")(pixels)
        class_embed = self.param("class_embed", init(width**-0.5), (width,))
        position = self.param("position_embed", init(width**-0.5), (1 + grid * grid, width))
        x = patches.reshape(-1, grid * grid, width)
        cls = jnp.broadcast_to(class_embed.astype(self.dtype), (x.shape[0], 1, width))
        x = jnp.concatenate([cls, x], axis=1) + position.astype(self.dtype)
        return constrain(layer_norm("pre_norm", self.norm_epsilon, self.dtype)(x), TOKENS)


def encode(
    module: VisionTransformer,
    params: Any,
    pixels: jax.Array,
    names: Sequence[str],
    key: jax.Array | None = None,
    adapter_inputs: Any = None,
) -> dict[str, jax.Array]:
    """Returns the named intermediates alone, skipping the layers that none of them needs.

    Args:
      module: the encoder.
      params: its tree.
      pixels: (B, size, size, 3), normalised.
      names: see `VisionTransformer.__call__`.
      key: of dropout; None: no dropout.
      adapter_inputs: see there.
    """
    result: Any = module.apply(
        {"params": params},
        pixels,
        intermediates=tuple(names),
        final=False,
        deterministic=key is None,
        rngs=None if key is None else {"dropout": key},
        adapter_inputs=adapter_inputs,
    )
    return result[1]


def from_config(config: StudentConfig, dtype: Any = jnp.float32) -> VisionTransformer:
    """Builds the student.

    Args:
      config: its settings.
      dtype: compute dtype.

    Raises:
      InputError: heads that do not divide the width, or a patch larger than the picture.
    """
    if config.width % config.heads:
        raise InputError(f"student.heads: {config.heads} does not divide student.width {config.width}")
    if not 0 < config.patch_size <= config.image_size:
        raise InputError(f"student.patch_size: {config.patch_size} does not fit student.image_size {config.image_size}")
    return VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.width,
        depth=config.layers,
        heads=config.heads,
        mlp_width=config.mlp_width,
        activation=config.activation,
        norm_epsilon=config.norm_epsilon,
        adapter=(mola if config.adapter.kind == "mola" else mole).from_config(config.adapter, dtype),
        dtype=dtype,
        attention=config.attention,
        remat=config.remat,
    )
