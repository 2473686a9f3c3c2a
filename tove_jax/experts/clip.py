"""The `clip` expert: a frozen copy of the student's start, with its attention from CLS."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tove_jax.config.schema import StudentConfig
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.experts.published import DTYPES
from tove_jax.files.weights import hash_arrays

CARD = ExpertCard(
    name="clip",
    title="CLIP vision tower, the student's start",
    paper="Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, "
    "arXiv:2103.00020",
    weights="the CLIP folder or hub id the student starts from (MoVE-KD: openai/clip-vit-large-patch14-336)",
    licence="that of the chosen weights",
    view=View(size=336),
    grid=(24, 24),
    width=1024,
    summary_width=1024,
    has_cls_attention=True,
    backend="jax",
    checked_against="transformers' CLIPVisionModel",
)


def read_view(folder: Path, size: int) -> View:
    """Returns the view that a CLIP folder's preprocessor_config.json describes, at `size` pixels.

    Args:
      folder: a Hugging Face folder; without that file, CLIP's published view is taken.
      size: side that the network is run at; where the file's differs, its shorter side before the
        cut is scaled with it.

    Raises:
      InputError: the file is no JSON object, or holds a setting no view expresses.
    """
    from tove_jax.hf.load import read_json

    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return View(size)
    view = View.from_preprocessor(read_json(path), str(path))
    resize = view.resize and round(view.resize * size / view.size)
    return dataclasses.replace(view, size=size, resize=resize)


def _feature(student: StudentConfig, feature: str | None) -> str:
    feature = feature or student.feature
    match = re.fullmatch(r"layers/(-?\d+)", feature)
    if not match or not -student.layers <= int(match[1]) < student.layers:
        raise InputError(
            f"expert clip: feature: expected layers/<i> of an encoder of {student.layers} layers, found {feature!r}"
        )
    return feature


def _folder(weights: Path | None) -> Path:
    from tove_jax.hf.load import locate

    if weights is None:
        raise InputError("expert clip: weights: expected the CLIP folder that the student starts from, found none")
    return locate(weights)


def _card(folder: Path, student: StudentConfig, weights: Path) -> ExpertCard:
    from tove_jax.hf.clip import shapes

    grid = student.image_size // student.patch_size
    return dataclasses.replace(
        CARD,
        weights=str(weights),
        view=read_view(folder, student.image_size),
        grid=(grid, grid),
        width=student.width,
        summary_width=student.width,
        parameters=sum(math.prod(shape) for shape in shapes(student).values()),
    )


def describe(
    *, weights: Path | None = None, size: int | None = None, feature: str | None = None, dtype: str = "float32"
) -> ExpertCard:
    """Returns the card of a CLIP folder, from its configuration files.

    Arguments and errors as `load`.
    """
    from tove_jax.hf.load import read_student

    folder = _folder(weights)
    student = read_student(folder)
    _feature(student, feature)
    _check_size(student, size)
    return _card(folder, dataclasses.replace(student, image_size=size or student.image_size), weights)


def _check_size(student: StudentConfig, size: int | None) -> None:
    if size is not None and (not isinstance(size, int) or size < student.patch_size):
        raise InputError(
            f"expert clip: size: expected at least one patch of {student.patch_size} pixels, found {size!r}"
        )


def load(
    *, weights: Path | None = None, size: int | None = None, feature: str | None = None, dtype: str = "float32"
) -> Expert:
    """Loads the vision tower of a CLIP folder.

    Args:
      weights: folder or hub id; the student's ``initialize``.
      size: pixels a side; position embeddings are resized when it is not the folder's own.
      feature: ``layers/<i>``, the layer whose output is given; None: as the folder's config.json
        says, ``layers/-2`` where it does not.
      dtype: compute dtype, ``float32``, ``bfloat16`` or ``float16``; parameters stay float32.

    Returns:
      An expert whose patches (B, H, W, D) and summary (B, D) are the patch tokens and CLS after
      that layer, without a norm, and whose `cls_attention` and `cls_scores` (B, H * W) are of the
      same layer's attention: for ``layers/-2``, transformers' ``hidden_states[-2]`` and
      ``attentions[-2]`` (MoVE-KD's teacher). The hash is of the tower's parameters as used.

    Raises:
      InputError: no folder given, not a CLIP's, or no such layer.
    """
    from tove_jax.hf.load import load_clip, read_student
    from tove_jax.hf.rules import flatten

    folder = _folder(weights)
    if dtype not in DTYPES:
        raise InputError(f"expert clip: dtype: expected {', '.join(DTYPES)}, found {dtype!r}")
    _check_size(read_student(folder), size)
    fields, params = load_clip(folder, image_size=size)
    student = StudentConfig(**fields)
    layer = _feature(student, feature)
    digest, params = hash_arrays(flatten(params)), jax.tree.map(jnp.asarray, params)
    return expert(_card(folder, student, weights), student, layer, params, digest, dtype)


def expert(
    card: ExpertCard, student: StudentConfig, layer: str, params: Any, weights_hash: str, dtype: str = "float32"
) -> Expert:
    """Returns the expert of given parameters, which may be shapes alone.

    Args:
      card: of it.
      student: shape of the tower, without adapters.
      layer: ``layers/<i>``, whose output is given.
      params: the tower's tree.
      weights_hash: of them.
      dtype: compute dtype.
    """
    from tove_jax.models.vit import LOGICAL_AXES, from_config

    row = f"{layer}/attention_cls_scores"
    network = from_config(student, dtype=jnp.dtype(dtype))
    height, width = card.grid

    def apply(params: Any, pixels: Any) -> ExpertFeatures:
        images = card.view.normalize(pixels)
        _, found = network.apply({"params": params}, images, intermediates=(layer, row), final=False)
        tokens = found[layer]
        logs = jax.nn.log_softmax(found[row].astype(jnp.float32), axis=-1)
        return ExpertFeatures(
            patches=tokens[:, 1:].reshape(-1, height, width, tokens.shape[-1]),
            summary=tokens[:, 0],
            cls_attention=jnp.exp(logs).mean(1)[:, 1:],
            cls_scores=logs.mean(1)[:, 1:],
        )

    return Expert(card, params, weights_hash, apply, logical_axes=LOGICAL_AXES)
