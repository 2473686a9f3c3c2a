"""Puts student, experts' features and method together into the one loss that the step differentiates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax import methods
from tove_jax.adapters import mola, mole
from tove_jax.config.schema import Config
from tove_jax.data.view import View
from tove_jax.experts.base import ExpertFeatures
from tove_jax.experts.manifest import Manifest
from tove_jax.experts.run import standardized
from tove_jax.experts.store import decode_features
from tove_jax.models import vit
from tove_jax.train.step import Batch, Loss

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_student(config: Config) -> vit.VisionTransformer:
    """Returns the student with its adapters, computing in ``train.dtype``."""
    return vit.from_config(config.student, dtype=DTYPES[config.train.dtype])


def make_loss(config: Config, manifests: Mapping[str, Manifest]) -> Loss:
    """Returns ``loss(params, batch, key)``, the mean over the batch's real rows.

    Args:
      config: a whole run's settings.
      manifests: of each expert's store; they say how its payload is decoded on the device. Of an expert whose
        features the batch holds already, such as one that runs in the step, where they are standardised.

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
        features = {name: _features(name, payload) for name, payload in batch["features"].items()}
        pixels = view.normalize(batch["pixels"])
        outputs = method.forward(student, params, pixels, features, config, key)
        return method.objective(params.get("method", {}), outputs, features, batch, config)

    return loss


def logical_axes(config: Config) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Returns the first-match table of logical axes of every parameter of a run."""
    return vit.LOGICAL_AXES + mole.LOGICAL_AXES + mola.LOGICAL_AXES + methods.get(config.method.name).LOGICAL_AXES


def count(tree: dict[str, Any]) -> int:
    """Returns the number of parameters of a flat tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in tree.values())
