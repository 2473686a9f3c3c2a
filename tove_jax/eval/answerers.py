"""Opens whatever can answer questions about pictures: a run with a language model, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax import methods
from tove_jax.config.derive import attached_experts, detach
from tove_jax.config.schema import Config, LanguageConfig
from tove_jax.data.anyres import Anyres
from tove_jax.data.conversation import get_template
from tove_jax.data.tokenizer import Tokenizer, load_tokenizer
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import codecs, registry
from tove_jax.experts.base import ExpertFeatures
from tove_jax.experts.run import as_viewed, chosen_experts, load_options, open_stores, standardized
from tove_jax.hf import llava
from tove_jax.language.answer import Answerer
from tove_jax.language.chat import Chat, See
from tove_jax.language.model import LanguageModel, tokenizer_source
from tove_jax.models import vit
from tove_jax.models.llava import Llava, pack_pictures
from tove_jax.parallel import make_mesh
from tove_jax.train.checkpoint import is_run, load_language, load_student
from tove_jax.train.language import build, fingerprint, initial_language

_SEEN_AT_ONCE = 16


def open_answerer(
    folder: Path | str,
    *,
    step: int | None = None,
    experts: Sequence[str] | None = None,
    template: str = "",
    seed: int = 0,
    **options: Any,
) -> Answerer:
    """Opens a model that answers.

    Args:
      folder: a run's folder, a Hugging Face folder of a LLaVA, or a hub id of one.
      step: of a run, a saved step; None: the newest.
      experts: of a ToVE run, those that are attached and run on the spot; None: all that it has attached.
      template: of the conversation; empty: that of the run, or ``v1``.
      seed: of answers that are drawn.
      **options: of `tove_jax.hf.llava.load`.

    Raises:
      InputError: nothing that answers is there; an expert that the run has not attached.
    """
    if is_run(folder):
        return _open_run(Path(folder), step, experts, template, seed)
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise InputError(
            f"{folder}: expected a run (checkpoints) or a Hugging Face folder (config.json), found neither"
        )
    if step is not None or experts is not None:
        raise InputError(f"{folder}: --step and --experts are of runs, expected a run's folder (checkpoints)")
    return _open_llava(folder, template or "v1", seed, **options)


def _open_llava(folder: Path | str, template: str, seed: int, **options: Any) -> Chat:
    """Opens LLaVA-1.5 or LLaVA-NeXT; in float32 on CPUs and bfloat16 elsewhere, unless told."""
    if jax.default_backend() != "cpu":
        options = {"store": jnp.bfloat16, "dtype": jnp.bfloat16} | options
    model, params, extras = llava.load(folder, **options)
    language = LanguageModel(LanguageConfig(kind="llava"), model.decoder, model.projector)
    see = _tiled(model, params, extras.view) if isinstance(extras.view, Anyres) else _whole(model, params, extras.view)
    limit = int(extras.config.get("text_config", extras.config).get("max_position_embeddings") or 4096)
    return Chat(language, params["language"], load_tokenizer(extras.folder), get_template(template), see, limit, seed)


def _whole(model: Llava, params: Any, view: View) -> See:
    """Returns LLaVA-1.5's way of seeing: each picture is cut once."""

    @jax.jit
    def tokens(params: Any, pixels: jax.Array) -> jax.Array:
        return model.project(params, model.tower_tokens(params, view.normalize(pixels))).astype(jnp.float32)

    def see(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for part, filled in _parts(pictures):
            pixels = np.stack([view.cut(picture) for picture in filled])
            found += list(np.asarray(tokens(params, pixels))[: len(part)])
        return found

    return see


def _tiled(model: Llava, params: Any, view: Anyres) -> See:
    """Returns LLaVA-NeXT's way of seeing: each picture in tiles, as many as its shape asks for."""

    @jax.jit
    def tokens(params: Any, pixels: jax.Array, index: jax.Array) -> jax.Array:
        tiles = model.project(params, model.tower_tokens(params, view.view.normalize(pixels)[None]))
        return pack_pictures(tiles, params["language"]["newline"], index[None])[0].astype(jnp.float32)

    def see(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = []
        for picture in pictures:
            size = picture.shape[:2]
            tiles, count = view.most_tiles, view.count(size)
            index = view.index([size], tiles=tiles, length=view.most_tokens)
            pixels = view.stack([picture], tiles=tiles)
            found.append(np.asarray(tokens(params, pixels, index))[:count])
        return found

    return see


def _parts(pictures: Sequence[np.ndarray]) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Yields some pictures at a time, and the same filled up: one or a fixed number, so that two shapes are compiled."""
    for first in range(0, len(pictures), _SEEN_AT_ONCE):
        part = list(pictures[first : first + _SEEN_AT_ONCE])
        size = 1 if len(part) == 1 else _SEEN_AT_ONCE
        yield part, part + part[-1:] * (size - len(part))


def _open_run(run: Path, step: int | None, experts: Sequence[str] | None, template: str, seed: int) -> Chat:
    config, params, provenance = load_student(run, step)
    if config.language.kind == "none":
        raise InputError(f"{run}: expected a run with a language model, config.language.kind is 'none'")
    if experts is not None:
        attached = attached_experts(config)
        unknown = [name for name in experts if name not in attached]
        if unknown:
            raise InputError(f"--experts: {unknown[0]!r} is not attached to {run}; attached: {', '.join(attached)}")
        config = detach(config, [name for name in attached if name not in experts])
    # Answers are given in float32 on CPUs, where it is the faster one.
    if jax.default_backend() == "cpu":
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="float32"))
    tokenizer, model, language = read_language(config, run, step, provenance)
    see = _seeing(config, run, provenance, model, params, language)
    name = template or config.text.template
    return Chat(model, language, tokenizer, get_template(name), see, config.text.limit, seed)


def read_language(
    config: Config, run: Path, step: int | None, provenance: Mapping[str, Any]
) -> tuple[Tokenizer, LanguageModel, dict[str, Any]]:
    """Reads the language side of a run onto the first device.

    Args:
      config: the run's settings; what did not train has the dtype ``train.dtype``.
      run: its folder.
      step: a saved step; None: the newest.
      provenance: of the checkpoint.

    Returns:
      The tokenizer, the modules, and ``{"projector", "model", "lora"}``.

    Raises:
      InputError: the language model it began with is not there, or is another one.
    """
    tokenizer = load_tokenizer(tokenizer_source(config.language, config.text.tokenizer, run))
    model = build(config, len(tokenizer))
    assert model is not None
    if config.language.initialize and (found := fingerprint(config.language.initialize)) != provenance["language"]:
        raise InputError(
            f"config.language.initialize: {config.language.initialize} is not the language model of {run}: expected "
            f"{provenance['language']}, found {found}"
        )
    mesh = make_mesh(dataclasses.replace(config.mesh, data=-1, fsdp=1, tensor=1), jax.local_devices()[:1])
    return tokenizer, model, initial_language(config, model, mesh, load_language(run, step))


def _seeing(
    config: Config, run: Path, provenance: Mapping[str, Any], model: LanguageModel, params: Any, language: Any
) -> See:
    """Returns what turns pictures into the decoder's tokens: the deployed encoder, its experts, the projector."""
    method = methods.get(config.method.name)
    student, view = vit.from_config(config.student, dtype=model.decoder.dtype), View.of_student(config.student)
    experts = [_Expert(config, run, name, provenance) for name in method.deployed_experts(config)]

    @jax.jit
    def tokens(params: Any, language: Any, pixels: jax.Array, features: Any) -> jax.Array:
        shown = {one.name: one.settled(config, features[one.name]) for one in experts}
        found = method.tokens(student, params, view.normalize(pixels), shown, config)
        return model.project(language, found).astype(jnp.float32)

    def see(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for part, filled in _parts(pictures):
            pixels = np.stack([view.cut(picture) for picture in filled])
            features = {one.name: one.see(filled) for one in experts}
            found += list(np.asarray(tokens(params, language, pixels, features))[: len(part)])
        return found

    return see


class _Expert:
    """An expert of a run that runs on the spot, on whatever device it runs on."""

    def __init__(self, config: Config, run: Path, name: str, provenance: Mapping[str, Any]) -> None:
        loaded = registry.load(chosen_experts(config)[name], **load_options(config, run, name))
        expected = provenance.get(f"expert/{name}", loaded.weights_hash)
        if loaded.weights_hash != expected:
            raise InputError(
                f"expert '{name}': {run} was trained with weights {expected}, those at hand are {loaded.weights_hash}"
            )
        self.name = name
        self._view, self._params = as_viewed(config, loaded.card).view, loaded.params
        self._apply = jax.jit(loaded.apply) if loaded.card.backend == "jax" else loaded.apply
        self._codec = codecs.parse(codecs.codec_of(config.features.codec, name))
        self._manifest = None
        if config.features.standardize != "none":
            self._manifest = open_stores(config, run, only=[name])[name].manifest

    def see(self, pictures: Sequence[np.ndarray]) -> ExpertFeatures:
        """Returns the features of pictures."""
        return self._apply(self._params, np.stack([self._view.cut(picture) for picture in pictures]))

    def settled(self, config: Config, found: ExpertFeatures) -> ExpertFeatures:
        """Returns them as training reads them, rounding apart."""
        found = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), found)
        found = found._replace(patches=self._codec.pooled(found.patches))
        return found if self._manifest is None else standardized(config, self.name, self._manifest, found)
