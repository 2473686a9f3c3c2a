"""The language side of a run: its tokenizer, its conversations, and where its parameters come from."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tove_jax.config.schema import Config, HawaiiConfig
from tove_jax.data.cache import cache_folder
from tove_jax.data.conversation import IMAGE, check_tokenizer, get_template
from tove_jax.data.dialogue import Dialogue, dialogues_of, pictures_of
from tove_jax.data.lengths import dialogue_lengths
from tove_jax.data.picture import PictureSource
from tove_jax.data.split import Split
from tove_jax.data.texts import Texts, bucket_lengths
from tove_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tove_jax.errors import InputError
from tove_jax.files.slices import index_arrays
from tove_jax.hf import llama as hf_llama
from tove_jax.hf.load import locate
from tove_jax.language import model as language_model
from tove_jax.language.model import LanguageModel, tokenizer_source
from tove_jax.parallel import first_match, logical_specs, tree_shardings
from tove_jax.train.objective import DTYPES
from tove_jax.train.state import flatten, unflatten

TOKENIZER_SIZE = 1024
"""Pieces of a tokenizer that a run trains for itself, unless `language.vocabulary` says another number; ours."""


class LanguageSide(NamedTuple):
    """What a run with a language model has beside the others.

    Attributes:
      model: the modules.
      texts: the training conversations.
      origins: hash of the tokenizer, by ``tokenizer``.
    """

    model: LanguageModel
    texts: Texts
    origins: dict[str, str]


def open_language(
    config: Config, workdir: Path, source: PictureSource, sides: Split, *, progress: bool = True
) -> LanguageSide | None:
    """Opens the language side of a run; None where it has none.

    Raises:
      InputError: settings, conversations and tokenizer that do not fit each other.
    """
    if config.language.kind == "none":
        return None
    numbers, _ = chosen_dialogues(source, sides)
    tokenizer = run_tokenizer(config, workdir, source, numbers)
    model = build(config, len(tokenizer))
    assert model is not None
    cache = cache_folder(config.data.cache)
    texts = make_texts(config, source, numbers, tokenizer, cache=cache, progress=progress)
    return LanguageSide(model, texts, {"tokenizer": tokenizer_hash(tokenizer)})


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Returns a hash of all that decides a tokenizer's ids."""
    content = tokenizer.inner.backend_tokenizer.to_str() + repr((tokenizer.begin, tokenizer.end, tokenizer.space_first))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def chosen_dialogues(source: PictureSource, sides: Split) -> tuple[list[int], list[int]]:
    """Returns which conversations train and which are held out: those whose pictures all do, or all are.

    A conversation without a picture trains, unless nothing does; one with pictures of both sides is left out.
    """
    train, held_out = set(map(int, sides.train)), set(map(int, sides.held_out))
    found: tuple[list[int], list[int]] = ([], [])
    dialogues = dialogues_of(source)
    for number in range(len(dialogues)):
        pictures = set(pictures_of(dialogues, number))
        if pictures <= train:
            found[0].append(number)
        elif pictures <= held_out:
            found[1].append(number)
    return found


def read_pictures(source: PictureSource, sides: Split) -> np.ndarray:
    """Returns the numbers of the pictures that training reads: its side, and the blank one where there is one."""
    told = getattr(source, "pictured", None)
    blank = np.zeros(0, np.int32) if told is None else np.flatnonzero(~np.asarray(told, bool)).astype(np.int32)
    return np.unique(np.concatenate([sides.train, blank]).astype(np.int32))


