"""A run's step with its state, batch and frozen experts as shapes: nothing is read, drawn or computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tove_jax import methods
from tove_jax.config.schema import Config, HawaiiConfig, MergeConfig, ToVEConfig
from tove_jax.data.texts import bucket_lengths
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import clip, codecs, registry
from tove_jax.experts.base import ExpertCard
from tove_jax.experts.manifest import Manifest, describe
from tove_jax.experts.online import Online, arrange, online_experts
from tove_jax.experts.run import as_stored, as_viewed, chosen_experts
from tove_jax.experts.spectrum import Basis
from tove_jax.models.vit import from_config
from tove_jax.parallel import check_replication, map_paths
from tove_jax.parallel.sharding import batch_sharding
from tove_jax.train.initial import state_builder, state_shardings
from tove_jax.train.language import abstract_language
from tove_jax.train.objective import DTYPES, make_student, training_step
from tove_jax.train.state import TrainState
from tove_jax.train.step import jit_step


class AbstractRun(NamedTuple):
    """One step of a run, as `jax.jit` takes it; every leaf is a `jax.ShapeDtypeStruct`.

    Attributes:
      step: ``step(state, batch, experts)``, pure, not jitted.
      state, batch, experts: what it takes, with global shapes.
      online: the experts that run in the step.
    """

    step: Any
    state: TrainState
    batch: dict[str, Any]
    experts: dict[str, Any]
    online: Online


def abstract_run(config: Config, length: int | None = None) -> AbstractRun:
    """Returns the step that training would run, from shapes alone.

    Args:
      config: a whole run's settings; no file that they name is read, and shapes are those of the settings.
      length: tokens of a row of text; None: the longest that the settings allow.

    Raises:
      InputError: settings that do not fit each other; a merge, whose shapes another run's folder decides; an
        expert outside the table, which only its model knows.
    """
    if isinstance(config.method, MergeConfig):
        raise InputError("config.method: a merge takes its shapes from another run; plan that run in its place")
    method = methods.get(config.method.name)
    cards = {name: as_stored(config, card) for name, card in abstract_cards(config).items()}
    read = method.training_experts(config)
    online = abstract_online(config, read)
    stored = {name: abstract_manifest(config, cards[name]) for name in read if name not in online.experts}
    params = abstract_parameters(config, cards)
    side = abstract_language(config)
    if side is not None:
        params["language"] = side[1]
    build, optimizer = state_builder(config, params)
    state = jax.eval_shape(build, params)
    step = training_step(config, stored, online, None if side is None else side[0], optimizer)
    return AbstractRun(step, state, abstract_batch(config, stored, online, length), online.params, online)


def abstract_parameters(config: Config, cards: Mapping[str, ExpertCard]) -> dict[str, Any]:
    """Returns the shapes of `tove_jax.train.initial.initial_parameters`, which leaves the language model out."""
    student, size, key = make_student(config), config.student.image_size, jax.random.key(0)
    pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    method = methods.get(config.method.name)
    extra = jax.eval_shape(lambda key: method.init_extra(config, dict(cards), student.grid**2, key), key)
    return {"student": jax.eval_shape(student.init, key, pixels)["params"], "method": extra}


def abstract_cards(config: Config) -> dict[str, ExpertCard]:
    """Returns the card of every expert, as this run views it; `clip` is the student's start.

    Raises:
      InputError: an expert outside the table.
    """
    found = {}
    for name, spec in chosen_experts(config).items():
        known = spec.partition(":")[0]
        if known not in registry.cards():
            raise InputError(
                f"config.features.experts: only the model of '{spec}' knows its shapes; it cannot be planned"
            )
        card = clip_card(config) if name == "clip" else registry.describe(spec)
        found[name] = as_viewed(config, card)
    return found


def clip_card(config: Config) -> ExpertCard:
    """Returns the card of the student's start as an expert."""
    student = config.student
    side = student.image_size // student.patch_size
    view = dataclasses.replace(View.of_student(student), fit="crop")
    return dataclasses.replace(
        registry.cards()["clip"], view=view, grid=(side, side), width=student.width, summary_width=student.width
    )


def abstract_manifest(config: Config, card: ExpertCard) -> Manifest:
    """Returns the manifest of a store of one record; a codec's principal axes are zeros.

    It has no statistics, so standardisation, an elementwise pass over the features, is left out.
    """
    setting = codecs.codec_of(config.features.codec, card.name)
    rank = codecs.parse(setting).pca
    basis = Basis(np.zeros(card.width, np.float32), np.zeros((rank, card.width), np.float32)) if rank else None
    # The card's grid is pooled already; pooling what is pooled changes nothing.
    return describe(card, "", card.view, setting, ["0"], source="", source_licence="", shard_records=1, basis=basis)


