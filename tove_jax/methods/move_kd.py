"""MoVE-KD: a mixture of visual encoders, distilled into one (arXiv 2501.01709, CVPR 2025).

Feature part; shapes: B rows, N student tokens, D student width, K teachers, k = 0 being CLIP, the
frozen copy of the student's start. s are the student's patch tokens at ``config.student.feature``.

Targets: CLIP's own tokens as they are; for another teacher with tokens t of width d_t,

    t_k    = (W2 . GELU((t W1 + b1)^T) + b2)^T                                encoder adapter

Objective:

    l_bjk  = mean_D (s_bj - t_bjk)^2
    w_b    = softmax_N(mean_heads a_b)                  a: CLIP's attention from CLS to the patches
    L_bk   = mean_j l_bjk + sum_j w_bj l_bjk
    m_bk   = mean_j <cls_b, t_bjk>                      cls: CLIP's CLS token
    q_b    = softmax over the teachers but CLIP of m_b
    W_b    = (0.8, 0.2 q_b)
    L_kd   = mean_b sum_k W_bk L_bk
    L_bal  = mean_b sum_e P_be f_be                     P: mean router probability, f: mean choice
    loss   = 0.5 L_kd + 0.01 L_bal

These are the released code's; every choice in them is a field of `MoveKDConfig`, and
`tove_jax.methods.presets` names the sets of choices. All means over rows leave padded rows out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tove_jax.adapters import encoder_adapter as encoder_adapters
from tove_jax.adapters.encoder_adapter import EncoderAdapter
from tove_jax.adapters.mole import balance_loss
from tove_jax.config.schema import Config, MoveKDConfig
from tove_jax.data.vocabulary import Vocabulary
from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.models.vit import VisionTransformer, encode
from tove_jax.parallel import BATCH_AXES

LOGICAL_AXES = encoder_adapters.LOGICAL_AXES
ROUTER_REPORTS = ("adapter/router_probs_mean", "adapter/router_choice_mean", "adapter/router_entropy")


def requested_intermediates(config: Config) -> tuple[str, ...]:
    """Returns the names of the student's intermediates that `objective` reads.

    Raises:
      InputError: ``student.feature`` does not name the tokens of a layer.
    """
    if not re.fullmatch(r"embeddings|layers/-?\d+", config.student.feature):
        raise InputError(f"config.student.feature: expected layers/<i> or embeddings, found '{config.student.feature}'")
    reports = ROUTER_REPORTS if config.student.adapter.kind == "mole" else ()
    return (config.student.feature, *reports)


def forward(
    student: VisionTransformer,
    params: dict[str, Any],
    pixels: jax.Array,
    features: dict[str, ExpertFeatures],
    config: Config,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """Runs the student once (see `Method.forward`); experts reach it through the objective alone.

    Returns:
      The intermediates named by `requested_intermediates`.
    """
    del features
    wanted = requested_intermediates(config)
    return encode(student, params["student"], pixels, wanted, key)


def tokens(
    student: VisionTransformer,
    params: dict[str, Any],
    pixels: jax.Array,
    features: dict[str, ExpertFeatures],
    config: Config,
) -> jax.Array:
    """Returns the student's patch tokens (B, N, D) as deployed; no expert's features are read."""
    del features
    name = config.student.feature
    return encode(student, params["student"], pixels, (name,))[name][:, 1:]


def visible_tokens(outputs: dict[str, jax.Array], config: Config) -> jax.Array:
    """Returns the student's patch tokens (B, N, D); of HAWAII the routed pass's."""
    return outputs[config.student.feature][:, 1:]


def training_experts(config: Config) -> tuple[str, ...]:
    """Returns the experts whose features training reads: all of them."""
    return teachers(config)


def deployed_experts(config: Config) -> tuple[str, ...]:
    """Returns no expert: what they taught is in the student."""
    del config
    return ()


def vocabulary(config: Config, captions: Sequence[str | None]) -> Vocabulary | None:
    """Returns None: this method reads no captions."""
    del config, captions
    return None


def init_extra(config: Config, contracts: dict[str, ExpertCard], student_tokens: int, rng: jax.Array) -> dict[str, Any]:
    """Draws the encoder adapters.

    Args:
      config: ``features.experts``, ``student.width`` and the method are read.
      contracts: card of every expert.
      student_tokens: patch tokens N of the student, CLS not counted.
      rng: key.

    Returns:
      ``{expert: {"channel": {"kernel" (d_t, D), "bias"}, "token": {"kernel" (N_t, N), "bias"}}}`` for
      every teacher but CLIP, float32; no ``token`` when ``method.target`` is ``interpolate``.

    Raises:
      InputError: CLIP is missing, gives no attention that the method needs, or has other tokens than
        the student.
    """
    method, names = config.method, teachers(config)
    clip = contracts[method.clip_expert]
    if math.prod(clip.grid) != student_tokens or clip.width != config.student.width:
        raise InputError(
            f"expert '{clip.name}' is the target as it is: expected {student_tokens} tokens of width "
            f"{config.student.width}, found a {clip.grid[0]} x {clip.grid[1]} grid of width {clip.width}"
        )
    if method.token_weighting and not clip.has_cls_attention:
        raise InputError(f"config.method.token_weighting: expert '{clip.name}' gives no attention of its CLS")
    if method.teacher_weighting and len(names) > 1 and clip.summary_width != config.student.width:
        raise InputError(
            f"config.method.teacher_weighting: expected a CLS token of width {config.student.width} as the "
            f"summary of expert '{clip.name}', found width {clip.summary_width}"
        )
    adapter = encoder_adapter(method, student_tokens, config.student.width)
    params = {}
    for name, key in zip(names[1:], jax.random.split(rng, len(names))[1:], strict=True):
        card = contracts[name]
        sample = jnp.zeros((1, *card.grid, card.width), jnp.float32)
        params[name] = jax.jit(adapter.init)(key, sample)["params"]
    return params


def objective(
    params: dict[str, Any],
    outputs: dict[str, jax.Array],
    features: dict[str, ExpertFeatures],
    batch: dict[str, Any],
    config: Config,
    row_groups: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of a batch.

    Losses and weights are float32 at the least; encoder adapters compute in the student's dtype.

    Args:
      params: what `init_extra` returned.
      outputs: the student's intermediates named by `requested_intermediates`; tokens (B, 1+N, D).
      features: of every expert; CLIP's ``summary`` is its CLS token.
      batch: ``mask`` bool (B,), False for padded rows; optionally ``has_picture`` bool (B,), read when
        ``method.kd_on_text_only`` is off.
      config: a whole run's settings.
      row_groups: for ``saturation_scope="device"``: the number of equal, consecutive groups of rows
        whose mean decides; None takes one a batch shard of the mesh in use, which is the released
        code's "this process's rows". One group is the global batch.

    Returns:
      The scalar loss, and scalars: ``loss/{total,kd,balance}``, ``loss/{expert}/patches`` (mean of
      L_k), ``weight/{expert}`` (mean of W_k), ``weight/saturated`` (share of groups in which the
      saturation rule fired), ``target/{expert}/variance`` (over rows and tokens, mean over channels; it
      goes to zero when an encoder adapter collapses), ``router/load/{layer:02d}/{e}``, ``router/entropy``
      (nats), ``router/collapse/{layer:02d}`` (see `router_metrics`).

    Raises:
      InputError: rows that do not divide into the groups.
    """
    method, names = config.method, teachers(config)
    rows = batch["mask"]
    distilled = rows
    if not method.kd_on_text_only and "has_picture" in batch:
        distilled = rows & batch["has_picture"]
    student = outputs[config.student.feature][:, 1:]
    clip = features[method.clip_expert]
    features = {name: features[name]._replace(patches=laid_out(method, name, features[name].patches)) for name in names}

    targets = {name: target(method, params.get(name), features[name], student) for name in names}
    token_weight = token_weights(method, clip) if method.token_weighting else None
    losses = jnp.stack([teacher_loss(student, targets[name], token_weight) for name in names], axis=-1)
    groups = batch_shards() if row_groups is None else row_groups
    weights, saturated = teacher_weights(
        method, clip, [targets[name] for name in names[1:]], distilled, groups if len(names) > 1 else 1
    )
    kd = masked_mean((weights * losses).sum(axis=-1), distilled)

    total = method.kd_weight * kd
    metrics = {"loss/kd": kd, "weight/saturated": saturated}
    for k, name in enumerate(names):
        metrics[f"loss/{name}/patches"] = masked_mean(losses[:, k], distilled)
        metrics[f"weight/{name}"] = masked_mean(weights[:, k], distilled)
        metrics[f"target/{name}/variance"] = masked_variance(targets[name], distilled)
    if config.student.adapter.kind == "mole":
        probs, choice, entropy = (outputs[name] for name in ROUTER_REPORTS)
        balance = masked_mean(balance_loss(probs, choice, method.balance_pool), rows)
        total = total + method.balance_weight * balance
        metrics["loss/balance"] = balance
        metrics |= router_metrics(choice, entropy, rows)
    metrics["loss/total"] = total
    return total, metrics