def run_tokenizer(config: Config, workdir: Path, source: PictureSource, numbers: list[int]) -> Tokenizer:
    """Opens the run's tokenizer; trains one on its conversations where the settings name none.

    Raises:
      InputError: no such tokenizer, or one that lacks what the template needs.
    """
    name = tokenizer_source(config.language, config.text.tokenizer, workdir)
    own = workdir / "tokenizer"
    if name == str(own) and not own.exists():
        if not jax.process_index():
            dialogues = dialogues_of(source)
            template = get_template(config.text.template)
            frames = {"human": template.question + template.reply, "gpt": ""}
            for mark in template.tokens:
                frames["human"] = frames["human"].replace(mark, "")
            # The template's own words recur in every round, so they deserve pieces of their own.
            texts = (
                text
                for number in numbers
                for turn in dialogues[number].turns
                for text in (turn["value"].replace(IMAGE, ""), frames[turn["from"]])
            )
            train_tokenizer(texts, own, size=config.language.vocabulary or TOKENIZER_SIZE)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("tokenizer")
    tokenizer = load_tokenizer(name)
    check_tokenizer(get_template(config.text.template), tokenizer)
    return tokenizer


def make_texts(
    config: Config,
    source: PictureSource,
    numbers: list[int],
    tokenizer: Tokenizer,
    *,
    cache: Path | None,
    progress: bool = True,
    epochs: int | None = None,
) -> Texts:
    """Prepares conversations for the loader; counts their tokens, which is kept in the cache.

    Raises:
      InputError: no conversation, or one that does not fit its template.
    """
    if not numbers:
        raise InputError("config.data: no conversation has all its pictures on the training side")
    bucket_lengths(config.text)
    dialogues = dialogues_of(source)
    places = picture_places(config)
    chosen: list[Dialogue] = [dialogues[number] for number in numbers]
    lengths = dialogue_lengths(
        chosen,
        get_template(config.text.template),
        tokenizer,
        picture_tokens=places,
        limit=config.text.limit,
        cache=cache,
        progress=progress,
    )
    full = int((lengths >= config.text.limit).sum())
    if full and progress and not jax.process_index():
        print(
            f"train: {full} of {len(lengths)} conversations fill text.limit = {config.text.limit} tokens; what is beyond "
            "it is cut, answers too",
            file=sys.stderr,
        )
    method = config.method
    reads = isinstance(method, HawaiiConfig) and method.instruction_width
    return Texts(
        dialogues=dialogues,
        numbers=np.asarray(numbers, np.int32),
        lengths=lengths,
        tokenizer=tokenizer,
        settings=config.text,
        picture_tokens=places,
        batch=config.train.batch,
        seed=config.train.seed,
        instruction=method.instruction_tokens if isinstance(method, HawaiiConfig) and reads else 0,
        epochs=epochs,
    )


