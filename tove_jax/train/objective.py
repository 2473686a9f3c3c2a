"""Puts student, experts' features and method together into the one loss that the step differentiates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tove_jax import methods
from tove_jax.adapters import mola, mole
from tove_jax.config.schema import Config
from tove_jax.data.conversation import IGNORED
from tove_jax.data.view import View
from tove_jax.experts.base import ExpertFeatures
from tove_jax.experts.manifest import Manifest
from tove_jax.experts.online import Online
from tove_jax.experts.run import standardized
from tove_jax.experts.store import decode_features
from tove_jax.language.loss import next_tokens
from tove_jax.language.model import LanguageModel, text_loss
from tove_jax.language.model import logical_axes as language_axes
from tove_jax.models import vit
from tove_jax.models.attention import choose, platform
from tove_jax.models.tpu_attention import check_kernel
from tove_jax.train.state import TrainState
from tove_jax.train.step import Batch, Loss, make_step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_student(config: Config) -> vit.VisionTransformer:
    """Returns the student with its adapters, computing in ``train.dtype``."""
    return vit.from_config(config.student, dtype=DTYPES[config.train.dtype])


def check_attention(config: Config) -> None:
    """Checks the attention kernels of the student and of a text decoder on a TPU; see `check_kernel`.

    Raises:
      InputError: one of them is wrong on this chip.
    """
    if platform() != "tpu":
        return
    dtype, student, language = DTYPES[config.train.dtype], config.student, config.language
    width = student.width // student.heads
    if choose(student.attention, dtype, width) == "pallas":
        tokens = (student.image_size // student.patch_size) ** 2 + 1
        check_kernel(tokens, student.heads, student.heads, width, dtype)
    width = language.width // language.heads
    if language.kind == "llava" and choose(language.attention, dtype, width) == "pallas":
        check_kernel(config.text.limit, language.heads, language.kv_heads, width, dtype, causal=True)


def make_loss(config: Config, manifests: Mapping[str, Manifest], language: LanguageModel | None = None) -> Loss:
    """Returns ``loss(params, batch, key)``, the mean over the batch's real rows.

    With a language model the text loss joins the method's: ``language.text_weight`` times the mean over the learned
    tokens of the whole batch (see `weigh_text`), and HAWAII's scores read the questions.

    Args:
      config: a whole run's settings.
      manifests: of each expert's store; they say how its payload is decoded on the device. Of an expert whose
        features the batch holds already, such as one that runs in the step, where they are standardised.
      language: the modules of ``config.language``; None where its kind is ``none``.

    Returns:
      A pure function ``(params, batch, key) -> (loss, metrics)`` of `initial_parameters`' tree.
    """
    student = make_student(config)
    view = View.of_student(config.student)
    method = methods.get(config.method.name)

    def _features(name: str, payload: Any) -> ExpertFeatures:
        known = manifests.get(name)
        found = payload if isinstance(payload, ExpertFeatures) else decode_features(manifests[name], payload)
        return found if known is None else standardized(config, name, known, found)

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        text, batch = batch.get("text"), by_picture(batch)
        rows = batch["mask"].shape[0] if text is None else text["labels"].shape[0]
        with jax.named_scope("features"):
            features = {name: _features(name, payload) for name, payload in batch["features"].items()}
        pixels = view.normalize(batch["pixels"])
        outputs = method.forward(student, params, pixels, features, config, key)
        if language is not None and text is not None and "instruction" in text:
            words = text["instruction"].reshape(batch["mask"].shape[0], -1)
            embedded = jax.lax.stop_gradient(language.embed(params["language"], words))
            batch = {**batch, "instruction": embedded, "instruction_mask": words >= 0}
        with jax.named_scope("method"):
            total, metrics = method.objective(params.get("method", {}), outputs, features, batch, config)
        if language is None:
            return total, metrics
        tokens = method.visible_tokens(outputs, config)
        shown = jnp.repeat(batch.get("has_picture", batch["mask"]), tokens.shape[1]).reshape(rows, -1)
        tokens = tokens.reshape(rows, -1, tokens.shape[-1])
        with jax.named_scope("language"):
            told, more = text_loss(language, params["language"], tokens, text, shown)
        told = told / jnp.maximum(batch["mask"].sum(), 1)
        total = total + config.language.text_weight * told
        return total, {**metrics, **more, "loss/text": told, "loss/total": total}

    return loss


def by_picture(batch: Batch) -> Batch:
    """Makes rows of the pictures (B, I, ...) of each row where a row has several; the text stays as it is."""
    if batch["mask"].ndim == 1:
        return batch
    return {
        name: value if name == "text" else jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), value)
        for name, value in batch.items()
    }


def weigh_text(batch: Batch) -> Batch:
    """Gives every row the weight of its learned tokens, so that micro-batches add up to the mean over tokens.

    The step weighs a micro-batch by its share of the real pictures, and the loss divides by their number; with
    ``weight`` = pictures / learned tokens of the whole batch the sum is the mean over the learned tokens, as one
    batch would have it, however they are spread.
    """
    text = batch["text"]
    learned = (next_tokens(text["labels"]) != IGNORED).sum()
    weight = batch["mask"].sum() / jnp.maximum(learned, 1)
    rows = text["labels"].shape[0]
    return {**batch, "text": {**text, "weight": jnp.full((rows,), weight, jnp.float32)}}


def training_step(
    config: Config,
    manifests: Mapping[str, Manifest],
    online: Online,
    language: LanguageModel | None,
    optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Puts a run's step together: what training runs, and what a plan compiles.

    Args:
      config: a whole run's settings.
      manifests: of the stores that are read.
      online: the experts that run in the step.
      language: the modules of ``config.language``; None where its kind is ``none``.
      optimizer: over the flat trainable tree.

    Returns:
      ``step(state, batch, experts) -> (state, metrics)``, see `tove_jax.train.step.make_step`.
    """
    loss = make_loss(config, {**manifests, **online.manifests}, language)
    return make_step(
        config,
        loss,
        optimizer,
        lambda experts, batch: online.prepare(experts, by_picture(batch)),
        None if language is None else weigh_text,
    )


def logical_axes(config: Config) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Returns the first-match table of logical axes of every parameter of a run."""
    language = language_axes(config.language)
    return (
        language
        + vit.LOGICAL_AXES
        + mole.LOGICAL_AXES
        + mola.LOGICAL_AXES
        + methods.get(config.method.name).LOGICAL_AXES
    )


def count(tree: dict[str, Any]) -> int:
    """Returns the number of parameters of a flat tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in tree.values())
