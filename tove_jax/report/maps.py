"""Picture maps for the report: principal components of features, and attention laid over pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from tove_jax import methods
from tove_jax.config.schema import AdapterConfig, Config, HawaiiConfig, MergeConfig, MoveKDConfig, ToVEConfig
from tove_jax.data.picture import Picture
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import registry
from tove_jax.experts.base import Expert, ExpertFeatures
from tove_jax.experts.manifest import Manifest
from tove_jax.experts.run import as_viewed, chosen_experts, load_options, standardized, store_path
from tove_jax.methods import hawaii, merge, move_kd, tove
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


def overlay(image: np.ndarray, weights: np.ndarray, low: float = 0.0, top: float | None = None) -> np.ndarray:
    """Lays patch weights over a picture: a dim grey picture that glows where the weight is.

    Args:
      image: uint8 (S, S, 3).
      weights: (H, W).
      low: the weight that does not glow.
      top: the weight that glows most; the largest there is when None.

    Returns:
      uint8 (S, S, 3).
    """
    reach = (float(weights.max()) if top is None else top) - low
    share = np.clip((weights - low) / reach, 0, 1) if reach > 0 else np.zeros_like(weights)
    scaled = (255 * share).astype(np.uint8)
    size = (image.shape[1], image.shape[0])
    heat = np.asarray(Image.fromarray(scaled).resize(size, Image.Resampling.BICUBIC), np.float64) / 255
    grey = 38 + 0.42 * np.asarray(Image.fromarray(image).convert("L"), np.float64)[..., None]
    alpha = 0.9 * heat[..., None]
    glow = colour_ramp(0.3 + 0.7 * heat)
    return ((1 - alpha) * grey + alpha * glow).round().astype(np.uint8)


def square(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Cuts the central square of a picture and scales it, so that every network sees the same part."""
    return View(size=side).cut(image)


