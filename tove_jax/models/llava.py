"""LLaVA: a vision tower, a projector and a language model that reads picture tokens between those of its text."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tove_jax.data.conversation import IMAGE_ID
from tove_jax.errors import InputError
from tove_jax.models import llama, projector, vit
from tove_jax.models.llama import Llama
from tove_jax.models.projector import Projector
from tove_jax.models.vit import VisionTransformer, encode


def logical_axes() -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Returns first-match rules from parameter paths of a whole model to logical axis names."""
    # The decoder's own come first and under its own prefix: its key heads are fewer than its heads, the tower's are not.
    decoder = tuple((rule.replace("(.*/)?", "(.*/)?language/model/", 1), axes) for rule, axes in llama.LOGICAL_AXES)
    return ((r"(.*/)?newline", ("embed",)), *decoder, *projector.LOGICAL_AXES, *vit.logical_axes())


def place_pictures(embeddings: jax.Array, input_ids: jax.Array, tokens: jax.Array) -> jax.Array:
    """Puts picture tokens where a row's ids have their placeholder.

    The k-th position of a row that holds `IMAGE_ID` takes the row's k-th picture token; tokens beyond a row's
    positions are left out, and a position beyond the row's tokens becomes NaN, so that the fault is seen.

    Args:
      embeddings: of the text, (B, T, W); at the positions of pictures anything, such as that of token 0.
      input_ids: int (B, T).
      tokens: (B, M, W), of each row's pictures in order; M may be 0.

    Returns:
      (B, T, W), in the dtype of `embeddings`.

    Raises:
      InputError: shapes that do not fit each other.
    """
    rows, length, width = embeddings.shape
    if input_ids.shape != (rows, length) or tokens.ndim != 3 or (tokens.shape[0], tokens.shape[2]) != (rows, width):
        raise InputError(
            f"pictures: expected embeddings (B, T, W), ids (B, T) and tokens (B, M, W), found {embeddings.shape}, "
            f"{input_ids.shape} and {tokens.shape}"
        )
    here = input_ids == IMAGE_ID
    if not tokens.shape[1]:
        return jnp.where(here[..., None], jnp.nan, embeddings)
    slots = jnp.cumsum(here, axis=1) - 1
    # Before the first picture the slot is -1; what it takes there is not used, yet must exist for its gradient's sake.
    taken = jnp.take_along_axis(tokens, jnp.maximum(slots, 0)[..., None], axis=1, mode="fill")
    return jnp.where(here[..., None], taken.astype(embeddings.dtype), embeddings)


def pack_pictures(tokens: jax.Array, newline: jax.Array, index: jax.Array) -> jax.Array:
    """Puts the tokens of LLaVA-NeXT's tiles in order, by one gather.

    Args:
      tokens: (B, K, N, W), of each row's tiles.
      newline: (W,), ends a line of patches.
      index: int (B, M): numbers of the row's tokens, K * N for the newline, -1 for nothing; see
        `tove_jax.data.anyres.Anyres.index`.

    Returns:
      (B, M, W), zeros where there is nothing.
    """
    rows, tiles, count, width = tokens.shape
    line = jnp.broadcast_to(newline.astype(tokens.dtype), (rows, 1, width))
    table = jnp.concatenate([tokens.reshape(rows, tiles * count, width), line], axis=1)
    taken = jnp.take_along_axis(table, jnp.maximum(index, 0)[..., None], axis=1, mode="fill")
    return jnp.where((index >= 0)[..., None], taken, 0)