def teachers(config: Config) -> tuple[str, ...]:
    """Returns the experts in the order of the weights W: CLIP first.

    Raises:
      InputError: CLIP is not among them.
    """
    names, clip = config.features.names, config.method.clip_expert
    if clip not in names:
        raise InputError(f"config.features.experts: MoVE-KD needs '{clip}' (config.method.clip_expert), found {names}")
    return (clip, *[name for name in names if name != clip])


def encoder_adapter(method: MoveKDConfig, tokens: int, width: int, dtype: Any = None) -> EncoderAdapter:
    """Returns the module that makes targets of a teacher's patches."""
    return EncoderAdapter(tokens, width, method.target == "interpolate", dtype)


def target(method: MoveKDConfig, params: Any | None, features: ExpertFeatures, student: jax.Array) -> jax.Array:
    """Returns t_k (B, N, D), in the student's dtype; CLIP's, which has no parameters, as it is."""
    patches = features.patches.astype(student.dtype)
    if params is None:
        return patches.reshape(student.shape)
    adapter = encoder_adapter(method, student.shape[1], student.shape[2], student.dtype)
    return adapter.apply({"params": params}, patches)


def laid_out(method: MoveKDConfig, name: str, patches: jax.Array) -> jax.Array:
    """Returns an expert's patches (B, H, W, C) in the order in which the method reads them.

    All but SAM's as they lie in the picture. With ``sam_layout`` ``scrambled`` SAM's channel-first map is
    taken for a channel-last one, as the released wrapper does: its C * H rows become the tokens of one
    larger square, of which every 2 x 2 cells are moved into channels. Each token then holds two channels of
    two whole rows of the picture.

    Raises:
      InputError: a map for which that does not give H x W tokens of C channels again: H = W and C = 4 W.
    """
    if name != method.sam_expert or method.sam_layout == "spatial":
        return patches
    batch, height, wide, channels = patches.shape
    half = math.isqrt(channels * height) // 2
    if height != wide or channels != 4 * wide or half != height:
        raise InputError(
            f"config.method.sam_layout: 'scrambled' needs a square map with four times as many channels as columns, "
            f"found {height} x {wide} x {channels} of expert '{name}'"
        )
    rows = patches.transpose(0, 2, 3, 1)  # (B, W, C, H): each column of the picture, all rows of all channels
    cells = rows.reshape(batch, wide, half, 2, half, 2).transpose(0, 2, 4, 1, 3, 5)
    return cells.reshape(patches.shape)


