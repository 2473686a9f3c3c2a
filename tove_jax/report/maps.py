"""Picture maps for the report: principal components of features, and attention laid over pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from tove_jax.config.schema import AdapterConfig, Config
from tove_jax.data.picture import Picture
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import registry
from tove_jax.experts.base import Expert
from tove_jax.experts.run import as_viewed, chosen_experts, load_options
from tove_jax.models import vit
from tove_jax.report.collect import Panel, PictureMaps

SIDE = 192
# A dark-to-bright ramp through purple and orange; brightness rises all along it, so it reads in grey too.
_RAMP = np.array([[8, 6, 30], [74, 20, 110], [158, 42, 99], [229, 92, 48], [252, 172, 40], [252, 250, 190]], float)


def colour_ramp(values: np.ndarray) -> np.ndarray:
    """Returns uint8 (..., 3) colours of values in 0..1, dark to bright."""
    place = np.clip(values, 0, 1) * (len(_RAMP) - 1)
    low = np.minimum(place.astype(int), len(_RAMP) - 2)
    share = (place - low)[..., None]
    return ((1 - share) * _RAMP[low] + share * _RAMP[low + 1]).round().astype(np.uint8)


def principal_components(features: np.ndarray) -> np.ndarray:
    """Colours patch features by their first three principal components over all pictures given.

    The components are shared by the pictures; each is scaled within a picture from its 1st to its
    99th percentile, but never stretched beyond a tenth of its range over all pictures. Its sign is
    fixed by its largest loading, so that the same features always give the same colours.

    Args:
      features: (B, H, W, D), any D from 1.

    Returns:
      uint8 (B, H, W, 3); missing components are mid-grey.
    """
    rows = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
    rows = rows - rows.mean(axis=0)
    patches = len(rows) // len(features)
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    values, directions = values[::-1][:3], vectors.T[::-1][:3]
    count = int((values > 1e-12 * max(float(values[0]), 1e-30)).sum())
    directions = directions[:count]
    largest = np.abs(directions).argmax(axis=1)
    directions = directions * np.sign(directions[np.arange(count), largest])[:, None]
    scores = (rows @ directions.T).reshape(len(features), patches, count)
    if not count:
        return np.full((*features.shape[:-1], 3), 128, np.uint8)
    whole = np.diff(np.percentile(scores, [1, 99], axis=(0, 1)), axis=0)
    low, high = np.percentile(scores, [1, 99], axis=1, keepdims=True)
    middle, reach = (low + high) / 2, np.maximum(high - low, np.maximum(0.1 * whole, 1e-12))
    colours = np.full((*scores.shape[:2], 3), 0.5)
    colours[..., :count] = np.clip((scores - middle) / reach + 0.5, 0, 1)
    return (255 * colours).round().astype(np.uint8).reshape(*features.shape[:-1], 3)


def overlay(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Lays patch weights over a picture: a dim grey picture that glows where the weight is.

    Args:
      image: uint8 (S, S, 3).
      weights: (H, W), at least zero; scaled from zero to their largest.

    Returns:
      uint8 (S, S, 3).
    """
    top = float(weights.max())
    scaled = (255 * weights / top if top > 0 else np.zeros_like(weights)).astype(np.uint8)
    size = (image.shape[1], image.shape[0])
    heat = np.asarray(Image.fromarray(scaled).resize(size, Image.Resampling.BICUBIC), np.float64) / 255
    grey = 38 + 0.42 * np.asarray(Image.fromarray(image).convert("L"), np.float64)[..., None]
    alpha = 0.9 * heat[..., None]
    glow = colour_ramp(0.3 + 0.7 * heat)
    return ((1 - alpha) * grey + alpha * glow).round().astype(np.uint8)