@dataclasses.dataclass(frozen=True)
class Llava:
    """LLaVA-1.5 (Liu et al., arXiv:2310.03744) and LLaVA-NeXT, equal to transformers' classes of these names.

    Parameters: ``{"student": the tower's, "language": {"projector", "model": the decoder's, ["newline" (W,)]}}``.

    Attributes:
      tower: the vision tower, with or without adapters.
      projector: from its tokens to the decoder's.
      decoder: the language model.
      feature: which of the tower's layers is read (see `VisionTransformer`), or several, side by side.
      keep_class: CLS is read too (transformers' strategy ``full``).
      anyres: pictures come in tiles (LLaVA-NeXT), whose lines end with the parameter ``newline``.
    """

    tower: VisionTransformer
    projector: Projector
    decoder: Llama
    feature: str | tuple[str, ...] = "layers/-2"
    keep_class: bool = False
    anyres: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """The layers that are read."""
        return (self.feature,) if isinstance(self.feature, str) else self.feature

    @property
    def tokens(self) -> int:
        """Tokens of a picture, or of a tile, N."""
        return self.tower.grid**2 + self.keep_class

    def tower_tokens(self, params: Any, pixels: jax.Array) -> jax.Array:
        """Returns (..., N, D), what the projector reads of pictures (..., S, S, 3), normalised."""
        flat = pixels.reshape(-1, *pixels.shape[-3:])
        found = encode(self.tower, params["student"], flat, self.features)
        tokens = jnp.concatenate([found[name] for name in self.features], axis=-1)
        tokens = tokens if self.keep_class else tokens[:, 1:]
        return tokens.reshape(*pixels.shape[:-3], *tokens.shape[1:])

    def project(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Returns (..., W) of the tower's tokens (..., D)."""
        result: Any = self.projector.apply({"params": params["language"]["projector"]}, tokens)
        return result

    def embed(self, params: Any, input_ids: jax.Array) -> jax.Array:
        """Returns (B, T, W) of token ids int (B, T); placeholders get the embedding of token 0."""
        ids = jnp.maximum(input_ids, 0)
        result: Any = self.decoder.apply({"params": params["language"]["model"]}, ids, method="embed")
        return result

    def embeddings(
        self, params: Any, pixels: jax.Array | None, input_ids: jax.Array, *, index: jax.Array | None = None
    ) -> jax.Array:
        """Returns (B, T, W), what the decoder reads: text, with the pictures' tokens at their placeholders.

        Args:
          params: see the class.
          pixels: float (B, I, S, S, 3), each row's pictures, or all of its pictures' tiles, normalised; places that no
            placeholder asks for may hold anything. None: there are none.
          input_ids: int (B, T), `IMAGE_ID` at every position of a picture.
          index: int (B, M), with tiles; see `pack_pictures`.

        Raises:
          InputError: arrays that do not fit, tiles without an index or the reverse.
        """
        text = self.embed(params, input_ids)
        if pixels is None:
            return place_pictures(text, input_ids, jnp.zeros((text.shape[0], 0, text.shape[2]), text.dtype))
        if pixels.ndim != 5 or pixels.shape[0] != input_ids.shape[0]:
            raise InputError(
                f"pixels: expected ({input_ids.shape[0]} rows, pictures, side, side, 3), found {pixels.shape}"
            )
        if (index is not None) != self.anyres:
            raise InputError(
                "index: expected one, for pictures in tiles" if self.anyres else "index: expected none, without tiles"
            )
        tokens = self.project(params, self.tower_tokens(params, pixels))
        if index is not None:
            packed = pack_pictures(tokens, params["language"]["newline"], index)
        else:
            packed = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
        return place_pictures(text, input_ids, packed)

    def logits(
        self,
        params: Any,
        pixels: jax.Array | None,
        input_ids: jax.Array,
        *,
        mask: jax.Array | None = None,
        index: jax.Array | None = None,
    ) -> jax.Array:
        """Returns float32 (B, T, V); `mask` is the decoder's, the other arguments are those of `embeddings`."""
        merged = self.embeddings(params, pixels, input_ids, index=index)
        result: Any = self.decoder.apply({"params": params["language"]["model"]}, embeddings=merged, mask=mask)
        return result[0]

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Draws the parameters, float32."""
        keys = jax.random.split(rng, 4)
        side, width = self.tower.image_size, self.tower.width * len(self.features)
        language = {
            "projector": self.projector.init(keys[1], jnp.zeros((1, 1, width)))["params"],
            "model": self.decoder.init(keys[2], jnp.zeros((1, 1), jnp.int32))["params"],
        }
        if self.anyres:
            language["newline"] = self.decoder.width**-0.5 * jax.random.normal(keys[3], (self.decoder.width,))
        return {"student": self.tower.init(keys[0], jnp.zeros((1, side, side, 3)))["params"], "language": language}


def abstract_params(model: Llava) -> Any:
    """Returns the parameter tree as `jax.ShapeDtypeStruct`; nothing is computed."""
    return jax.eval_shape(model.init, jax.random.key(0))