def picture_places(config: Config) -> int:
    """Returns how many places a picture takes among the tokens of a text; none where the decoder looks across."""
    if config.language.kind != "llava":
        return 0
    return (config.student.image_size // config.student.patch_size) ** 2


def build(config: Config, vocabulary: int, *, read: bool = True) -> LanguageModel | None:
    """Returns the modules of a run's language side; None where it has none.

    Raises:
      InputError: settings that do not fit the language model, or the method.
    """
    if config.language.kind == "none":
        return None
    method = config.method
    if getattr(method, "text_weight", 0):
        raise InputError(
            "config.method.text_weight: the caption head stands in for a language model; set it to 0 beside "
            f"language.kind '{config.language.kind}'"
        )
    if isinstance(method, HawaiiConfig) and method.instruction_width not in (0, config.language.width):
        raise InputError(
            f"config.method.instruction_width: expected language.width {config.language.width} or 0, found "
            f"{method.instruction_width}"
        )
    dtype = DTYPES[config.train.dtype]
    return language_model.build(config.language, vocabulary, config.student.width, dtype=dtype, read=read)


def initial_language(
    config: Config, model: LanguageModel, mesh: Mesh, handed: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Makes the language parameters on the mesh, each straight into its shards.

    The decoder is read from ``language.initialize``, or drawn; what trains is float32, the rest has the compute
    dtype. The projector and the like are drawn from ``train.seed``.

    Args:
      config: the run's settings.
      model: of `build`.
      mesh: the device mesh.
      handed: flat ``language/...`` leaves of the run that this one goes on from, which take the place of drawn and
        read ones.

    Returns:
      ``{"projector", "model", "lora"}``, and hashes: ``language`` of the decoder's files.

    Raises:
      InputError: weights that do not fit; leaves of another shape.
    """
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(config.train.seed + 1), 2))
    width = config.student.width
    shapes = jax.eval_shape(lambda: whole(model, width, first, second))
    flat = {f"language/{path}": leaf for path, leaf in flatten(shapes).items()}
    factors = first_match(config.optim.groups, flat, "config.optim.groups")
    axes = logical_specs(flat, language_model.logical_axes(config.language), "logical axes")
    shardings = tree_shardings(flat, axes, mesh)
    dtypes = {path: jnp.float32 if factors[path] is not None else DTYPES[config.train.dtype] for path in flat}
    origins: dict[str, str] = {}
    found: dict[str, Any] = {}
    if config.language.initialize:
        store = dtypes[next(path for path in flat if path.endswith("token_embed"))]
        trained = any(factors[path] is not None for path in flat if path.startswith("language/model/"))
        read, notes = _read_decoder(config, model, mesh, jnp.float32 if trained else store)
        found = {f"language/model/{path}": leaf for path, leaf in flatten(read).items()}
        origins["language"] = fingerprint(config.language.initialize)
        for note in notes if not jax.process_index() else ():
            print(f"train: from {config.language.initialize}: {note}", file=sys.stderr)
    drawn = [path for path in flat if path not in found]

    def draw() -> dict[str, Any]:
        tree = flatten(whole(model, width, first, second))
        return {path: tree[path.removeprefix("language/")].astype(dtypes[path]) for path in drawn}

    found |= jax.jit(draw, out_shardings={path: shardings[path] for path in drawn})()
    for path, leaf in (handed or {}).items():
        if path not in flat or np.shape(leaf) != flat[path].shape:
            expected = flat[path].shape if path in flat else "nothing"
            raise InputError(f"config.train.start_from: {path}: expected {expected}, found {np.shape(leaf)}")
        found[path] = jax.device_put(np.asarray(leaf).astype(dtypes[path]), shardings[path])
    return unflatten(found)["language"], origins


def abstract_language(config: Config) -> tuple[LanguageModel, dict[str, Any]] | None:
    """Returns the modules and the shapes of `initial_language` by the settings alone; None without a language model."""
    model = build(config, config.language.vocabulary or TOKENIZER_SIZE, read=False)
    if model is None:
        return None
    key = jax.random.key(0)
    return model, jax.eval_shape(lambda: whole(model, config.student.width, key, key))


def whole(model: LanguageModel, student_width: int, first: jax.Array, second: jax.Array) -> dict[str, Any]:
    """Draws all language parameters, float32."""
    example = {"tokens": jnp.zeros((1, 1), jnp.int32)}
    if model.projector is None:
        example["pictures"] = jnp.zeros((1, 1, student_width))
    decoder = model.decoder.init(first, **example)["params"]
    return {"model": decoder, **language_model.fresh(model, student_width, second)}


def _read_decoder(config: Config, model: LanguageModel, mesh: Mesh, store: Any) -> tuple[Any, list[str]]:
    folder = locate(config.language.initialize)
    if config.language.kind == "tove":
        from tove_jax.hf import roberta

        key = jax.random.fold_in(jax.random.key(config.train.seed + 1), 3)
        wanted = {"picture_width": config.student.width, "adaptor_width": config.language.adaptor_width}
        loaded = roberta.load(folder, mesh=mesh, store=store, rng=key, **wanted)
        fresh = sorted({path.split("/")[1] for path in loaded.fresh})
        return loaded.params, [f"drawn, since the file has none: {', '.join(fresh)}"] if fresh else []
    arrays = index_arrays(folder)
    return hf_llama.load_params(model.decoder, arrays, mesh=mesh, store=store, source=str(folder)), []


def fingerprint(folder_or_hub_id: str, piece: int = 2**20) -> str:
    """Returns a hash of a model's config and of the size, the first and the last piece of each file of weights.

    Hashing all of a language model's bytes would cost every process minutes.
    """
    digest = hashlib.blake2b(digest_size=16)
    folder = locate(folder_or_hub_id)
    digest.update((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(piece))
            file.seek(max(0, size - piece))
            digest.update(file.read(piece))
    return digest.hexdigest()
