"""Knowledge merging: the tokens of a finished run, distilled into one plain CLIP tower (ToVE's, arXiv 2504.00691).

Shapes: B rows, N tokens, d width. The source is a run of any other method, frozen: ToVE's CLIP with its
attached experts, or a MoVE-KD or HAWAII student with its adapters. Its deployed tokens are the target,
computed inside the step from the pixels and the stored features of its deployed experts:

    T'       = tokens of the source                          `tove_jax.methods.tove.tokens`, for one
    t        = tokens of the merged tower, a plain CLIP
    L_merge  = mean_bi |t_bi - stop_gradient(T'_bi)|^2 / d
    loss     = L_merge + text_weight L_text(t)

The merged tower begins as the source's own tower without its adapters. For ToVE that is CLIP; a MoVE-KD or
HAWAII student may have trained its tower, and its adapters were learnt on top of that one, so it is the
plain tower that is closest to the target.

What trains is the group ``student``: the tower up to ``student.feature``, its last n blocks alone, or
low-rank updates (LoRA, arXiv 2106.09685, with scale one) of the blocks' kernels, W + A B. `fold` puts that
into the source's tower, so the result has exactly CLIP's parameters. The source is the group ``teacher``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from tove_jax.adapters import caption_head
from tove_jax.config.schema import Config, ToVEConfig
from tove_jax.data.vocabulary import Vocabulary
from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.files import mirror
from tove_jax.methods import hawaii, move_kd, tove
from tove_jax.methods.move_kd import masked_mean, masked_variance, precise
from tove_jax.models import vit
from tove_jax.models.vit import VisionTransformer, encode

SOURCES = {"move_kd": move_kd, "hawaii": hawaii, "tove": tove}

LOGICAL_AXES = (
    (r"student/layers/attention/(query|key|value)/a_kernel", ("layers", "embed", "rank")),
    (r"student/layers/attention/(query|key|value)/b_kernel", ("layers", "rank", "heads")),
    (r"student/layers/attention/out/a_kernel", ("layers", "heads", "rank")),
    (r"student/layers/attention/out/b_kernel", ("layers", "rank", "embed")),
    (r"student/layers/mlp/fc1/a_kernel", ("layers", "embed", "rank")),
    (r"student/layers/mlp/fc1/b_kernel", ("layers", "rank", "mlp")),
    (r"student/layers/mlp/fc2/a_kernel", ("layers", "mlp", "rank")),
    (r"student/layers/mlp/fc2/b_kernel", ("layers", "rank", "embed")),
    *tove.LOGICAL_AXES,
)

MergeLoss = Literal["mse", "cosine", "cosine_smooth_l1"]


def source_config(config: Config) -> Config:
    """Returns the settings of the source, as its method and its student read them."""
    student = dataclasses.replace(config.student, adapter=config.method.source_adapter)
    return dataclasses.replace(config, student=student, method=config.method.source_method)


def source_experts(config: Config) -> tuple[str, ...]:
    """Returns the experts that the source needs beside it when deployed: ToVE's attached ones."""
    source = source_config(config)
    return SOURCES[source.method.name].deployed_experts(source)


def visible_tokens(outputs: dict[str, jax.Array], config: Config) -> jax.Array:
    """Returns t (B, N, d)."""
    del config
    return outputs["tokens"]


def training_experts(config: Config) -> tuple[str, ...]:
    """Returns the experts whose features training reads: those of the deployed source."""
    return source_experts(config)


def deployed_experts(config: Config) -> tuple[str, ...]:
    """Returns no expert: that is what merging is for."""
    del config
    return ()


def vocabulary(config: Config, captions: Sequence[str | None]) -> Vocabulary | None:
    """Returns the words of the source's caption head, as its folder keeps them; None without the text loss."""
    del captions
    return Vocabulary.read(mirror.reading(config.method.source)) if config.method.text_weight else None


def init_extra(config: Config, contracts: dict[str, ExpertCard], student_tokens: int, rng: jax.Array) -> dict[str, Any]:
    """Returns no parameters: nothing trains beside the student. See `initial`."""
    del config, contracts, student_tokens, rng
    return {}


