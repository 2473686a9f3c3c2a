"""Experts that run frozen inside the training step, in place of a store of their features."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tove_jax.config import specs
from tove_jax.config.schema import Config
from tove_jax.data.view import View
from tove_jax.errors import InputError, nearest
from tove_jax.experts import codecs, registry
from tove_jax.experts.base import Expert, ExpertFeatures
from tove_jax.experts.manifest import Manifest
from tove_jax.experts.run import as_viewed, chosen_experts, load_options, open_stores, store_path
from tove_jax.parallel import flat_paths, logical_specs, map_paths, tree_shardings
from tove_jax.parallel.sharding import replicated

ALL = "all"
STUDENT = ""
"""Stands for the student's own pixels among the names of views."""


def online_experts(config: Config, only: Collection[str] | None = None) -> tuple[str, ...]:
    """Returns the names of the experts that run in the step, in the order of ``features.experts``.

    Args:
      config: of the run.
      only: leave out all but these names, such as the experts that training reads.

    Raises:
      InputError: ``features.online`` names an expert that the run has not, or one that runs on the host.
    """
    known = chosen_experts(config)
    wanted = config.features.online
    for name in wanted:
        if name not in known and name != ALL:
            raise InputError(
                f"config.features.online: expected some of {', '.join(known)}, or {ALL}, found '{name}'"
                f"{nearest(name, known)}"
            )
    found = []
    for name, spec in known.items():
        host = specs.foreign(spec) is not None or registry.cards()[registry.parse(spec)[0]].backend != "jax"
        if host and name in wanted:
            raise InputError(
                f"config.features.online: expert '{name}' runs on the host and not inside a step; read it from its store"
            )
        if not host and (name in wanted or ALL in wanted) and (only is None or name in only):
            found.append(name)
    return tuple(found)


def as_cut(view: View) -> View:
    """Returns a view that cuts the same pixels, equal for all views that do: normalisation comes after the cut."""
    plain = View(1)
    if view.fit in ("letterbox", "pad"):  # the mean colours what is added
        return dataclasses.replace(view, std=plain.std)
    return dataclasses.replace(view, mean=plain.mean, std=plain.std, channels=plain.channels, scale=plain.scale)


@dataclasses.dataclass(frozen=True)
class Online:
    """The experts of one run that run in its step.

    Attributes:
      experts: loaded, by name; parameters on the host, kernels in the dtype they compute in.
      places: name -> key into `views`, or `STUDENT` where the student's pixels are the expert's too.
      views: what the loader has to cut besides the student's view, by key.
      manifests: of their stores, where features are standardised by what was measured there.
      codecs: name -> how its features would be stored; the pooling is done here too, the rounding is not.
    """

    experts: Mapping[str, Expert]
    places: Mapping[str, str]
    views: Mapping[str, View]
    manifests: Mapping[str, Manifest]
    codecs: Mapping[str, codecs.Codec]

    @property
    def params(self) -> dict[str, Any]:
        """Parameters by expert, on the host."""
        return {name: expert.params for name, expert in self.experts.items()}

    def shardings(self, mesh: Mesh) -> dict[str, Any]:
        """Returns the sharding of every parameter, by the logical axes of its expert."""
        found = {}
        for name, expert in self.experts.items():
            if expert.logical_axes:
                axes = logical_specs(expert.params, expert.logical_axes, f"logical axes of expert {name}")
                found[name] = tree_shardings(expert.params, axes, mesh)
            else:
                found[name] = jax.tree.map(lambda leaf: replicated(mesh), expert.params)
        return found

    def on(self, mesh: Mesh) -> dict[str, Any]:
        """Returns the parameters on a mesh, sharded."""
        return jax.device_put(self.params, self.shardings(mesh))

    def prepare(self, params: Mapping[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
        """Adds these experts' features to a batch; pure.

        Args:
          params: `on` a mesh, or as `params`.
          batch: of the loader, with ``views``.

        Returns:
          The batch with `ExpertFeatures` under ``features``, float32, which no gradient flows through, and
          without ``views``.
        """
        shown = {STUDENT: batch["pixels"], **batch.get("views", {})}
        found = {name: self.features(name, params[name], shown[self.places[name]]) for name in self.experts}
        rest = {name: value for name, value in batch.items() if name != "views"}
        return {**rest, "features": {**batch["features"], **found}}

    def features(self, name: str, params: Any, pixels: jax.Array) -> ExpertFeatures:
        """Returns one expert's features of uint8 pixels that its view cut."""
        found = self.experts[name].apply(params, pixels)
        found = jax.tree.map(lambda value: jax.lax.stop_gradient(value.astype(jnp.float32)), found)
        return found._replace(patches=self.codecs[name].pooled(found.patches))


def load_online(config: Config, workdir: Path, only: Collection[str] | None = None) -> Online:
    """Loads the experts that run in the step.

    Args:
      config: of the run.
      workdir: its folder.
      only: none but these, such as those that training reads; the others are not loaded.

    Raises:
      InputError: as `online_experts`, `registry.load`; where features are standardised, no store with statistics,
        or one of other weights.
    """
    names = online_experts(config, only)
    chosen = chosen_experts(config)
    experts = {}
    for name in names:
        options, dtype = load_options(config, workdir, name), "float32"
        if registry.takes(chosen[name], "dtype"):
            dtype = options["dtype"] = config.train.dtype
        expert = registry.load(chosen[name], **options)
        experts[name] = dataclasses.replace(
            expert, card=as_viewed(config, expert.card), params=_frozen(expert.params, np.dtype(jnp.dtype(dtype)))
        )
    manifests = {}
    measured = [name for name in names if name != "clip"] if config.features.standardize != "none" else []
    for name in measured:
        try:
            manifests[name] = open_stores(config, workdir, only=[name])[name].manifest
        except InputError as error:
            raise InputError(
                f"expert '{name}' runs in the step, but config.features.standardize is "
                f"'{config.features.standardize}', which takes statistics from a store of its features: {error}; "
                "extract some pictures, or set it to 'none'"
            ) from error
        manifests[name].require(store_path(config, workdir, name), weights_hash=experts[name].weights_hash)
    return arrange(config, experts, manifests)


def arrange(config: Config, experts: Mapping[str, Expert], manifests: Mapping[str, Manifest]) -> Online:
    """Returns the experts with the views that they want cut; experts of one cut share it, the student's too.

    Args:
      config: of the run.
      experts: by name, their cards as this run views them.
      manifests: see `Online`.
    """
    places, views = {}, {}
    own = as_cut(View.of_student(config.student))
    for name, expert in experts.items():
        cut = as_cut(expert.card.view)
        places[name] = STUDENT if cut == own else cut.key()
        if cut != own:
            views[cut.key()] = cut
    settled = {name: codecs.parse(codecs.codec_of(config.features.codec, name)) for name in experts}
    return Online(experts, places, views, manifests, settled)


def _frozen(params: Any, dtype: np.dtype) -> Any:
    """Returns parameters on the host, kernels in `dtype`; the rest is small, and norms want to be exact."""

    def settle(path: str, leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        return leaf.astype(dtype) if path.rpartition("/")[2] == "kernel" and leaf.dtype == np.float32 else leaf

    return map_paths(settle, params)


def parameter_bytes(online: Online) -> int:
    """Returns the bytes of all parameters, before they are sharded."""
    return sum(leaf.nbytes for leaf in flat_paths(online.params).values())
