"""The experts of one run: which they are, extracting them all, their stores opened and checked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.config import specs
from tove_jax.config.schema import Config
from tove_jax.config.specs import expert_name
from tove_jax.data import make_source
from tove_jax.data.cache import cache_folder
from tove_jax.data.picture import PictureSource
from tove_jax.data.split import split
from tove_jax.errors import InputError, nearest
from tove_jax.experts import codecs, foreign, registry
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.experts.extract import extract
from tove_jax.experts.manifest import Manifest
from tove_jax.experts.runner import Runner
from tove_jax.experts.sent import sending
from tove_jax.experts.shards import claim, writing
from tove_jax.experts.statistics import fit_phi_s
from tove_jax.experts.store import FeatureStore
from tove_jax.files import mirror, remote
from tove_jax.hf.start import start_folder

FLIP_SUFFIX = "@flip"
"""Ends the folder name of a store of mirrored pictures."""


def chosen_experts(config: Config, only: Collection[str] | None = None) -> dict[str, str]:
    """Returns the configured experts, name -> spec (`tove_jax.config.specs`).

    Args:
      config: of the run.
      only: leave out all but these specs or names.

    Raises:
      InputError: two specs of one name, or a name in `only` that is not configured.
    """
    found: dict[str, str] = {}
    for spec in config.features.experts:
        name = expert_name(spec)
        if name in found:
            raise InputError(f"features.experts: {name!r} is given twice, as {found[name]!r} and {spec!r}")
        found[name] = spec
    if only is None:
        return found
    known = {*found, *found.values()}
    for spec in only:
        if spec not in known:
            raise InputError(
                f"experts: expected some of {', '.join(found.values())}, found {spec!r}{nearest(spec, sorted(known))}"
            )
    return {name: spec for name, spec in found.items() if name in only or spec in only}


def store_path(config: Config, workdir: Path | str, name: str, *, flip: bool = False) -> Path:
    """Returns the folder of an expert's store; ``flip`` for the one of mirrored pictures.

    A store in an object store is copied first, see `tove_jax.files.remote`; where there is none, neither is the folder.
    """
    folder = name + FLIP_SUFFIX if flip else name
    if (base := _remote_base(config, workdir)) is not None:
        return remote.local(f"{base}/{folder}", cache_folder(config.data.cache), True)
    return (Path(config.features.path) if config.features.path else Path(workdir) / "features") / folder


def _remote_base(config: Config, workdir: Path | str) -> str | None:
    """Returns the folder of the run's stores where it is in an object store, as it is if the run's folder is."""
    if config.features.path:
        return config.features.path.rstrip("/") if remote.is_remote(config.features.path) else None
    bucket = mirror.bucket_of(workdir)
    return None if bucket is None else f"{bucket.url}/features"


def load_options(config: Config, workdir: Path, name: str) -> dict[str, Any]:
    """Returns what `registry.load` and `registry.describe` need beside the spec.

    The `clip` expert is the frozen copy of this run's start, read at the student's own feature.
    """
    if name != "clip":
        return {}
    return {"weights": start_folder(config, workdir), "feature": config.student.feature}


def as_viewed(config: Config, card: ExpertCard) -> ExpertCard:
    """Returns an expert's card with the view of this run: its own, or cut as the student cuts (``features.views``).

    Of the view only the cut changes, so the network and its normalisation stay as they are.
    """
    if config.features.views == "published":
        return card
    return dataclasses.replace(card, view=dataclasses.replace(card.view, fit=config.student.view.fit, resize=None))


def expert_cards(config: Config, workdir: Path, only: Collection[str] | None = None) -> dict[str, ExpertCard]:
    """Returns the card of every configured expert, or of some, as this run loads it and stores its features.

    A codec that pools makes the grid smaller.

    Raises:
      InputError: an unknown expert, or one given twice; a codec that does not exist.
    """
    found = {}
    for name, spec in chosen_experts(config, only).items():
        card = _foreign_card(config, workdir, name, spec)
        if card is None:
            card = registry.describe(spec, **load_options(config, workdir, name))
        found[name] = as_stored(config, as_viewed(config, card))
    return found


def _foreign_card(config: Config, workdir: Path, name: str, spec: str) -> ExpertCard | None:
    """Returns the card of an expert outside the table from its store, so that the model need not be there."""
    own = specs.foreign(spec)
    if own is None:
        return None
    registry.parse(spec)
    try:
        return foreign.stored_card(own, Manifest.read(store_path(config, workdir, name)))
    except InputError:  # no store: only the model knows
        return None


def as_stored(config: Config, card: ExpertCard) -> ExpertCard:
    """Returns an expert's card with the grid that its codec (``features.codec``) leaves of its own."""
    codec = codecs.parse(codecs.codec_of(config.features.codec, card.name))
    return dataclasses.replace(card, grid=codec.grid(*card.grid))