def initial(config: Config, source: dict[str, Any], start: Any, rng: jax.Array) -> dict[str, Any]:
    """Makes every parameter of a run before its first step.

    Args:
      config: a whole run's settings.
      source: ``{"student", "method"}`` of the finished run.
      start: its start, a plain CLIP tree.
      rng: key of the low-rank updates.

    Returns:
      ``{"student": what trains, "teacher": {"student", "method"?}}``. The first is a part of a plain tower's
      tree, ``layers`` with the trained blocks alone; with ``lora_rank`` r its kernels are ``{"a_kernel"
      (n, d_in, r), "b_kernel" (n, r, d_out)}``, B zero. Of the source only what its tokens need is kept.

    Raises:
      InputError: settings that contradict each other.
    """
    method = config.method
    _check(config)
    first, stop = trained_blocks(config)
    tower = plain_tower(source["student"]) if method.begin == "tower" else start
    layers = jax.tree.map(lambda leaf: leaf[first:stop], tower["layers"])
    if method.lora_rank:
        student = {"layers": _low_rank(layers, method.lora_rank, rng)}
    elif method.blocks:
        student = {"layers": layers}
    else:
        student = {name: leaf for name, leaf in tower.items() if name != "post_norm"} | {"layers": layers}
    teacher = {"student": source["student"]}
    own = source.get("method", {})
    needed = {name: own[name] for name in own if name != "caption_head" and source_experts(config)}
    if method.text_weight:
        needed["caption_head"] = own["caption_head"]
    return {"student": student, "teacher": {**teacher, "method": needed} if needed else teacher}


def _check(config: Config) -> None:
    method, adapter = config.method, config.student.adapter
    if adapter.kind != "none":
        raise InputError(
            f"config.student.adapter.kind: a merged tower is plain: expected 'none', found '{adapter.kind}'"
        )
    if method.lora_rank < 0:
        raise InputError(f"config.method.lora_rank: expected 0 or more, found {method.lora_rank}")
    if method.begin == "start" and (method.blocks or method.lora_rank):
        raise InputError(
            "config.method.begin: 'start' trains the whole tower: expected blocks = 0 and lora_rank = 0, found "
            f"{method.blocks} and {method.lora_rank}"
        )
    head = isinstance(method.source_method, ToVEConfig) and method.source_method.text_weight
    if method.text_weight and not head:
        raise InputError(
            f"config.method.text_weight: expected 0, the source ({method.source_method.name}) has no caption head"
        )


def trained_blocks(config: Config) -> tuple[int, int]:
    """Returns the first block that trains and the one after the last, which `student.feature` needs.

    Raises:
      InputError: a feature that is not a layer's tokens, or more blocks than it comes through.
    """
    feature, depth, blocks = config.student.feature, config.student.layers, config.method.blocks
    found = re.fullmatch(r"layers/(-?\d+)", feature)
    if not found or not -depth <= int(found[1]) < depth:
        raise InputError(f"config.student.feature: expected layers/<i> of {depth} layers, found '{feature}'")
    stop = int(found[1]) % depth + 1
    if not 0 <= blocks <= stop:
        raise InputError(f"config.method.blocks: expected 0 to {stop}, the blocks up to {feature}, found {blocks}")
    return (stop - blocks if blocks else 0), stop


def plain_tower(student: Any) -> Any:
    """Returns a student's tree without its adapters."""
    layers = student["layers"]
    mlp = {name: leaf for name, leaf in layers["mlp"].items() if name != "adapter"}
    return {**student, "layers": {**layers, "mlp": mlp}}


def _low_rank(layers: Any, rank: int, rng: jax.Array) -> dict[str, Any]:
    updates: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
        *parents, name = [key.key for key in path]
        if name != "kernel":
            continue
        rng, key = jax.random.split(rng)
        count, inputs, outputs = leaf.shape
        place = updates
        for parent in parents:
            place = place.setdefault(parent, {})
        place["a_kernel"] = jax.random.normal(key, (count, inputs, rank)) * inputs**-0.5
        place["b_kernel"] = jnp.zeros((count, rank, outputs))
    return updates


def fold(params: dict[str, Any], config: Config) -> Any:
    """Puts what was trained into the source's tower.

    Args:
      params: ``{"student", "teacher"}``, as `initial` makes them.
      config: a whole run's settings.

    Returns:
      The parameter tree of a plain CLIP tower; what does not train is the source's, bit for bit.
    """
    first, stop = trained_blocks(config)
    base, trained = plain_tower(params["teacher"]["student"]), params["student"]

    def put(whole: Any, part: Any) -> Any:
        if part is None:
            return whole
        if not isinstance(whole, dict):
            if whole.shape == part.shape:
                return part
            return jnp.concatenate([whole[:first], part, whole[stop:]])
        if "a_kernel" in part:
            dtype = part["a_kernel"].dtype
            update = jnp.einsum("lir,lro->lio", part["a_kernel"], part["b_kernel"])
            kernel = whole["kernel"][first:stop].astype(dtype) + update
            return {**whole, "kernel": put(whole["kernel"], kernel)}
        return {name: put(leaf, part.get(name)) for name, leaf in whole.items()}

    return {name: put(leaf, trained.get(name)) for name, leaf in base.items()}


