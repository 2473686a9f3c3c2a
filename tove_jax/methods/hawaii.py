"""HAWAII: hierarchical visual knowledge transfer from several encoders into one (arXiv 2506.19072, NeurIPS 2025).

Feature part; shapes: B rows, m = g x g student tokens, D student width, N_t teachers. I^S are the student's
patch tokens at ``config.student.feature``. The student has MoLA (`tove_jax.adapters.mola`): teacher-specific
and general LoRA experts, two routers a layer.

Passes, side by side in one batch of (1 + N_t) B rows (`forward`):

    I^S    routed: every token goes to one teacher-specific and one general expert
    I^S_i  forced: teacher i's expert alone, in every layer, for every token

Coarse-grained distillation, of what the teachers have in common:

    I_cg   = f_cg(concat_channels(u_1, ..., u_Nt))            u_i: teacher i's grid brought to m tokens
    L_cg   = mean_b mean_mD (I_cg - I^S)^2

Fine-grained distillation, of what each has for itself:

    I_i    = MLP_i(u_i),  T = MLP_text(instruction)
    s_i    = mean_rows softmax_m(concat_tokens(I_i, T) I_i^T / sqrt(D))                     sums to 1
    L_fg   = 1/N_t sum_i mean_b sum_j s_ij mean_D (I^S_ij - I_ij)^2

Balance of the routers, E experts each, and the whole:

    L_mb   = mean over the layers of I^S of E sum_e f_e P_e, summed over the two routers      f: share of tokens, P: mean probability
    loss   = 0.5 (L_fg + L_cg) + 0.05 L_mb

The equations are the paper's, but for the balance loss and the reductions, which it does not print; every
choice is a field of `HawaiiConfig` or `AdapterConfig`. All means over rows leave padded rows out, and rows
without a picture.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from tove_jax.adapters import mlp_head, mola
from tove_jax.adapters.mlp_head import MlpHead, unshuffle, unshuffle_factor
from tove_jax.config.schema import Config, HawaiiConfig
from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.methods.move_kd import (
    deployed_experts,
    masked_mean,
    masked_variance,
    precise,
    tokens,
    visible_tokens,
    vocabulary,
)
from tove_jax.models.vit import VisionTransformer, encode
from tove_jax.parallel import constrain

# The student alone is deployed, and no captions are read, as with MoVE-KD.
__all__ = [
    "LOGICAL_AXES",
    "deployed_experts",
    "forward",
    "init_extra",
    "objective",
    "target",
    "tokens",
    "training_experts",
    "visible_tokens",
    "vocabulary",
]

LOGICAL_AXES = mlp_head.LOGICAL_AXES
SHARED_HEADS = ("coarse", "text")


def requested_intermediates(config: Config) -> tuple[str, ...]:
    """Returns the names of the student's intermediates that `objective` reads.

    Raises:
      InputError: ``student.feature`` does not name the tokens of a layer.
    """
    if not re.fullmatch(r"layers/-?\d+", config.student.feature):
        raise InputError(f"config.student.feature: expected layers/<i>, found '{config.student.feature}'")
    kinds = ("probs_mean", "choice_mean", "entropy")
    groups = mola.groups(config.student.adapter.general_experts)
    return (config.student.feature, *[f"adapter/router_{group}_{kind}" for group in groups for kind in kinds])


def forward(
    student: VisionTransformer,
    params: dict[str, Any],
    pixels: jax.Array,
    features: dict[str, ExpertFeatures],
    config: Config,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """Runs the routed pass and one forced pass a teacher, in one call.

    A picture's passes lie side by side in the batch, so that on every mesh they are on its device. The student
    has MoLA, ``features.experts`` are the teachers in the order of its teacher-specific experts, and they reach
    it through the objective alone (else see `Method.forward`).

    Returns:
      The intermediates named by `requested_intermediates`, of the routed pass, the routers' of the layers
      that ``student.feature`` comes through (l, B, ...); and ``forced`` (B, N_t, 1+m, D), the forced
      passes' tokens there.
    """
    del features
    passes = (mola.ROUTED, *range(len(config.features.names)))
    folded = jnp.broadcast_to(pixels[:, None], (pixels.shape[0], len(passes), *pixels.shape[1:]))
    folded = constrain(folded.reshape(-1, *pixels.shape[1:]), ("batch", None, None, None))
    feature, *routers = requested_intermediates(config)
    # Layers beyond the feature learn nothing, so neither they nor their routers run.
    layers = int(feature.removeprefix("layers/")) % student.depth + 1
    tower = {**params["student"], "layers": jax.tree.map(lambda leaf: leaf[:layers], params["student"]["layers"])}
    names = (f"layers/{layers - 1}", *routers)
    found = encode(student.clone(depth=layers), tower, folded, names, key, adapter_inputs={"forced": passes})
    every = found.pop(names[0])
    every = every.reshape(-1, len(passes), *every.shape[1:])
    return {**found, feature: every[:, 0], "forced": every[:, 1:]}


def training_experts(config: Config) -> tuple[str, ...]:
    """Returns the experts whose features training reads: all of them."""
    return config.features.names


def init_extra(config: Config, contracts: dict[str, ExpertCard], student_tokens: int, rng: jax.Array) -> dict[str, Any]:
    """Draws the heads.

    Args:
      config: ``features.experts``, the student and the method are read.
      contracts: card of every expert.
      student_tokens: m, patch tokens of the student, CLS not counted.
      rng: key.

    Returns:
      ``{expert: head}`` for MLP_i, ``{"coarse": head}`` for f_cg and ``{"text": head}`` for MLP_text, each
      ``{"hidden": {"kernel" (C, H), "bias"}, "out": {"kernel" (H, D), "bias"}}``, float32. There is none for
      CLIP when it is the target as it is, no ``coarse`` without the coarse term, no ``text`` without
      ``method.instruction_width``.

    Raises:
      InputError: a student without MoLA or with another number of teacher experts, tokens that are
        no square, an expert with a head's name, or a raw CLIP of another shape than the student.
    """
    method, names, adapter = config.method, config.features.names, config.student.adapter
    if adapter.kind != "mola" or adapter.teacher_experts != len(names):
        found = f"{adapter.teacher_experts} in a '{adapter.kind}'"
        raise InputError(
            f"config.student.adapter: HAWAII needs kind 'mola' with one teacher-specific expert for each of {names}, "
            f"found {found}"
        )
    for name in SHARED_HEADS:
        if name in names:
            raise InputError(f"config.features.experts: '{name}' is the name of one of HAWAII's own heads")
    grid = math.isqrt(student_tokens)
    if grid * grid != student_tokens:
        raise InputError(f"HAWAII needs a square student grid, found {student_tokens} tokens")
    widths = {}
    for name in names:
        card = contracts[name]
        widths[name] = card.width * unshuffle_factor(*card.grid, grid, method.unshuffle) ** 2
    inputs = dict(widths)
    if method.clip_target == "raw":
        clip = contracts.get(method.clip_expert)
        if clip is None:
            raise InputError(f"config.method.clip_target 'raw' needs expert '{method.clip_expert}', found {names}")
        if math.prod(clip.grid) != student_tokens or clip.width != config.student.width:
            raise InputError(
                f"expert '{clip.name}' is the target as it is: expected {student_tokens} tokens of width "
                f"{config.student.width}, found a {clip.grid[0]} x {clip.grid[1]} grid of width {clip.width}"
            )
        del inputs[method.clip_expert]
    if method.coarse:
        inputs["coarse"] = sum(widths.values())
    if method.instruction_width:
        inputs["text"] = method.instruction_width
    module = head(method, config.student.width)
    keys = jax.random.split(rng, len(inputs))
    return {
        name: jax.jit(module.init)(key, jnp.zeros((1, width), jnp.float32))["params"]
        for (name, width), key in zip(inputs.items(), keys, strict=True)
    }


def objective(
    params: dict[str, Any],
    outputs: dict[str, jax.Array],
    features: dict[str, ExpertFeatures],
    batch: dict[str, Any],
    config: Config,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of a batch.

    Losses and scores are float32 at the least; heads compute in the student's dtype.

    Args:
      params: what `init_extra` returned.
      outputs: what `forward` returned.
      features: of every expert.
      batch: ``mask`` bool (B,), False for padded rows; optionally ``has_picture`` bool (B,), read unless
        ``method.kd_on_text_only``; optionally ``instruction`` (B, l, d_llm), the language model's input
        embeddings of the user's turns, and ``instruction_mask`` bool (B, l), read when
        ``method.instruction_width`` says their width. No gradient goes into the embeddings.
      config: a whole run's settings.

    Returns:
      The scalar loss, and scalars: ``loss/{total,coarse,fine,balance}``, ``loss/{expert}/patches`` (its
      term of the mean in L_fg), ``target/{expert}/variance`` and ``target/coarse/variance`` (over rows and
      tokens, mean over channels; zero when a head collapses), ``score/{expert}/peak`` (the largest token
      score times m: 1 when uniform), and of the routers ``router/load/{layer:02d}/{e}`` (e counts the
      teacher-specific experts, then the general ones; each group's loads sum to one),
      ``router/{group}/entropy`` (nats) and ``router/{group}/load/{e}`` (over all layers).

    Raises:
      InputError: an instruction of another width.
    """
    method, names = config.method, config.features.names
    rows = batch["mask"]
    if not method.kd_on_text_only and "has_picture" in batch:
        rows = rows & batch["has_picture"]
    routed, forced = outputs[config.student.feature][:, 1:], outputs["forced"][:, :, 1:]
    grid = math.isqrt(routed.shape[1])

    metrics = {}
    losses = []
    text, text_mask = instruction_tokens(method, params.get("text"), batch, routed)
    for i, name in enumerate(names):
        wanted = target(method, params.get(name), features[name], routed)
        scores = token_scores(method, wanted, text, text_mask)
        losses.append(masked_mean(fine_loss(forced[:, i], wanted, scores), rows))
        metrics[f"loss/{name}/patches"] = losses[-1]
        metrics[f"target/{name}/variance"] = masked_variance(wanted, rows)
        metrics[f"score/{name}/peak"] = masked_mean(scores.max(axis=-1) * scores.shape[-1], rows)
    fine = sum(losses) / len(names)
    distillation = fine
    metrics["loss/fine"] = fine

    if method.coarse:
        teachers = [unshuffle(features[name].patches.astype(routed.dtype), grid, method.unshuffle) for name in names]
        fused = apply_head(method, params["coarse"], jnp.concatenate(teachers, axis=-1), routed)
        coarse = masked_mean(jnp.square(precise(routed) - precise(fused)).mean(axis=(1, 2)), rows)
        distillation = distillation + coarse
        metrics["loss/coarse"] = coarse
        metrics["target/coarse/variance"] = masked_variance(fused, rows)

    balance = jnp.zeros((), jnp.float32)
    first = 0
    for group in mola.groups(config.student.adapter.general_experts):
        probs, choice, entropy = (
            outputs[f"adapter/router_{group}_{kind}"] for kind in ("probs_mean", "choice_mean", "entropy")
        )
        balance = balance + balance_loss(probs, choice, rows, method)
        metrics |= router_metrics(group, choice, entropy, rows, first)
        first += choice.shape[-1]
    metrics["loss/balance"] = balance

    total = method.kd_weight * distillation + method.balance_weight * balance
    metrics["loss/total"] = total
    return total, metrics