def square(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Cuts the central square of a picture and scales it, so that every network sees the same part."""
    return View(size=side).cut(image)


def _student_outputs(
    config: Config, params: Any, pixels: np.ndarray, *, adapters: bool
) -> tuple[np.ndarray, np.ndarray]:
    settings = config.student
    if not adapters:
        settings = dataclasses.replace(settings, adapter=AdapterConfig(kind="none"))
    module = vit.from_config(settings)
    names = (settings.feature, f"{settings.feature}/attention_cls")
    view = View.of_student(settings)

    @jax.jit
    def run(params: Any, pixels: jax.Array) -> dict[str, jax.Array]:
        _, found = module.apply({"params": params}, view.normalize(pixels), intermediates=names, final=False)
        return found

    found = run(params, pixels)
    side = settings.image_size // settings.patch_size
    tokens = np.asarray(found[names[0]], np.float32)[:, 1:]
    attention = np.asarray(found[names[1]], np.float32).mean(axis=1)[:, 1:]
    return tokens.reshape(len(pixels), side, side, -1), attention.reshape(len(pixels), side, side)


def _expert_outputs(expert: Expert, images: Sequence[np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    pixels = np.stack([expert.card.view.cut(image) for image in images])
    wrap: Callable[..., Any] = jax.jit if expert.card.backend == "jax" else (lambda function: function)
    extras = {}
    for name, function in expert.extras.items():
        values = np.asarray(wrap(function)(expert.params, pixels), np.float32)
        if values.ndim == 3:
            extras[name] = values
    return wrap(expert.apply)(expert.params, pixels), extras


class Chosen(NamedTuple):
    """A picture for the report, with its kind and licence."""

    picture: Picture
    origin: str
    licence: str


def choose_pictures(source: Any, held_out: Sequence[int], count: int) -> list[Chosen]:
    """Picks held-out pictures spread over the source, and scikit-image's photographs where installed.

    Args:
      source: of the held-out pictures.
      held_out: their numbers.
      count: of each kind at most.

    Returns:
      Held-out pictures first.
    """
    step = max(1, len(held_out) // max(1, count))
    chosen = [Chosen(source[int(index)], "held out", source.licence) for index in list(held_out)[::step][:count]]
    try:
        from tove_jax.data.photographs import PhotographSource

        photographs = PhotographSource()
    except InputError:
        return chosen
    return chosen + [
        Chosen(photographs[index], "photograph", photographs.licences[index])
        for index in range(min(count, len(photographs)))
    ]


def make_maps(
    config: Config,
    params: Mapping[str, Any],
    start: Any,
    workdir: Path,
    pictures: Sequence[Chosen],
) -> tuple[PictureMaps, ...]:
    """Runs the student, its start and every expert on a few pictures.

    Args:
      config: the run's settings.
      params: the trained parameters, with ``student``.
      start: the start's parameters, a plain CLIP tree.
      workdir: the run's folder, where the `clip` expert's start lies.
      pictures: which ones.

    Returns:
      One entry a picture.

    Raises:
      InputError: an expert's weights are not there.
    """
    images = [square(picture.image) for picture, *_ in pictures]
    view = View.of_student(config.student)
    pixels = np.stack([view.cut(image) for image in images])
    panels: list[list[Panel]] = [[] for _ in pictures]

    def add(group: Any, column: str, colour: str, maps: Sequence[np.ndarray], alt: str) -> None:
        for own, (picture, *_), image in zip(panels, pictures, maps, strict=True):
            own.append(Panel(column, group, image, f"{alt} of {picture.caption or picture.id}", colour))

    def add_attention(column: str, colour: str, attention: np.ndarray) -> None:
        laid = [overlay(image, weights) for image, weights in zip(images, attention, strict=True)]
        add("attention", column, colour, laid, f"attention from CLS, {column}, on the picture")

    def add_components(column: str, colour: str, patches: np.ndarray) -> None:
        add("components", column, colour, list(principal_components(patches)), f"components of {column}")

    for column, colour, tree, adapters in (
        ("start of the student", "init", start, False),
        ("student", "student", params["student"], True),
    ):
        patches, attention = _student_outputs(config, tree, pixels, adapters=adapters)
        add_attention(column, colour, attention)
        add_components(column, colour, patches)
    for name, spec in chosen_experts(config).items():
        expert = registry.load(spec, **load_options(config, workdir, name))
        expert = dataclasses.replace(expert, card=as_viewed(config, expert.card))
        features, extras = _expert_outputs(expert, images)
        title = name.replace("_", " ")
        patches = np.asarray(features.patches, np.float32)
        if features.cls_attention is not None:
            grid = patches.shape[:3]
            add_attention(f"expert {title}", name, np.asarray(features.cls_attention, np.float32).reshape(grid))
        add_components(title, name, patches)
        for extra, values in extras.items():
            shown = [Image.fromarray(colour_ramp(one / max(float(one.max()), 1e-6))) for one in values]
            maps = [np.asarray(one.resize((SIDE, SIDE))) for one in shown]
            add("components", f"{title}: {extra}", name, maps, f"{extra} by {title}")
    return tuple(
        PictureMaps(picture.id, picture.caption or picture.id, origin, licence, image, tuple(own))
        for (picture, origin, licence), image, own in zip(pictures, images, panels, strict=True)
    )