def extract_all(
    config: Config,
    workdir: Path | str,
    *,
    experts: Sequence[str] | None = None,
    source: PictureSource | None = None,
    load: Callable[..., Expert] | None = None,
    progress: bool = True,
    share: tuple[int, int] | None = None,
) -> dict[str, list[Path]]:
    """Extracts every configured expert: all pictures plain and, with ``data.flip``, the training ones mirrored.

    Both are run by one compiled expert. The axes of a codec with PCA are fitted on training pictures and are the
    same for both.

    Args:
      config: of the run; its features, data and student sections are used.
      workdir: folder of the run.
      experts: only these of the configured experts, as specified there or by name.
      source: of the pictures; made from ``config.data`` when None.
      load: of experts, ``load(spec, **options)`` with `load_options`; the registry's when None.
      progress: show progress bars.
      share: (i, n): only this share of the shards, see `extract`; into an object store always, all when None.

    Returns:
      expert's name -> its stores.

    Raises:
      InputError: as `extract`; also an unknown expert, or one given twice.
    """
    base = _remote_base(config, workdir)
    if base is not None and share is None:
        share = (0, 1)
    chosen = chosen_experts(config, experts)
    chosen_codecs = {name: codecs.codec_of(config.features.codec, name) for name in chosen}
    if load is None:
        load = registry.load
        for spec in chosen.values():
            registry.parse(spec)  # a misspelt expert is told before another one runs for an hour
    if source is None:
        source = make_source(config.data)
    sides = split(source.ids, config.data.held_out, salt=config.data.split_salt, limit=config.data.limit)
    everything = np.sort(np.concatenate([sides.train, sides.held_out]))
    stores: dict[str, list[Path]] = {}
    for name, spec in chosen.items():
        with writing(workdir):
            Path(workdir).mkdir(parents=True, exist_ok=True)
            # The first process to come makes the student's start; the others shall not replace it under its reader.
            with claim(Path(workdir) / "start.lock", wait=True):
                options = load_options(config, Path(workdir), name)
        dtype = config.features.dtype if registry.takes(spec, "dtype") else "float32"
        if dtype != "float32":
            options = {**options, "dtype": dtype}
        expert = load(spec, **options)
        expert = dataclasses.replace(expert, card=as_viewed(config, expert.card))
        runs = [(False, expert.card.view, everything)]
        if config.data.flip and len(sides.train):
            runs.append((True, expert.card.view.flipped(), sides.train))
        runner, basis = Runner(expert, config.features.batch), None
        for flip, view, indices in runs:
            with contextlib.ExitStack() as stack:
                if base is None:
                    folder = store_path(config, workdir, name, flip=flip)
                else:
                    url = f"{base}/{name + FLIP_SUFFIX if flip else name}"
                    folder = stack.enter_context(sending(url, cache_folder(config.data.cache), share or (0, 1)))
                manifest = extract(
                    expert,
                    source,
                    indices,
                    folder,
                    codec=chosen_codecs[name],
                    medium=config.features.medium,
                    shard_records=config.features.shard_records,
                    runner=runner,
                    dtype=dtype,
                    view=view,
                    threads=config.data.threads,
                    progress=progress,
                    share=share,
                    basis=basis,
                    sample=sides.train if len(sides.train) else None,
                )
            basis = manifest.basis
            stores.setdefault(name, []).append(folder)
    return stores


def open_stores(
    config: Config, workdir: Path, *, flip: bool = False, only: Collection[str] | None = None
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
        if flip:
            # The plain store's manifest says how both are decoded.
            plain = Manifest.read(store_path(config, workdir, name))
            store.manifest.require(path, codec=plain.codec, basis_hash=plain.basis_hash)
        elif config.features.standardize == "phi_s" and name != "clip":
            store.manifest = fit_phi_s(path)
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
    if config.features.standardize == "phi_s":
        if manifest.phi_s is None:
            raise InputError(
                f"features of expert {name!r}: standardize=phi_s was not fitted; open them by `open_stores`"
            )
        return features._replace(patches=manifest.phi_s.project(features.patches))
    mean = np.asarray(moments.channel_mean, np.float32)
    return features._replace(patches=(features.patches - mean) / np.float32(max(moments.centred_std, 1e-6)))