def head(method: HawaiiConfig, width: int, dtype: Any = None) -> MlpHead:
    """Returns the module of f_cg, MLP_i and MLP_text."""
    return MlpHead(width, method.head_width or width, dtype)


def apply_head(method: HawaiiConfig, params: Any, x: jax.Array, student: jax.Array) -> jax.Array:
    """Maps (..., C) to (..., D), in the student's dtype."""
    return head(method, student.shape[-1], student.dtype).apply({"params": params}, x)


def target(method: HawaiiConfig, params: Any | None, features: ExpertFeatures, student: jax.Array) -> jax.Array:
    """Returns I_i (B, m, D), in the student's dtype; a teacher that has no head is its own target."""
    cells = unshuffle(features.patches.astype(student.dtype), math.isqrt(student.shape[1]), method.unshuffle)
    return cells if params is None else apply_head(method, params, cells, student)


def instruction_tokens(
    method: HawaiiConfig, params: Any | None, batch: dict[str, Any], student: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns T (B, l, D) and which of its tokens count (B, l); None where there is no instruction."""
    if params is None or "instruction" not in batch:
        return None, None
    words, mask = (batch[name][:, : method.instruction_tokens] for name in ("instruction", "instruction_mask"))
    if words.shape[-1] != method.instruction_width:
        raise InputError(
            f"batch['instruction']: expected width {method.instruction_width} (config.method.instruction_width), "
            f"found {words.shape[-1]}"
        )
    words = jnp.where(mask[..., None], jax.lax.stop_gradient(words), 0).astype(student.dtype)
    return apply_head(method, params, words, student), mask


def token_scores(
    method: HawaiiConfig, wanted: jax.Array, text: jax.Array | None, text_mask: jax.Array | None
) -> jax.Array:
    """Returns s_i (B, m), rows summing to one; uniform without ``method.token_scoring``.

    The rows of the softmax are the teacher's m tokens and the instruction's; their mean weighs all
    alike (padding left out).

    Args:
      method: the choices.
      wanted: I_i (B, m, D).
      text: T (B, l, D), or None.
      text_mask: bool (B, l), which of them count.
    """
    batch, count, width = wanted.shape
    dtype = jnp.promote_types(wanted.dtype, jnp.float32)
    if not method.token_scoring:
        return jnp.full((batch, count), 1 / count, dtype)
    rows, counted = wanted, jnp.ones((batch, count), bool)
    if text is not None and text_mask is not None:
        rows = jnp.concatenate([wanted, text], axis=1)
        counted = jnp.concatenate([counted, text_mask], axis=1)
    logits = jnp.einsum("brd,bmd->brm", rows, wanted, preferred_element_type=dtype) * width**-0.5
    attention = jnp.where(counted[..., None], jax.nn.softmax(logits, axis=-1), 0)
    scores = attention.sum(axis=1) / counted.sum(axis=1, dtype=dtype)[:, None]
    return jax.lax.stop_gradient(scores) if method.stop_gradient_token_score else scores


def fine_loss(student: jax.Array, wanted: jax.Array, scores: jax.Array) -> jax.Array:
    """Returns sum_j s_j mean_D (I^S_j - I_j)^2 (B,), of student and target (B, m, D)."""
    return (scores * jnp.square(precise(student) - precise(wanted)).mean(axis=-1)).sum(axis=-1)


def balance_loss(probs: jax.Array, choice: jax.Array, rows: jax.Array, method: HawaiiConfig) -> jax.Array:
    """Returns one router's E sum_e f_e P_e, mean over layers: 1 at even load. f has no gradient.

    Args:
      probs: (L, B, E) mean probability over a row's tokens.
      choice: (L, B, E) mean one-hot choice.
      rows: (B,) which rows count.
      method: ``balance_pool``: f and P over all tokens of the batch, or of a row, then the mean over rows.
    """
    experts, choice = probs.shape[-1], jax.lax.stop_gradient(choice)
    if method.balance_pool == "batch":
        probs, choice = masked_rows(probs, rows), masked_rows(choice, rows)
        return experts * (probs * choice).sum(axis=-1).mean()
    return masked_mean(experts * (probs * choice).sum(axis=-1).mean(axis=0), rows)


def router_metrics(
    group: str, choice: jax.Array, entropy: jax.Array, rows: jax.Array, first: int
) -> dict[str, jax.Array]:
    """Returns one router's loads and entropy, from (L, B, E) and (L, B), its experts counted from `first`."""
    load = jax.lax.stop_gradient(masked_rows(choice, rows))
    metrics = {f"router/{group}/entropy": jax.lax.stop_gradient(masked_mean(entropy.mean(axis=0), rows))}
    for expert in range(choice.shape[-1]):
        metrics[f"router/{group}/load/{expert}"] = load[:, expert].mean()
        for layer in range(choice.shape[0]):
            metrics[f"router/load/{layer:02d}/{first + expert}"] = load[layer, expert]
    return metrics


def masked_rows(values: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the mean of (L, B, E) values over the rows that count, (L, E); zero when there are none."""
    return jnp.where(rows[:, None], values, 0).sum(axis=1) / jnp.maximum(rows.sum(), 1)
