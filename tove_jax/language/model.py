"""The language side of a run: the model that reads the student's tokens, its text loss and its parameters.

Kinds, B rows, T positions, N picture tokens of width D, decoder width W:

    llava    X = [text embeddings, projector(tokens) in the places of the pictures]     (LLaVA-1.5, arXiv 2310.03744)
    tove     X = text embeddings; every layer attends to the tokens                     (ToVE, arXiv 2504.00691)
    L_text   = sum of -log p(next token) over the learned positions of the batch / their number

Parameters: ``{"projector", "model", "lora"}``, those that the kind has.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tove_jax.config.schema import LanguageConfig
from tove_jax.data.conversation import IGNORED
from tove_jax.errors import InputError
from tove_jax.hf import llama as hf_llama
from tove_jax.hf.load import locate, read_json
from tove_jax.language.loss import next_tokens, token_losses
from tove_jax.models import llama, projector
from tove_jax.models.llama import Llama
from tove_jax.models.llava import place_pictures
from tove_jax.models.projector import Projector

_SHAPE_FIELDS = {"width": "width", "layers": "depth", "heads": "heads", "mlp_width": "mlp_width"}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The modules of a run's language side.

    Attributes:
      config: the settings.
      decoder: the language model.
      projector: from the student's width to its own; None for ``tove``.
    """

    config: LanguageConfig
    decoder: Any
    projector: Projector | None

    def project(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Maps picture tokens (..., D) to (..., W)."""
        if self.projector is None:
            return tokens
        return self.projector.apply({"params": params["projector"]}, tokens)

    def embed(self, params: Any, ids: jax.Array) -> jax.Array:
        """Returns the decoder's input embeddings (..., W) of ids int (...,); negative ones as those of id 0."""
        return self.decoder.apply({"params": params["model"]}, jnp.maximum(ids, 0), method="embed")

    def inputs(
        self, params: Any, tokens: jax.Array, input_ids: jax.Array, shown: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns what the decoder is called with beside masks.

        Args:
          params: the language parameters.
          tokens: (B, M, D), each row's picture tokens in order.
          input_ids: int (B, T), `IMAGE_ID` in the places of the pictures where they have any.
          shown: bool (B, M), False for tokens that stand for no picture; a decoder that looks across leaves them out,
            the others have no place for them. None: all are of pictures.
        """
        if self.projector is None:
            masked = {} if shown is None else {"pictures_mask": shown}
            return {"tokens": jnp.maximum(input_ids, 0), "pictures": tokens, **masked}
        merged = place_pictures(self.embed(params, input_ids), input_ids, self.project(params, tokens))
        return {"embeddings": merged}

    def variables(self, params: Any) -> dict[str, Any]:
        """Returns what `decoder.apply` takes."""
        found = {"params": params["model"]}
        return found | ({"lora": params["lora"]} if "lora" in params else {})


def text_loss(
    model: LanguageModel,
    params: Any,
    tokens: jax.Array,
    text: dict[str, jax.Array],
    shown: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes L_text of a batch, or of its share in it.

    Args:
      model: the modules.
      params: ``{"projector", "model", "lora"}``.
      tokens: (B, M, D), each row's picture tokens in order.
      text: ``input_ids``, ``labels`` int and ``attention_mask`` bool (B, T), and optionally ``segments`` int (B, T),
        see `Llama.__call__`; ``weight`` float32 (B,), see `tove_jax.train.objective.weigh_text`: what a learned token of the row counts.
      shown: bool (B, M), see `LanguageModel.inputs`.

    Returns:
      The sum over the learned tokens of weight times loss, and scalars: ``text/accuracy``, the share of learned
      tokens that were the likeliest, ``text/learned`` and ``text/padding``, shares of all positions.
    """
    inputs, variables = model.inputs(params, tokens, text["input_ids"], shown), model.variables(params)
    result: Any = model.decoder.apply(
        variables, **inputs, mask=text.get("segments"), intermediates=("hidden",), final=False
    )
    targets = next_tokens(text["labels"])
    losses, right = token_losses(
        result[1]["hidden"],
        targets,
        lambda hidden: model.decoder.apply(variables, hidden, method="logits"),
        smoothing=model.config.label_smoothing,
        chunk=model.config.loss_chunk,
    )
    learned = targets != IGNORED
    total = (losses * text["weight"][:, None]).sum()
    metrics = {
        "text/accuracy": right.sum() / jnp.maximum(learned.sum(), 1),
        "text/learned": learned.mean(),
        "text/padding": 1 - text["attention_mask"].mean(),
    }
    return total, metrics


def logical_axes(config: LanguageConfig) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Returns the first-match table of the parameters under ``language/``; nothing for the kind ``none``."""
    if config.kind == "none":
        return ()
    tables = projector.LOGICAL_AXES + _decoder_tables(config)
    return tuple((f"language/{pattern}", names) for pattern, names in tables)


def _decoder_tables(config: LanguageConfig) -> Any:
    if config.kind == "tove":
        from tove_jax.models import roberta

        return roberta.LOGICAL_AXES
    return llama.LOGICAL_AXES


def build(
    config: LanguageConfig, vocabulary: int, student_width: int, *, dtype: Any = jnp.float32, read: bool = True
) -> LanguageModel:
    """Builds the modules.

    Args:
      config: the settings; ``kind`` is not ``none``.
      vocabulary: tokens of the tokenizer.
      student_width: D.
      dtype: compute dtype.
      read: take what shapes do not tell (rotary embedding, norms, biases) from the config.json of
        ``initialize``; else Llama's are taken, which is enough to plan by.

    Raises:
      InputError: a language model of another shape than the settings say, or of fewer tokens than the tokenizer.
    """
    options = {"dtype": dtype, "attention": config.attention, "remat": config.remat}
    if config.initialize and read:
        decoder = _read_decoder(config, student_width, options)
    elif config.kind == "tove":
        from tove_jax.models.roberta import Roberta

        decoder = Roberta(
            vocabulary=config.vocabulary or vocabulary,
            width=config.width,
            depth=config.layers,
            heads=config.heads,
            mlp_width=config.mlp_width,
            picture_width=student_width,
            adaptor_width=config.adaptor_width,
            **options,
        )
    else:
        if config.heads % config.kv_heads or config.width % (2 * config.heads):
            raise InputError(
                f"config.language: width {config.width}, heads {config.heads} and kv_heads {config.kv_heads} do not fit"
            )
        decoder = Llama(
            vocabulary=config.vocabulary or vocabulary,
            width=config.width,
            depth=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.width // config.heads,
            mlp_width=config.mlp_width,
            norm_epsilon=1e-5,
            **_lora_options(config),
            **options,
        )
    if decoder.vocabulary < vocabulary:
        raise InputError(
            f"config.text.tokenizer: has {vocabulary} tokens, the language model tells {decoder.vocabulary} apart"
        )
    if config.kind == "tove":
        return LanguageModel(config, decoder, None)
    return LanguageModel(config, decoder, Projector(config.width, config.projector, dtype))


def _lora_options(config: LanguageConfig) -> dict[str, Any]:
    return {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha} if config.lora_rank else {}


def _read_decoder(config: LanguageConfig, student_width: int, options: dict[str, Any]) -> Any:
    folder = locate(config.initialize)
    content = read_json(folder / "config.json")
    if config.kind == "tove":
        from tove_jax.hf import roberta

        options = {"picture_width": student_width, "adaptor_width": config.adaptor_width, **options}
        decoder: Any = roberta.from_config(content, str(folder / "config.json"), **options)
    else:
        decoder = hf_llama.from_config(content, str(folder / "config.json"), **_lora_options(config), **options)
    fields = _SHAPE_FIELDS | ({"kv_heads": "kv_heads"} if config.kind == "llava" else {})
    fields |= {"vocabulary": "vocabulary"} if config.vocabulary else {}
    for ours, theirs in fields.items():
        if getattr(config, ours) != getattr(decoder, theirs):
            raise InputError(
                f"config.language.{ours} is {getattr(config, ours)}, but {config.initialize} has "
                f"{getattr(decoder, theirs)}"
            )
    return decoder


def fresh(model: LanguageModel, student_width: int, rng: jax.Array) -> dict[str, Any]:
    """Draws what no published file has: the projector, and low-rank updates; float32."""
    first, second = jax.random.split(rng)
    found: dict[str, Any] = {}
    if model.projector is not None:
        found["projector"] = model.projector.init(first, jnp.zeros((1, 1, student_width)))["params"]
    if model.config.lora_rank and model.config.kind == "llava":
        found["lora"] = llama.init_lora(model.decoder, second)
    return found


def tokenizer_source(language: LanguageConfig, tokenizer: str, workdir: Path) -> str:
    """Returns the folder or hub id of the tokenizer: as told, that of the language model, or the run's own."""
    return tokenizer or language.initialize or str(workdir / "tokenizer")
