"""Makes a run's report: reads its folder, runs the networks on a few pictures, writes the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tove_jax.config.schema import Config, MergeConfig
from tove_jax.errors import InputError
from tove_jax.eval.predictors import run_folder_source
from tove_jax.eval.run import with_stored_settings
from tove_jax.experts import registry
from tove_jax.experts.manifest import Manifest
from tove_jax.experts.run import as_viewed, chosen_experts, load_options, store_path
from tove_jax.files.atomic import atomic_write_bytes
from tove_jax.report import looks, maps, page
from tove_jax.report.collect import ExpertFacts, collect, require_folder
from tove_jax.train.checkpoint import load_student
from tove_jax.train.initial import start_parameters


def _plain(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _defaults(config: Config) -> Config:
    """Returns the defaults beside which a run's settings are changed ones: those of its own methods."""
    method = type(config.method)()
    if isinstance(method, MergeConfig) and isinstance(config.method, MergeConfig):
        method = dataclasses.replace(method, source_method=type(config.method.source_method)())
    return dataclasses.replace(Config(), method=method)


def expert_facts(config: Config, workdir: Path) -> tuple[ExpertFacts, ...]:
    """Returns what is known of a run's experts from their cards and feature stores; loads none.

    Raises:
      InputError: an unknown expert.
    """
    facts = []
    for name, spec in chosen_experts(config).items():
        card = as_viewed(config, registry.describe(spec, **load_options(config, workdir, name)))
        view = f"{card.view.size} px, {card.view.fit}"
        high, wide = card.grid
        gives, weights_hash = f"{high} × {wide} × {card.width}", ""
        try:
            manifest = Manifest.read(store_path(config, workdir, name))
            gives, weights_hash = f"{gives}, stored as {manifest.codec}", manifest.weights_hash
        except InputError:
            gives += ", not extracted"
        facts.append(ExpertFacts(name, card.title, card.paper, card.weights, weights_hash, card.licence, view, gives))
    return tuple(facts)


def make_report(workdir: Path | str, config: Config | None = None, *, pictures: int = 6) -> Path:
    """Writes ``<workdir>/report.html``, one self-contained page.

    What is missing (no checkpoint, no evaluation, an expert that cannot be loaded) is said on the
    page, with the command that makes it.

    Args:
      workdir: the run's folder.
      config: places and evaluation settings, as for `evaluate_run`; and the settings shown while
        there is no checkpoint.
      pictures: held-out pictures, and photographs, shown with maps; with a language model twice as many with a
        question; 0: none.

    Returns:
      The page's path.

    Raises:
      InputError: no such folder, a file in it that cannot be read, or the page cannot be written.
    """
    workdir = require_folder(workdir)
    missing: dict[str, str] = {}
    known: dict[str, Any] = {}
    params = None
    try:
        stored, params, provenance = load_student(workdir)
        config = with_stored_settings(stored, config)
        known["provenance"] = provenance
    except InputError as error:
        missing["pictures"] = str(error)
        missing.setdefault("config", str(error))
    if config is not None:
        known.update(config=_plain(config), defaults=_plain(_defaults(config)))
        known.update(title=config.title or workdir.resolve().name, experts=tuple(chosen_experts(config)))
        try:
            known["facts"] = expert_facts(config, workdir)
        except InputError as error:
            missing["facts"] = str(error)
    if params is not None and config is not None and pictures:
        try:
            source, _, held_out = run_folder_source(config)
            known.update(pictures_name=source.name, pictures_licence=source.licence)
            start = start_parameters(config, workdir)
            chosen = maps.choose_pictures(source, held_out, pictures)
            known["pictures"] = maps.make_maps(config, params, start, workdir, chosen)
        except InputError as error:
            missing["pictures"] = str(error)
    if params is not None and config is not None and config.language.kind != "none" and pictures:
        try:
            known["asked"] = looks.make_asked(config, workdir, 2 * pictures)
        except InputError as error:
            missing["asked"] = str(error)
    run = collect(workdir, missing=missing, **known)
    path = workdir / "report.html"
    atomic_write_bytes(path, page.render(run).encode("utf-8"))
    return path
