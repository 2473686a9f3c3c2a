"""Predict functions for the runner: raw pixels, the student and its start, the experts' stored features."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax import methods
from tove_jax.config.schema import AdapterConfig, Config
from tove_jax.data.picture import PictureSource
from tove_jax.data.view import View
from tove_jax.eval.feature_error import TokenError
from tove_jax.eval.runner import Predictor
from tove_jax.experts.run import standardized
from tove_jax.experts.store import FeatureStore, decode_features
from tove_jax.models import vit

_PIXELS_SIDE = 64
_CACHE_BYTES = 256 << 20

Tokens = Callable[[list[int]], np.ndarray]


class Views:
    """The student's view of a source's pictures, by number; the last 256 MiB are kept."""

    def __init__(self, source: PictureSource, view: View, threads: int) -> None:
        """Remembers source and view; nothing is read yet."""
        self.view = view
        self._threads = max(1, threads)
        kept = max(1, _CACHE_BYTES // (3 * view.size**2))
        self._cut = functools.lru_cache(kept)(lambda index: view.cut(source[index].image))

    def __call__(self, indices: list[int]) -> np.ndarray:
        """Returns uint8 (n, size, size, 3)."""
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            return np.stack(list(pool.map(self._cut, indices)))


def pixels_predictor(views: Views) -> Predictor:
    """Returns the baseline: the student's view itself, normalised, flattened.

    Views above 64 pixels a side are averaged in blocks down to at most 64, so that the baseline
    stays affordable; the last few rows and columns that fill no block are left out.
    """

    def predict(indices: list[int]) -> np.ndarray:
        values = np.asarray(views.view.normalize(views(indices)), np.float32)
        block = -(-views.view.size // _PIXELS_SIDE)
        side = views.view.size // block
        values = values[:, : side * block, : side * block]
        values = values.reshape(len(values), side, block, side, block, 3).mean(axis=(2, 4))
        return values.reshape(len(values), -1)

    return predict


def encoder(config: Config, params: Any, views: Views, *, adapters: bool) -> Tokens:
    """Returns a function from picture numbers to all tokens of ``student.feature``, float32 (n, 1 + N, D).

    Args:
      config: the run's settings; computes in float32 whatever it trained in.
      params: the student's tree.
      views: the pictures.
      adapters: with the student's adapters; False is a plain CLIP tower, as the start is.
    """
    settings = config.student
    if not adapters:
        settings = dataclasses.replace(settings, adapter=AdapterConfig(kind="none"))
    module = vit.from_config(settings)
    name, batch = settings.feature, config.eval.batch

    @jax.jit
    def encode(params: Any, pixels: jax.Array) -> jax.Array:
        inputs = views.view.normalize(pixels)
        _, found = module.apply({"params": params}, inputs, intermediates=(name,), final=False)
        return found[name].astype(jnp.float32)

    def tokens(indices: list[int]) -> np.ndarray:
        parts = []
        for start in range(0, len(indices), batch):
            pixels = views(indices[start : start + batch])
            # Padded to one shape, so that a short last batch does not compile again.
            padded = np.pad(pixels, ((0, batch - len(pixels)), (0, 0), (0, 0), (0, 0)))
            parts.append(np.asarray(encode(params, padded))[: len(pixels)])
        return np.concatenate(parts)

    return tokens


def deployed(
    config: Config, params: Mapping[str, Any], views: Views, source: PictureSource, stores: Mapping[str, FeatureStore]
) -> Tokens:
    """Returns a function from picture numbers to the deployed encoder's patch tokens, float32 (n, N, D).

    What the deployed encoder is, its method says: the student with its adapters, or CLIP enriched by the
    attached experts, whose stored features are then read.

    Args:
      config: the run's settings; computes in float32 whatever it trained in.
      params: ``{"student", "method"}``.
      views: the pictures.
      source: the pictures' ids.
      stores: of the deployed experts at the least.
    """
    run, batch = deployed_batch(config, stores), config.eval.batch

    def tokens(indices: list[int]) -> np.ndarray:
        parts = []
        for start in range(0, len(indices), batch):
            chosen = indices[start : start + batch]
            # Filled up to one shape, so that a short last batch does not compile again.
            filled = chosen + chosen[-1:] * (batch - len(chosen))
            found = run(params, views(filled), deployed_payloads(config, source, stores, filled))
            parts.append(np.asarray(found)[: len(chosen)])
        return np.concatenate(parts)

    return tokens


def deployed_payloads(
    config: Config, source: PictureSource, stores: Mapping[str, FeatureStore], indices: list[int]
) -> dict[str, Any]:
    """Reads what the deployed experts' stores hold of some pictures, still encoded."""
    names = methods.get(config.method.name).deployed_experts(config)
    ids = [source.ids[index] for index in indices]
    return {name: stores[name].read_batch(ids) for name in names}


