"""Opens whatever can answer questions about pictures: a run with a language model, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax import methods
from tove_jax.config.derive import attached_experts, detach
from tove_jax.config.schema import Config
from tove_jax.data.conversation import get_template
from tove_jax.data.tokenizer import load_tokenizer
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts.online import load_online
from tove_jax.experts.run import standardized
from tove_jax.language.answer import Answerer
from tove_jax.language.chat import Chat, See
from tove_jax.language.model import LanguageModel, tokenizer_source
from tove_jax.models import vit
from tove_jax.parallel import make_mesh
from tove_jax.train.checkpoint import load_language, load_student
from tove_jax.train.handover import is_run
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
    if step is not None or experts is not None:
        raise InputError(f"{folder}: --step and --experts are of runs, expected a run's folder (checkpoints)")
    from tove_jax.hf.llava import open_llava

    return open_llava(folder, template=template, seed=seed, **options)


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
    tokenizer = load_tokenizer(tokenizer_source(config.language, config.text.tokenizer, run))
    # Answers are given in float32 on CPUs, where it is the faster one.
    cpu = jax.default_backend() == "cpu"
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="float32")) if cpu else config
    model = build(config, len(tokenizer))
    assert model is not None
    if config.language.initialize and (found := fingerprint(config.language.initialize)) != provenance["language"]:
        raise InputError(
            f"config.language.initialize: {config.language.initialize} is not the language model of {run}: expected "
            f"{provenance['language']}, found {found}"
        )
    mesh = make_mesh(dataclasses.replace(config.mesh, data=-1, fsdp=1, tensor=1), jax.local_devices()[:1])
    language, _ = initial_language(config, model, mesh, load_language(run, step))
    see = _seeing(config, run, model, params, language)
    name = template or config.text.template
    return Chat(model, language, tokenizer, get_template(name), see, config.text.limit, seed)


def _seeing(config: Config, run: Path, model: LanguageModel, params: Any, language: Any) -> See:
    """Returns what turns pictures into the decoder's tokens: the deployed encoder, its experts, the projector."""
    method = methods.get(config.method.name)
    student, view = vit.from_config(config.student, dtype=model.decoder.dtype), View.of_student(config.student)
    names = method.deployed_experts(config)
    every = dataclasses.replace(config, features=dataclasses.replace(config.features, online=("all",)))
    online = load_online(every, run, names)

    @jax.jit
    def tokens(params: Any, language: Any, experts: Any, batch: Any) -> jax.Array:
        prepared = online.prepare(experts, batch)
        features = {
            name: standardized(config, name, online.manifests[name], found) if name in online.manifests else found
            for name, found in prepared["features"].items()
        }
        found = method.tokens(student, params, view.normalize(batch["pixels"]), features, config)
        return model.project(language, found).astype(jnp.float32)

    def see(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for first in range(0, len(pictures), _SEEN_AT_ONCE):
            part = list(pictures[first : first + _SEEN_AT_ONCE])
            # One picture, or filled up: two shapes are compiled.
            size = 1 if len(part) == 1 else _SEEN_AT_ONCE
            filled = part + part[-1:] * (size - len(part))
            batch = {
                "pixels": np.stack([view.cut(picture) for picture in filled]),
                "views": {key: np.stack([shown.cut(p) for p in filled]) for key, shown in online.views.items()},
                "features": {},
            }
            found += list(np.asarray(tokens(params, language, online.params, batch))[: len(part)])
        return found

    return see