def token_weights(method: MoveKDConfig, clip: ExpertFeatures) -> jax.Array:
    """Returns w (B, N), summing to one over the patches.

    ``probs_softmax`` (code) is a softmax over the attention probabilities; ``probs`` are the
    probabilities, renormalised since CLS's own share is left out; ``scores`` (paper) is a softmax of
    the scores behind them.
    """
    if method.token_weight_source == "scores":
        return jax.nn.softmax(precise(clip.cls_scores), axis=-1)
    attention = precise(clip.cls_attention)
    if method.token_weight_source == "probs":
        return attention / jnp.maximum(attention.sum(axis=-1, keepdims=True), 1e-6)
    return jax.nn.softmax(attention, axis=-1)


def teacher_loss(student: jax.Array, target: jax.Array, token_weight: jax.Array | None) -> jax.Array:
    """Returns L_k (B,) of student and target (B, N, D)."""
    error = jnp.square(precise(student) - precise(target)).mean(axis=-1)
    loss = error.mean(axis=-1)
    return loss if token_weight is None else loss + (token_weight * error).sum(axis=-1)


def teacher_weights(
    method: MoveKDConfig, clip: ExpertFeatures, targets: list[jax.Array], rows: jax.Array, groups: int
) -> tuple[jax.Array, jax.Array]:
    """Returns W (B, 1 + len(targets)), rows summing to one, and the share of groups that saturated.

    CLIP alone has weight one.

    Args:
      method: the choices.
      clip: CLIP's features, whose summary is its CLS token.
      targets: t_k (B, N, D) of the other teachers.
      rows: (B,) which rows count in a group's mean.
      groups: see `objective`.
    """
    count = rows.shape[0]
    none = jnp.zeros((), jnp.float32)
    if not targets:
        return jnp.ones((count, 1), jnp.float32), none
    if not method.teacher_weighting:
        q, saturated = jnp.broadcast_to(teacher_prior(method, len(targets)), (count, len(targets))), none
    else:
        cls = precise(clip.summary)
        scale = cls.shape[-1] ** -0.5 if method.teacher_score_scale == "inverse_sqrt_width" else 1.0
        # The mean over tokens commutes with the product.
        scores = [jnp.einsum("bd,bd->b", cls, precise(t).mean(axis=1)) for t in targets]
        q = jax.nn.softmax(jnp.stack(scores, axis=-1) * scale, axis=-1)
        saturated = none
        if method.saturation_rule:
            q, saturated = saturation(q, rows, method, groups)
    if method.stop_gradient_teacher_weight:
        q = jax.lax.stop_gradient(q)
    pinned = jnp.full((count, 1), method.clip_weight, q.dtype)
    return jnp.concatenate([pinned, (1 - method.clip_weight) * q], axis=-1), saturated


