"""Features that are computed when they are asked for, in place of a store, after a run with experts in its step."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tove_jax.config.schema import Config
from tove_jax.data.picture import PictureSource
from tove_jax.data.split import split
from tove_jax.errors import InputError
from tove_jax.experts import manifest as manifests
from tove_jax.experts.online import Online, load_online, online_experts
from tove_jax.experts.run import as_stored, chosen_experts, open_stores, store_path
from tove_jax.experts.store import FeatureStore

BATCH = 16
"""Pictures a call; fewer are filled up, so that one shape is compiled. Ours."""


class ComputedStore(FeatureStore):
    """Reads like a store of codec float32, and runs the expert for what is read; nothing is kept.

    Attributes:
      manifest: as if the features were stored.
      ids: of the source's pictures.
    """

    def __init__(self, config: Config, online: Online, name: str, source: PictureSource) -> None:
        """Prepares an expert of `online`; nothing runs yet."""
        expert, measured = online.experts[name], online.manifests.get(name)
        card = as_stored(config, expert.card)
        described = manifests.describe(
            card,
            expert.weights_hash,
            card.view,
            "float32",
            source.ids,
            source=source.name,
            source_licence=source.licence,
            shard_records=len(source.ids),
            dtype=config.train.dtype,
        )
        if measured is not None:
            described = dataclasses.replace(described, statistics=measured.statistics, phi_s=measured.phi_s)
        self.manifest, self.ids = described, tuple(source.ids)
        self._numbers = {id: number for number, id in enumerate(self.ids)}
        self._source, self._view, self._name = source, card.view, name
        self._run = jax.jit(lambda params, pixels: online.features(name, params, pixels))
        self._params = expert.params

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id: object) -> bool:
        return id in self._numbers

    def read(self, id: str) -> dict[str, np.ndarray]:
        """Computes one record, see `read_batch`."""
        return {name: array[0] for name, array in self.read_batch([id]).items()}

    def read_batch(self, ids: Iterable[str]) -> dict[str, np.ndarray]:
        """Computes records: field of `ExpertFeatures` -> float32 (B, ...).

        Raises:
          InputError: no such picture, or one that cannot be decoded.
        """
        ids = list(ids)
        missing = [id for id in ids if id not in self._numbers]
        if missing:
            raise InputError(
                f"expert '{self._name}': no picture {missing[0]!r} among the {len(self.ids)} of the source"
            )
        parts: list[dict[str, Any]] = []
        for start in range(0, len(ids), BATCH):
            chosen = ids[start : start + BATCH]
            pixels = [self._view.cut(self._source[self._numbers[id]].image) for id in chosen]
            filled = np.stack(pixels + pixels[-1:] * (BATCH - len(chosen)))
            found = jax.device_get(self._run(self._params, filled))._asdict()
            parts.append({name: value[: len(chosen)] for name, value in found.items() if value is not None})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def open_or_compute(
    config: Config, workdir: Path, source: PictureSource, only: Collection[str] | None = None
) -> dict[str, FeatureStore]:
    """Opens the configured experts' stores; an expert that runs in the step is loaded where its store lacks pictures.

    Args:
      config: the run's settings.
      workdir: the run's folder.
      source: of the pictures.
      only: names of the experts; None: all.

    Raises:
      InputError: as `open_stores` and `load_online`.
    """
    names = [name for name in chosen_experts(config) if only is None or name in only]
    absent = [name for name in online_experts(config, names) if not store_path(config, workdir, name).is_dir()]
    stored = open_stores(config, workdir, only=[name for name in names if name not in absent])
    sides = split(source.ids, config.data.held_out, salt=config.data.split_salt, limit=config.data.limit)
    ids = [source.ids[int(index)] for index in (*sides.train, *sides.held_out)]
    absent += [name for name in online_experts(config, list(stored)) if any(id not in stored[name] for id in ids)]
    online = load_online(config, workdir, absent)
    computed = {name: ComputedStore(config, online, name, source) for name in absent}
    return {name: computed[name] if name in computed else stored[name] for name in names}