def deployed_batch(config: Config, stores: Mapping[str, FeatureStore]) -> Callable[[Any, Any, Any], jax.Array]:
    """Returns the jitted ``(params, pixels uint8 (B, size, size, 3), payloads) -> tokens (B, N, D)``."""
    method, module, view = (
        methods.get(config.method.name),
        vit.from_config(config.student),
        View.of_student(config.student),
    )
    manifests = {name: stores[name].manifest for name in method.deployed_experts(config)}

    @jax.jit
    def run(params: Any, pixels: jax.Array, payloads: Any) -> jax.Array:
        features = {
            name: standardized(config, name, manifests[name], decode_features(manifests[name], payload))
            for name, payload in payloads.items()
        }
        return method.tokens(module, params, view.normalize(pixels), features, config).astype(jnp.float32)

    return run


def student_predictor(config: Config, params: Any, views: Views, patches: Tokens) -> Predictor:
    """Returns the student's picture feature: the mean of its deployed patch tokens, or its own CLS.

    Args:
      config: the run's settings; ``eval.pool`` decides.
      params: the student's tree.
      views: the pictures.
      patches: what `deployed` returned.
    """
    if config.eval.pool == "cls":
        return pooled(encoder(config, params, views, adapters=True), "cls")
    return lambda indices: patches(indices).mean(axis=1)


def pooled(tokens: Tokens, pool: str) -> Predictor:
    """Returns the picture feature of tokens: the mean of the patches, or CLS."""
    if pool == "cls":
        return lambda indices: tokens(indices)[:, 0]
    return lambda indices: tokens(indices)[:, 1:].mean(axis=1)


def expert_predictor(store: FeatureStore, source: PictureSource, *, use_summary: bool = True) -> Predictor:
    """Returns the stored picture feature: the summary where there is one, else the mean of the patches.

    Args:
      store: the expert's features.
      source: gives the ids of picture numbers.
      use_summary: False takes the mean of the patches even so.
    """

    def predict(indices: list[int]) -> np.ndarray:
        features = store.features([source.ids[index] for index in indices])
        if use_summary and features.summary is not None:
            return np.asarray(features.summary, np.float32)
        return np.asarray(features.patches, np.float32).mean(axis=(1, 2))

    return predict


def reference_predictors(
    config: Config, start: Any, views: Views, source: PictureSource, stores: Mapping[str, FeatureStore]
) -> dict[str, Predictor]:
    """Returns every predictor of a run but the student, by the names the runner knows.

    The CLIP expert is the same network as the start, so it is pooled as ``eval.pool`` says, not by
    its summary: the two agree but for the store's rounding.

    Args:
      config: the run's settings.
      start: the start's parameters, a plain CLIP tree.
      views: the pictures.
      source: the pictures' ids.
      stores: of each expert.
    """
    pool = config.eval.pool
    predictors = {
        "pixels": pixels_predictor(views),
        "init": pooled(encoder(config, start, views, adapters=False), pool),
    }
    for name, store in stores.items():
        summary = pool == "cls" if name == "clip" else True
        predictors[name] = expert_predictor(store, source, use_summary=summary)
    return predictors


def feature_errors(
    config: Config,
    method_params: Mapping[str, Any],
    student: Tokens,
    source: PictureSource,
    stores: Mapping[str, FeatureStore],
    indices: list[int],
) -> dict[str, float]:
    """Measures how far the student's tokens are from each expert's target (see `TokenError`).

    Args:
      config: the run's settings; the method's ``target`` makes the targets.
      method_params: trained beside the student.
      student: the trained student's patch tokens.
      source: the pictures' ids.
      stores: of each expert.
      indices: the held-out pictures.

    Returns:
      ``{expert: error}``; an expert whose target never varies is left out. Empty for a method that has no
      targets, since its experts are added and not imitated.
    """
    method = methods.get(config.method.name)
    if not hasattr(method, "target"):
        return {}

    @jax.jit
    def target(params: Any, features: Any, tokens: jax.Array) -> jax.Array:
        return method.target(config.method, params, features, tokens).astype(jnp.float32)

    errors = {name: TokenError() for name in stores}
    for start in range(0, len(indices), config.eval.batch):
        chosen = indices[start : start + config.eval.batch]
        patches = student(chosen)
        for name, store in stores.items():
            features = store.features([source.ids[index] for index in chosen])
            features = standardized(config, name, store.manifest, features)
            errors[name].add(patches, np.asarray(target(method_params.get(name), features, patches)))
    measured = {name: error.relative() for name, error in errors.items()}
    return {name: value for name, value in measured.items() if np.isfinite(value)}


def run_folder_source(config: Config) -> tuple[PictureSource, list[int], list[int]]:
    """Opens a run's pictures and splits them: source, training numbers, held-out numbers."""
    from tove_jax.data import make_source
    from tove_jax.data.split import split

    source = make_source(config.data)
    sides = split(source.ids, config.data.held_out, salt=config.data.split_salt, limit=config.data.limit)
    return source, [int(index) for index in sides.train], [int(index) for index in sides.held_out]


def views_of(config: Config, source: PictureSource) -> Views:
    """Returns the student's views of a source."""
    return Views(source, View.of_student(config.student), config.data.threads)