def teacher_prior(method: MoveKDConfig, count: int) -> jax.Array:
    """Returns the fixed weights (count,) of the teachers but CLIP, summing to one.

    Raises:
      InputError: ``method.teacher_prior`` has another length, a negative weight, or only zeros.
    """
    prior = method.teacher_prior or (1.0,) * count
    if len(prior) != count or min(prior) < 0 or not sum(prior):
        raise InputError(
            f"config.method.teacher_prior: expected {count} weights, one an expert but CLIP, not negative and not all "
            f"zero, found {method.teacher_prior}"
        )
    return jnp.asarray(prior, jnp.float32) / sum(prior)


def saturation(q: jax.Array, rows: jax.Array, method: MoveKDConfig, groups: int) -> tuple[jax.Array, jax.Array]:
    """Applies a second softmax where one teacher's mean weight exceeds the threshold.

    The released code writes ``softmax(q + 0.2)``; a softmax does not see the 0.2.

    Args:
      q: (B, K - 1).
      rows: (B,) which rows count.
      method: threshold and scope.
      groups: number of consecutive groups of rows, each deciding for itself, for the scope ``device``.

    Returns:
      (B, K - 1), and the share of groups in which the rule fired.
    """
    groups = 1 if method.saturation_scope == "global" else groups
    if q.shape[0] % groups:
        raise InputError(f"saturation_scope 'device': {q.shape[0]} rows do not divide into {groups} groups")
    grouped = q.reshape(groups, -1, q.shape[-1])
    counted = rows.reshape(groups, -1, 1)
    mean = jnp.where(counted, grouped, 0).sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1)
    fired = mean.max(axis=-1) > method.saturation_threshold
    result = jnp.where(fired[:, None, None], jax.nn.softmax(grouped, axis=-1), grouped)
    return result.reshape(q.shape), fired.mean()


def router_metrics(choice: jax.Array, entropy: jax.Array, rows: jax.Array) -> dict[str, jax.Array]:
    """Returns how the routers use the LoRA experts, over the given rows; nothing has a gradient.

    Args:
      choice: (L, B, E) share of a row's tokens that each expert gets.
      entropy: (L, B) mean entropy of the probabilities, nats.
      rows: (B,) which rows count.

    Returns:
      ``router/load/{layer:02d}/{e}``, the expert's share of all tokens; ``router/collapse/{layer:02d}``, the
      largest of a layer's shares: 1/E at even load, 1 where one expert gets every token (ours);
      ``router/entropy``, the mean over tokens and layers.
    """
    metrics = {"router/entropy": masked_mean(entropy.mean(axis=0), rows)}
    for layer in range(choice.shape[0]):
        loads = [masked_mean(choice[layer, :, expert], rows) for expert in range(choice.shape[2])]
        metrics |= {f"router/load/{layer:02d}/{expert}": load for expert, load in enumerate(loads)}
        metrics[f"router/collapse/{layer:02d}"] = jnp.stack(loads).max()
    metrics = jax.lax.stop_gradient(metrics)
    return metrics


def masked_sum(values: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of (B,) values over the rows that count, and their number."""
    return jnp.where(rows, values, 0).sum(), rows.sum()


def masked_mean(values: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the mean of (B,) values over the rows that count; zero when there are none."""
    total, count = masked_sum(values, rows)
    return total / jnp.maximum(count, 1)


def masked_variance(tokens: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the variance of (B, N, D) over rows and tokens, mean over channels; it has no gradient."""
    tokens = precise(jax.lax.stop_gradient(tokens))
    counted = rows[:, None, None]
    count = jnp.maximum(rows.sum() * tokens.shape[1], 1)
    mean = jnp.where(counted, tokens, 0).sum(axis=(0, 1)) / count
    return (jnp.where(counted, jnp.square(tokens - mean), 0).sum(axis=(0, 1)) / count).mean()


def precise(x: jax.Array) -> jax.Array:
    """Returns the array in float32 at the least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def batch_shards() -> int:
    """Returns over how many shards the mesh in use splits the batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