def forward(
    student: VisionTransformer,
    params: dict[str, Any],
    pixels: jax.Array,
    features: dict[str, ExpertFeatures],
    config: Config,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """Runs the source, as deployed, and the merged tower, plain, once each (see `Method.forward`).

    The parameters are as `initial` makes them; nothing is drawn.

    Returns:
      ``tokens`` t and ``target`` T' (B, N, d); with a text loss ``words``, the caption head's logits of t.
    """
    del key
    teacher = jax.lax.stop_gradient(params["teacher"])
    target = source_tokens(student, teacher, pixels, features, config)
    merged = fold({"student": params["student"], "teacher": teacher}, config)
    part = student.clone(frozen_below=trained_blocks(config)[0])
    outputs = {"target": target, "tokens": tokens(part, {"student": merged}, pixels, {}, config)}
    if config.method.text_weight:
        outputs["words"] = tove.caption_logits(teacher["method"], outputs["tokens"])
    return outputs


def source_tokens(
    student: VisionTransformer,
    teacher: dict[str, Any],
    pixels: jax.Array,
    features: dict[str, ExpertFeatures],
    config: Config,
) -> jax.Array:
    """Returns T' (B, N, d), the source's patch tokens as deployed.

    Args:
      student: a plain CLIP tower; the source computes in its dtype.
      teacher: ``{"student", "method"?}``.
      pixels: (B, size, size, 3), normalised.
      features: of the source's deployed experts.
      config: a whole run's settings.
    """
    source = source_config(config)
    module = vit.from_config(source.student, dtype=student.dtype)
    return SOURCES[source.method.name].tokens(module, {"method": {}, **teacher}, pixels, features, source)


def tokens(
    student: VisionTransformer,
    params: dict[str, Any],
    pixels: jax.Array,
    features: dict[str, ExpertFeatures],
    config: Config,
) -> jax.Array:
    """Returns the merged tower's patch tokens (B, N, d); ``params["student"]`` is what `fold` gave."""
    del features
    name = config.student.feature
    return encode(student, params["student"], pixels, (name,))[name][:, 1:]


def objective(
    params: dict[str, Any],
    outputs: dict[str, jax.Array],
    features: dict[str, ExpertFeatures],
    batch: dict[str, Any],
    config: Config,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of a batch (see `Method.objective`); neither parameters nor features are read.

    With a text loss the batch has ``captions`` int32 (B, L) and ``caption_mask`` bool (B, L), of the rows that
    have a caption.

    Returns:
      The scalar loss, and scalars: ``loss/{total,merge,text}``, and ``merge/error``, the squared error over the
      variance of T', whichever distance is trained: 0 is perfect, 1 no better than the mean token.
    """
    del params, features
    method, rows = config.method, batch["mask"]
    student, target = outputs["tokens"], outputs["target"]
    merged = total = merge_loss(student, target, method.loss, rows)
    error = merge_loss(student, target, "mse", rows) / jnp.maximum(masked_variance(target, rows), 1e-12)
    metrics = {"loss/merge": merged, "merge/error": jax.lax.stop_gradient(error)}
    if method.text_weight:
        losses, told = caption_head.word_loss(outputs["words"], batch["captions"], batch["caption_mask"])
        metrics["loss/text"] = masked_mean(losses, rows & told)
        total = merged + method.text_weight * metrics["loss/text"]
    metrics["loss/total"] = total
    return total, metrics


def merge_loss(
    student: jax.Array, target: jax.Array, kind: MergeLoss = "mse", rows: jax.Array | None = None
) -> jax.Array:
    """Compares tokens with the source's, which get no gradient.

    ``mse``: mean over rows and tokens of |t - T'|^2 / d; ``cosine``: of 1 - cos(t, T');
    ``cosine_smooth_l1``: 0.9 times that and 0.1 times the smooth L1 distance (AM-RADIO's mixture,
    arXiv 2312.06709), which also fixes the length.

    Args:
      student: t (B, N, d).
      target: T' (B, N, d).
      kind: which; that the paper merges by the squared error is known, the others are ours.
      rows: bool (B,), which count; None: all.

    Returns:
      The scalar mean over rows, float32 at the least.

    Raises:
      InputError: another kind.
    """
    student, target = precise(student), jax.lax.stop_gradient(precise(target))
    if kind == "mse":
        errors = jnp.square(student - target).mean(axis=-1)
    elif kind in ("cosine", "cosine_smooth_l1"):
        errors = optax.cosine_distance(student, target, epsilon=1e-8)
        if kind == "cosine_smooth_l1":
            errors = 0.9 * errors + 0.1 * optax.huber_loss(student, target).mean(axis=-1)
    else:
        raise InputError(f"merge loss: expected mse, cosine or cosine_smooth_l1, found '{kind}'")
    rows = jnp.ones(student.shape[0], bool) if rows is None else rows
    return masked_mean(errors.mean(axis=-1), rows)
