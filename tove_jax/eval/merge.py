"""What merging lost: the merged tower beside the run whose tokens it was taught."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tove_jax.config.schema import Config
from tove_jax.data.picture import PictureSource
from tove_jax.eval import predictors
from tove_jax.eval.feature_error import TokenError
from tove_jax.eval.predictors import Tokens, Views
from tove_jax.eval.runner import Predictor
from tove_jax.experts.store import FeatureStore
from tove_jax.methods.merge import plain_tower, source_config


def source_tokens(
    config: Config,
    teacher: Mapping[str, Any],
    views: Views,
    source: PictureSource,
    stores: Mapping[str, FeatureStore],
) -> tuple[Tokens, Predictor]:
    """Returns the patch tokens and the picture feature of the run that was merged, as it is deployed.

    Args:
      config: a merge's settings.
      teacher: the run's parameters, ``{"student", "method"?}``.
      views: the pictures.
      source: the pictures' ids.
      stores: of the run's deployed experts at the least.
    """
    own = source_config(config)
    patches = predictors.deployed(own, {"method": {}, **teacher}, views, source, stores)
    return patches, predictors.student_predictor(own, teacher["student"], views, patches)


def token_errors(
    config: Config, teacher: Mapping[str, Any], views: Views, merged: Tokens, target: Tokens, indices: Sequence[int]
) -> dict[str, float]:
    """Measures how far the merged tower's tokens are from those it was taught (see `TokenError`).

    Args:
      config: a merge's settings.
      teacher: the run's parameters.
      views: the pictures.
      merged: the merged tower's patch tokens.
      target: the run's.
      indices: the held-out pictures.

    Returns:
      ``merged``, and ``tower``: the same of the run's tower without its experts or adapters, which is what
      would be left without merging. Empty where the target never varies.
    """
    tower = predictors.encoder(config, plain_tower(teacher["student"]), views, adapters=False)
    errors = {"merged": TokenError(), "tower": TokenError()}
    for start in range(0, len(indices), config.eval.batch):
        chosen = [int(index) for index in indices[start : start + config.eval.batch]]
        wanted = target(chosen)
        errors["merged"].add(merged(chosen), wanted)
        errors["tower"].add(tower(chosen)[:, 1:], wanted)
    measured = {name: error.relative() for name, error in errors.items()}
    return {name: value for name, value in measured.items() if np.isfinite(value)}