def _tower(config: Config, params: Any, pixels: np.ndarray, *, adapters: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns a tower's patches (B, H, W, D) and its attention from CLS, mean over heads (B, H, W)."""
    settings = config.student
    if not adapters:
        settings = dataclasses.replace(settings, adapter=AdapterConfig(kind="none"))
    module = vit.from_config(settings)
    names = (settings.feature, f"{settings.feature}/attention_cls")
    view = View.of_student(settings)

    @jax.jit
    def run(params: Any, pixels: jax.Array) -> dict[str, jax.Array]:
        _, asked = module.apply({"params": params}, view.normalize(pixels), intermediates=names, final=False)
        return dict(asked)

    found = run(params, pixels)
    tokens = np.asarray(found[names[0]], np.float32)[:, 1:]
    attention = np.asarray(found[names[1]], np.float32).mean(axis=1)[:, 1:]
    return _on_grid(config, tokens), _on_grid(config, attention)


def _on_grid(config: Config, values: np.ndarray) -> np.ndarray:
    """Lays (B, N, ...) out as (B, H, W, ...) on the student's grid."""
    side = config.student.image_size // config.student.patch_size
    return values.reshape(len(values), side, side, *values.shape[2:])


def deployed_tokens(
    config: Config, params: Mapping[str, Any], pixels: np.ndarray, features: Mapping[str, ExpertFeatures]
) -> np.ndarray:
    """Returns the patch tokens (B, N, D) of the encoder as it is deployed, which its method says.

    Args:
      config: a run's settings.
      params: ``{"student", "method"}``.
      pixels: uint8 (B, size, size, 3), cut as the student sees them.
      features: of the deployed experts at the least, as the method reads them.
    """
    method, module = methods.get(config.method.name), vit.from_config(config.student)
    view = View.of_student(config.student)
    read = {name: features[name] for name in method.deployed_experts(config)}

    @jax.jit
    def run(params: Any, pixels: jax.Array, features: Any) -> jax.Array:
        return method.tokens(module, params, view.normalize(pixels), features, config)

    return np.asarray(run(dict(params), pixels, read), np.float32)


def token_weights(
    config: Config,
    params: Mapping[str, Any],
    pixels: np.ndarray,
    features: Mapping[str, ExpertFeatures],
    tokens: np.ndarray,
) -> dict[str, np.ndarray]:
    """Returns what a method gives each token, by expert: what it counts in the loss, or the gate.

    Args:
      config: a run's settings, not of a merge.
      params: ``{"student", "method"}``.
      pixels: uint8 (B, size, size, 3), cut as the student sees them.
      features: of the experts, as the method reads them.
      tokens: (B, N, D), what `deployed_tokens` returned.

    Returns:
      ``{expert: (B, N)}``: MoVE-KD's token weight by CLIP, HAWAII's score by every teacher (without an
      instruction), or ToVE's gate of every attached expert; empty where the settings turn them off.
    """
    method = config.method
    if isinstance(method, MoveKDConfig):
        clip = features.get(method.clip_expert)
        if clip is None or not method.token_weighting or clip.cls_attention is None:
            return {}
        return {method.clip_expert: np.asarray(move_kd.token_weights(method, clip), np.float32)}
    if isinstance(method, HawaiiConfig):
        if not method.token_scoring:
            return {}

        @jax.jit
        def scores(params: Any, features: ExpertFeatures, tokens: jax.Array) -> jax.Array:
            return hawaii.token_scores(method, hawaii.target(method, params, features, tokens), None, None)

        own = params["method"]
        return {name: np.asarray(scores(own.get(name), found, tokens)) for name, found in features.items()}
    if isinstance(method, ToVEConfig):
        names = tove.deployed_experts(config)
        module, view = vit.from_config(config.student), View.of_student(config.student)

        @jax.jit
        def gate(params: Any, pixels: jax.Array, features: Any) -> jax.Array:
            clip = tove.clip_tokens(module, params, view.normalize(pixels), config)
            return tove.enrich(params["method"], clip, features, config).gate

        if not names:
            return {}
        found = np.asarray(gate(dict(params), pixels, {name: features[name] for name in names}), np.float32)
        return {name: found[..., place] for place, name in enumerate(names)}
    return {}


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


class _Sheet:
    """The panels of all pictures, filled a column at a time."""

    def __init__(self, pictures: Sequence[Chosen], images: Sequence[np.ndarray]) -> None:
        self.pictures, self.images = pictures, images
        self.panels: list[list[Panel]] = [[] for _ in pictures]

    def add(
        self, group: Any, column: str, colour: str, maps: Sequence[np.ndarray], alt: str, notes: Sequence[str] = ()
    ) -> None:
        for place, (own, (picture, *_), image) in enumerate(zip(self.panels, self.pictures, maps, strict=True)):
            note = notes[place] if notes else ""
            own.append(Panel(column, group, image, f"{alt} of {picture.caption or picture.id}", colour, note))

    def attention(self, column: str, colour: str, attention: np.ndarray) -> None:
        laid = [overlay(image, weights) for image, weights in zip(self.images, attention, strict=True)]
        self.add("attention", column, colour, laid, f"attention from CLS, {column}, on the picture")

    def components(self, column: str, colour: str, patches: np.ndarray) -> None:
        self.add("components", column, colour, list(principal_components(patches)), f"components of {column}")

    def weights(self, found: Mapping[str, np.ndarray], gate: bool) -> None:
        """Adds (B, H, W) weights an expert: a gate's all on one scale, others from a picture's least to its largest."""
        # An even gate lies halfway up.
        top = max([2 / max(2, len(found)), *(float(values.max()) for values in found.values())])
        for name, values in found.items():
            laid, notes = [], []
            for image, one in zip(self.images, values, strict=True):
                if gate:
                    laid.append(overlay(image, one, 0.0, top))
                    notes.append(f"{100 * one.mean():.0f} %")
                else:
                    laid.append(overlay(image, one, float(one.min()), float(one.max())))
                    notes.append(f"{one.max() / one.mean():.2f} ×")
            title = name.replace("_", " ")
            what = "gate weights" if gate else "token weights"
            self.add("weights", title, name, laid, f"{what} by {title} on the picture", notes)


def make_maps(
    config: Config,
    params: Mapping[str, Any],
    start: Any,
    workdir: Path,
    pictures: Sequence[Chosen],
) -> tuple[PictureMaps, ...]:
    """Runs the student as it is deployed, its start and every expert on a few pictures.

    Args:
      config: the run's settings.
      params: the trained parameters, with ``student``, and ``method`` or a merge's ``teacher``.
      start: the start's parameters, a plain CLIP tree.
      workdir: the run's folder, where the `clip` expert's start and the statistics of the features lie.
      pictures: which ones.

    Returns:
      One entry a picture.

    Raises:
      InputError: an expert's weights, or the statistics of its features, are not there.
    """
    images = [square(picture.image) for picture, *_ in pictures]
    view = View.of_student(config.student)
    pixels = np.stack([view.cut(image) for image in images])
    experts, features = {}, {}
    for name, spec in chosen_experts(config).items():
        expert = registry.load(spec, **load_options(config, workdir, name))
        expert = dataclasses.replace(expert, card=as_viewed(config, expert.card))
        experts[name] = _expert_outputs(expert, images)
        features[name] = _as_read(config, workdir, name, experts[name][0])
    params = {"method": {}, **params}
    tokens = deployed_tokens(config, params, pixels, features)

    sheet = _Sheet(pictures, images)
    patches, attention = _tower(config, start, pixels, adapters=False)
    sheet.attention("start of the student", "init", attention)
    sheet.components("start of the student", "init", patches)
    title = "student"
    if isinstance(config.method, ToVEConfig):
        # Its tower is the start, frozen; what is new are the tokens.
        title = "enriched tokens"
    else:
        title = "merged tower" if isinstance(config.method, MergeConfig) else title
        sheet.attention(title, "student", _tower(config, params["student"], pixels, adapters=True)[1])
    sheet.components(title, "student", _on_grid(config, tokens))
    own, own_params = config, params
    if isinstance(config.method, MergeConfig):
        own, own_params = merge.source_config(config), {"method": {}, **params["teacher"]}
        tokens = deployed_tokens(own, own_params, pixels, features)
        sheet.components("the run that was merged", "source", _on_grid(config, tokens))
    # A merge keeps of its source what the deployed tokens need: a gate, and no heads.
    if own is config or isinstance(own.method, ToVEConfig):
        found = token_weights(own, own_params, pixels, features, tokens)
        gate = isinstance(own.method, ToVEConfig)
        sheet.weights({name: _on_grid(config, values) for name, values in found.items()}, gate)
    for name, (found, extras) in experts.items():
        title, patches = name.replace("_", " "), np.asarray(found.patches, np.float32)
        if found.cls_attention is not None:
            grid = patches.shape[:3]
            sheet.attention(f"expert {title}", name, np.asarray(found.cls_attention, np.float32).reshape(grid))
        sheet.components(title, name, patches)
        for extra, values in extras.items():
            shown = [Image.fromarray(colour_ramp(one / max(float(one.max()), 1e-6))) for one in values]
            maps = [np.asarray(one.resize((SIDE, SIDE))) for one in shown]
            sheet.add("components", f"{title}: {extra}", name, maps, f"{extra} by {title}")
    return tuple(
        PictureMaps(picture.id, picture.caption or picture.id, origin, licence, image, tuple(own))
        for (picture, origin, licence), image, own in zip(pictures, images, sheet.panels, strict=True)
    )


def _as_read(config: Config, workdir: Path, name: str, features: ExpertFeatures) -> ExpertFeatures:
    """Returns an expert's features at the scale that methods see."""
    if config.features.standardize == "none":
        return features
    return standardized(config, name, Manifest.read(store_path(config, workdir, name)), features)
