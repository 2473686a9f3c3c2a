"""The experts of one run: their cards, and their stores opened and checked against them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.config.schema import Config
from tove_jax.errors import InputError
from tove_jax.experts import registry
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.experts.extract import chosen_experts, store_path
from tove_jax.experts.manifest import Manifest
from tove_jax.experts.store import FeatureStore
from tove_jax.hf.start import start_folder


def load_options(config: Config, workdir: Path, name: str) -> dict[str, Any]:
    """Returns what `registry.load` and `registry.describe` need beside the spec.

    The `clip` expert is the frozen copy of this run's start, read at the student's own feature.
    """
    if name != "clip":
        return {}
    return {"weights": start_folder(config, workdir), "feature": config.student.feature}


def expert_cards(config: Config, workdir: Path, only: Sequence[str] | None = None) -> dict[str, ExpertCard]:
    """Returns the card of every configured expert, or of some, as this run loads it.

    Raises:
      InputError: an unknown expert, or one given twice.
    """
    return {
        name: registry.describe(spec, **load_options(config, workdir, name))
        for name, spec in chosen_experts(config, only).items()
    }


def open_stores(
    config: Config, workdir: Path, *, flip: bool = False, only: Sequence[str] | None = None
) -> dict[str, FeatureStore]:
    """Opens the configured experts' stores and checks their views.

    Args:
      config: the run's settings.
      workdir: the run's folder.
      flip: the stores of mirrored pictures.
      only: names of the experts whose stores are opened; None: of all.

    Returns:
      name -> store.

    Raises:
      InputError: a store that is missing, unfinished or damaged, or was extracted through another
        view than this run's; both views and the field that differs are named.
    """
    stores = {}
    for name, card in expert_cards(config, workdir, only).items():
        path = store_path(config, workdir, name, flip=flip)
        if not path.is_dir():
            raise InputError(f"{path}: no features of expert '{name}'; run `tove extract` with this config first")
        store = FeatureStore.open(path)
        shapes = {**store.manifest.shapes, "patches": (*card.grid, card.width)}
        store.manifest.require(path, expert=name, view=card.view.flipped() if flip else card.view, shapes=shapes)
        stores[name] = store
    return stores


def standardized(config: Config, name: str, manifest: Manifest, features: ExpertFeatures) -> ExpertFeatures:
    """Brings an expert's patches to the scale that methods see (``features.standardize``; ours).

    The expert `clip` is left as it is: it lives in the student's own space.

    Args:
      config: the run's settings.
      name: of the expert.
      manifest: of its store, whose statistics are of the whole store.
      features: decoded, NumPy or traced.
    """
    moments = manifest.statistics
    if config.features.standardize == "none" or name == "clip" or moments is None:
        return features
    mean = np.asarray(moments.channel_mean, np.float32)
    return features._replace(patches=(features.patches - mean) / np.float32(max(moments.centred_std, 1e-6)))