def abstract_online(config: Config, read: Any) -> Online:
    """Returns the experts that run in the step, with shapes for parameters.

    Raises:
      InputError: one whose weights come in a package and have no published row.
    """
    rows = {row.card.name: row for family in registry.FAMILIES for row in family.ROWS}
    chosen, experts = chosen_experts(config), {}
    cards = abstract_cards(config)
    for name in online_experts(config, read):
        known, card, dtype = chosen[name].partition(":")[0], cards[name], config.train.dtype
        if known == "clip":
            student = dataclasses.replace(
                config.student, adapter=dataclasses.replace(config.student.adapter, kind="none")
            )
            params = _abstract_tree(from_config(student), student.image_size)
            expert = clip.expert(card, student, config.student.feature, params, "", dtype)
        elif known in rows:
            params = rows[known].abstract(card.view.size)
            expert = rows[known].expert(card, params, "", dtype)
        else:
            raise InputError(f"config.features.online: '{name}' has no published row, so its shapes are not known")
        experts[name] = dataclasses.replace(expert, params=_kernels(params, DTYPES[dtype]))
    return arrange(config, experts, {})


def abstract_batch(
    config: Config, stored: Mapping[str, Manifest], online: Online, length: int | None = None
) -> dict[str, Any]:
    """Returns the shapes of what `tove_jax.data.loader` gives, of the global batch.

    Raises:
      InputError: a length that is no bucket's.
    """
    size = config.student.image_size
    text = config.language.kind != "none"
    batch: tuple[int, ...] = (config.train.batch,)
    if text and config.text.pictures > 1:
        batch = (*batch, config.text.pictures)

    def rows(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*batch, *shape), dtype)

    given: dict[str, Any] = {
        "pixels": rows((size, size, 3), np.uint8),
        "features": {
            name: {key: rows(spec.shape, codecs.dtype_of(spec.dtype)) for key, spec in manifest.arrays.items()}
            for name, manifest in stored.items()
        },
        "mask": rows((), bool),
        "record": rows((), np.int32),
    }
    if online.views:
        given["views"] = {key: rows((view.size, view.size, 3), np.uint8) for key, view in online.views.items()}
    if config.data.source == "llava":
        given["has_picture"] = rows((), bool)
    if isinstance(config.method, ToVEConfig) and config.method.text_weight:
        given["captions"] = rows((config.method.caption_words,), np.int32)
        given["caption_mask"] = rows((config.method.caption_words,), bool)
    return given | ({"text": abstract_text(config, length)} if text else {})


def abstract_text(config: Config, length: int | None = None) -> dict[str, Any]:
    """Returns the shapes of what `tove_jax.data.texts.Texts.arrays` gives, of the global batch.

    Raises:
      InputError: a length that is no bucket's.
    """
    lengths = bucket_lengths(config.text)
    if length is not None and length not in lengths:
        raise InputError(f"--length {length}: expected one of the lengths that batches are padded to, {lengths}")
    method, rows = config.method, config.train.batch
    shape = (rows, length or lengths[-1])
    found = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in ("input_ids", "labels")}
    found["attention_mask"] = jax.ShapeDtypeStruct(shape, bool)
    if config.text.pack:
        found["segments"] = jax.ShapeDtypeStruct(shape, np.int32)
    found["dialogue"] = jax.ShapeDtypeStruct((rows,), np.int32)
    if isinstance(method, HawaiiConfig) and method.instruction_width:
        found["instruction"] = jax.ShapeDtypeStruct((rows, config.text.pictures, method.instruction_tokens), np.int32)
    return found


def on_mesh(config: Config, run: AbstractRun, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Returns state, batch and experts with their shardings on a mesh, checked as training checks them.

    Raises:
      InputError: something big that is replicated, or a batch that does not divide.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.train.batch % (config.train.accumulation * shards):
        raise InputError(
            f"config.train.batch: {config.train.batch} does not divide into accumulation "
            f"{config.train.accumulation} x {shards} shards of the batch"
        )

    def put(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
        )

    state = put(run.state, state_shardings(config, run.state, mesh))
    batch = put(run.batch, jax.tree.map(lambda _: batch_sharding(mesh), run.batch))
    experts = put(run.experts, run.online.shardings(mesh))
    for tree in (state, experts):
        check_replication(tree, mesh, config.train.replicated_limit_mb)
    return state, batch, experts


def lower(config: Config, run: AbstractRun, mesh: Mesh) -> Any:
    """Lowers the step for a mesh, as `tove_jax.train.loop` jits it."""
    given = on_mesh(config, run, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (given[0], given[2]))
    with jax.set_mesh(mesh):
        step: Any = jit_step(run.step, shardings[0], shardings[1], mesh, overlap=config.mesh.overlap)
        return step.trace(*given).lower()


def tree_bytes(tree: Any, *, sharded: bool = False) -> int:
    """Returns the bytes of a tree of shapes, as a whole or of one device's shards."""

    def size(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if sharded else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _abstract_tree(module: Any, size: int) -> Any:
    pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]


def _kernels(params: Any, dtype: Any) -> Any:
    def settle(path: str, leaf: Any) -> Any:
        kernel = path.rpartition("/")[2] == "kernel"
        return jax.ShapeDtypeStruct(leaf.shape, dtype if kernel else leaf.dtype)

    return map_paths(settle, params)
