"""The language side of a run: its tokenizer, its conversations, and where its parameters come from."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from tove_jax.files.atomic import atomic_folder
from tove_jax.files.slices import index_arrays
from tove_jax.hf import llama as hf_llama
from tove_jax.hf.load import locate
from tove_jax.language import model as language_model
from tove_jax.language.model import LanguageModel, tokenizer_source
from tove_jax.parallel import first_match, logical_specs, together, tree_shardings
from tove_jax.train.handover import source_run
from tove_jax.train.objective import DTYPES
from tove_jax.train.state import flatten, unflatten

TOKENIZER_SIZE = 1024
"""Pieces of a tokenizer that a run trains for itself, unless `language.vocabulary` says another number; ours."""


class LanguageSide(NamedTuple):
    """What a run with a language model has beside the others.

    Attributes:
      model: the modules.
      texts: the training conversations.
      origins: hashes: ``tokenizer``, and ``language`` of the decoder's files where it is read from some.
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
    dialogues = dialogues_of(source)
    numbers, _ = chosen_dialogues(dialogues, sides)
    tokenizer = run_tokenizer(config, workdir, dialogues, numbers)
    model = build(config, len(tokenizer))
    assert model is not None
    cache = cache_folder(config.data.cache)
    texts = make_texts(config, dialogues, numbers, tokenizer, cache=cache, progress=progress)
    origins = {"tokenizer": tokenizer_hash(tokenizer)}
    if config.language.initialize:
        origins["language"] = fingerprint(config.language.initialize)
    return LanguageSide(model, texts, origins)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Returns a hash of all that decides a tokenizer's ids."""
    content = tokenizer.inner.backend_tokenizer.to_str() + repr((tokenizer.begin, tokenizer.end, tokenizer.space_first))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def chosen_dialogues(dialogues: Sequence[Dialogue], sides: Split) -> tuple[list[int], list[int]]:
    """Returns which conversations train and which are held out: those whose pictures all do, or all are.

    A conversation without a picture trains; one with pictures of both sides is left out.
    """
    train, held_out = set(map(int, sides.train)), set(map(int, sides.held_out))
    found: tuple[list[int], list[int]] = ([], [])
    for number in range(len(dialogues)):
        pictures = set(pictures_of(dialogues, number))
        if pictures <= train:
            found[0].append(number)
        elif pictures <= held_out:
            found[1].append(number)
    return found


def run_tokenizer(config: Config, workdir: Path, dialogues: Sequence[Dialogue], numbers: Sequence[int]) -> Tokenizer:
    """Opens the run's tokenizer. Where the settings name none, that of the run it goes on from, or one trained here.

    Raises:
      InputError: no such tokenizer, or one that lacks what the template needs.
    """
    name, own = tokenizer_source(config.language, config.text.tokenizer, workdir), workdir / "tokenizer"
    with together.first_before_others("tokenizer"):
        if name == str(own) and not own.exists():
            source = source_run(config)
            handed = None if source is None else source[0] / "tokenizer"
            if handed is not None and handed.is_dir():
                # Other pieces would give every id that the handed model knows another meaning.
                with atomic_folder(own) as temporary:
                    shutil.copytree(handed, temporary, dirs_exist_ok=True)
            else:
                texts = _tokenizer_texts(config, dialogues, numbers)
                train_tokenizer(texts, own, size=config.language.vocabulary or TOKENIZER_SIZE)
    tokenizer = load_tokenizer(name)
    check_tokenizer(get_template(config.text.template), tokenizer)
    return tokenizer


def _tokenizer_texts(config: Config, dialogues: Sequence[Dialogue], numbers: Sequence[int]) -> Iterator[str]:
    """Yields the turns, and the template's own words in every round, which recur and so deserve pieces of their own."""
    template = get_template(config.text.template)
    frame = template.question + template.reply
    for mark in template.tokens:
        frame = frame.replace(mark, "")
    for number in numbers:
        for turn in dialogues[number].turns:
            yield turn["value"].replace(IMAGE, "")
            if turn["from"] == "human":
                yield frame


def make_texts(
    config: Config,
    dialogues: Sequence[Dialogue],
    numbers: Sequence[int],
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
    if config.language.kind == "tove" and config.text.pack:
        raise InputError("config.text.pack: texts that share a row would see each other's pictures; kind 'tove' cannot")
    if isinstance(method, HawaiiConfig) and method.instruction_width not in (0, config.language.width):
        raise InputError(
            f"config.method.instruction_width: expected language.width {config.language.width} or 0, found "
            f"{method.instruction_width}"
        )
    dtype = DTYPES[config.train.dtype]
    return language_model.build(config.language, vocabulary, config.student.width, dtype=dtype, read=read)


def initial_language(
    config: Config, model: LanguageModel, mesh: Mesh, handed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
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
      ``{"projector", "model", "lora"}``.

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
    handed, found = dict(handed or {}), {}
    decoder = [path for path in flat if path.startswith("language/model/")]
    if config.language.initialize and not all(path in handed for path in decoder):
        store = dtypes[next(path for path in flat if path.endswith("token_embed"))]
        trained = any(factors[path] is not None for path in decoder)
        read, notes = _read_decoder(config, model, mesh, jnp.float32 if trained else store)
        found = {f"language/model/{path}": leaf for path, leaf in flatten(read).items()}
        for note in notes if not jax.process_index() else ():
            print(f"train: from {config.language.initialize}: {note}", file=sys.stderr)
    drawn = [path for path in flat if path not in found and path not in handed]

    def draw() -> dict[str, Any]:
        tree = flatten(whole(model, width, first, second))
        return {path: tree[path.removeprefix("language/")].astype(dtypes[path]) for path in drawn}

    found |= jax.jit(draw, out_shardings={path: shardings[path] for path in drawn})()
    for path, leaf in handed.items():
        if path not in flat or np.shape(leaf) != flat[path].shape:
            expected = flat[path].shape if path in flat else "nothing"
            raise InputError(f"config.train.start_from: {path}: expected {expected}, found {np.shape(leaf)}")
        found[path] = jax.device_put(np.asarray(leaf).astype(dtypes[path]), shardings[path])
    return unflatten(found)["language"]


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
