"""ToVE: knowledge transferred from vision experts through a token-aware gate (arXiv 2504.00691, ICLR 2025).

The transfer phase; shapes: B rows, N student tokens, d student width, K attached experts. T are the
frozen CLIP's patch tokens at ``config.student.feature``, S_k expert k's tokens on CLIP's grid.

    S_k  = resize(patches of expert k), or the stem of its map scaled to [-1, 1]
    U_k  = W_2 GELU(W_1^(k) S_k + b_1^(k)) + b_2                first layer per expert, second shared
    g    = softmax_K(W_g T + b_g)                               over the attached experts alone
    T'   = T + sum_k g_k U_k

    I_k    = sum_bi g_bik                                       over real rows
    L_aux  = (std_k I_k / mean_k I_k)^2
    loss   = L_text + 0.01 L_aux

Which experts are attached is static: a detached one is neither read, traced nor run, and the gates
are those of a softmax without it. With none, T' is T itself. The text loss is that of a small caption
head. T' is later distilled into one CLIP (`tove_jax.methods.merge`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tove_jax.adapters import caption_head, map_stem, token_gate
from tove_jax.adapters.caption_head import CaptionHead
from tove_jax.adapters.map_stem import MapStem
from tove_jax.adapters.token_gate import ExpertLayer, TokenGate
from tove_jax.config.schema import Config, ToVEConfig
from tove_jax.data.vocabulary import Vocabulary
from tove_jax.errors import InputError, nearest
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.methods.move_kd import masked_mean
from tove_jax.models.vit import VisionTransformer, encode
from tove_jax.parallel import first_match

LOGICAL_AXES = token_gate.LOGICAL_AXES + map_stem.LOGICAL_AXES + caption_head.LOGICAL_AXES

# Parameters of every tower, to tell whether the groups leave CLIP frozen.
_CLIP_PATHS = ("student/class_embed", "student/patch_embed/kernel", "student/layers/mlp/fc1/kernel")


class Enriched(NamedTuple):
    """What the experts did to the tokens.

    Attributes:
      tokens: T' (B, N, d).
      gate: g (B, N, K), float32 at the least, in the order of `deployed_experts`.
      load: (B, N, K) chance to be the largest gate under the noise, or None without noise.
    """

    tokens: jax.Array
    gate: jax.Array
    load: jax.Array | None = None


def visible_tokens(outputs: dict[str, jax.Array], config: Config) -> jax.Array:
    """Returns T' (B, N, d)."""
    del config
    return outputs["tokens"]


def deployed_experts(config: Config) -> tuple[str, ...]:
    """Returns the attached experts, in the order of ``features.experts``: the encoder needs them all.

    Raises:
      InputError: a name that ``features.experts`` has not.
    """
    hub, method = config.features.names, config.method
    for field in ("attached", "map_experts"):
        for name in getattr(method, field):
            if name not in hub:
                known = f"{nearest(name, hub)}; experts: {', '.join(hub)}"
                raise InputError(f"config.method.{field}: '{name}' is not in config.features.experts{known}")
    return hub if method.attach_all else tuple(name for name in hub if name in method.attached)


def attach(config: Config, names: Sequence[str]) -> Config:
    """Returns the settings with these experts attached and no other."""
    return dataclasses.replace(
        config, method=dataclasses.replace(config.method, attach_all=False, attached=tuple(names))
    )


def training_experts(config: Config) -> tuple[str, ...]:
    """Returns the experts whose features training reads: the attached ones."""
    return deployed_experts(config)


def vocabulary(config: Config, captions: Sequence[str | None]) -> Vocabulary | None:
    """Returns the words that the text loss tells apart, from the training captions; None without that loss."""
    method = config.method
    if not method.text_weight:
        return None
    return Vocabulary.build(
        captions, size=method.vocabulary, minimum=method.vocabulary_count, length=method.caption_words
    )


def init_extra(config: Config, contracts: dict[str, ExpertCard], student_tokens: int, rng: jax.Array) -> dict[str, Any]:
    """Draws gate, projector, stems and caption head, for every expert of the hub, attached or not.

    Args:
      config: a whole run's settings.
      contracts: card of every expert.
      student_tokens: patch tokens N of the student, CLS not counted.
      rng: key.

    Returns:
      ``{"gate": {"kernel" (d, K), "bias"}, "experts": {expert: {"stem"?, "norm"?, "first": {"kernel"
      (w_k, H), "bias"}}}, "second": {"kernel" (H, d), "bias"}, "caption_head"?: {"query", "norm",
      "out"}}``, float32; K counts the whole hub.

    Raises:
      InputError: adapters in the student, a CLIP that would train, or a map expert without a map.
    """
    method, student, hub = config.method, config.student, config.features.names
    if student.adapter.kind != "none":
        raise InputError(
            "config.student.adapter.kind: ToVE's CLIP is frozen and plain: expected 'none', "
            f"found '{student.adapter.kind}'"
        )
    factors = first_match(config.optim.groups, _CLIP_PATHS, "config.optim.groups")
    moving = [path for path, factor in factors.items() if factor is not None]
    if moving:
        raise InputError(
            f"config.optim.groups: ToVE's CLIP is frozen: expected ('student/.*', None), found {moving[0]} to train"
        )
    deployed_experts(config)
    gate_key, second_key, head_key, *keys = jax.random.split(rng, 3 + len(hub))
    grid = student_grid(student_tokens)
    token = jnp.zeros((1, 1, student.width))
    params = {
        "gate": TokenGate(len(hub), method.gate_init).init(gate_key, token, (0,))["params"] if hub else {},
        "second": second(method, student.width).init(second_key, jnp.zeros((1, method.hidden)))["params"],
        "experts": {},
    }
    for name, key in zip(hub, keys, strict=True):
        card = contracts[name]
        if name in method.map_experts and card.width > 3:
            raise InputError(
                f"config.method.map_experts: expected a map of 1 to 3 channels from '{name}', found {card.width}"
            )
        patches = jax.ShapeDtypeStruct((1, *card.grid, card.width), jnp.float32)
        params["experts"][name] = init_expert(method, name, patches, grid, key)
    if method.text_weight:
        params["caption_head"] = CaptionHead(method.vocabulary).init(head_key, token)["params"]
    return params


def init_expert(method: ToVEConfig, name: str, patches: Any, grid: tuple[int, int], key: jax.Array) -> dict[str, Any]:
    """Draws one expert's stem, if it has one, and first layer."""
    stem_key, layer_key = jax.random.split(key)
    params = {}
    if name in method.map_experts:
        stem = map_stem_of(method, grid)
        params["stem"] = jax.jit(lambda k: stem.init(k, jnp.zeros(patches.shape))["params"])(stem_key)
        patches = jax.ShapeDtypeStruct((1, *grid, method.stem_width), jnp.float32)
    layer = ExpertLayer(grid, method.hidden, method.norm)
    return params | jax.jit(lambda k: layer.init(k, jnp.zeros(patches.shape))["params"])(layer_key)


def forward(
    student: VisionTransformer,
    params: dict[str, Any],
    pixels: jax.Array,
    features: dict[str, ExpertFeatures],
    config: Config,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """Runs CLIP, a plain tower, once and enriches its tokens (see `Method.forward`).

    The key is of the gate's noise and of expert dropping.

    Returns:
      ``tokens`` T', ``gate`` g, and with noise ``load`` (see `Enriched`).
    """
    clip = clip_tokens(student, params, pixels, config)
    found = enrich(params["method"], clip, features, config, key)
    return {name: value for name, value in found._asdict().items() if value is not None}


def tokens(
    student: VisionTransformer,
    params: dict[str, Any],
    pixels: jax.Array,
    features: dict[str, ExpertFeatures],
    config: Config,
) -> jax.Array:
    """Returns T' (B, N, d), the patch tokens that CLIP and the attached experts give when deployed."""
    return enrich(params["method"], clip_tokens(student, params, pixels, config), features, config).tokens


def clip_tokens(student: VisionTransformer, params: dict[str, Any], pixels: jax.Array, config: Config) -> jax.Array:
    """Returns T (B, N, d), CLIP's patch tokens at ``student.feature``; nothing is differentiated into it."""
    name = config.student.feature
    found = encode(student, jax.lax.stop_gradient(params["student"]), pixels, (name,))
    return jax.lax.stop_gradient(found[name][:, 1:])


def enrich(
    params: dict[str, Any],
    clip: jax.Array,
    features: dict[str, ExpertFeatures],
    config: Config,
    key: jax.Array | None = None,
) -> Enriched:
    """Adds the routed knowledge of the attached experts to CLIP's tokens.

    Args:
      params: what `init_extra` returned.
      clip: T (B, N, d).
      features: of the attached experts.
      config: a whole run's settings.
      key: of noise and expert dropping while training; None: neither.
    """
    method, names = config.method, deployed_experts(config)
    rows, count, width = clip.shape
    if not names:
        return Enriched(clip, jnp.zeros((rows, count, 0), jnp.promote_types(clip.dtype, jnp.float32)))
    grid = student_grid(count)
    columns = [config.features.names.index(name) for name in names]
    logits = TokenGate(len(config.features.names)).apply({"params": params["gate"]}, clip, columns)
    keep = load = None
    if key is not None and method.expert_drop:
        keep = token_gate.random_keep(jax.random.fold_in(key, 1), rows, len(names), method.expert_drop)
    if key is not None and method.noise:
        deviation = 1 / len(names)
        noisy = logits + deviation * jax.random.normal(key, logits.shape, logits.dtype)
        load = token_gate.load_probability(logits, noisy, deviation)
        logits = noisy
    gate = token_gate.gate_weights(logits, keep)
    hidden = [expert_hidden(method, name, params["experts"][name], features[name], grid, clip.dtype) for name in names]
    update = second(method, width, clip.dtype).apply({"params": params["second"]}, token_gate.mix(gate, hidden))
    return Enriched(clip + method.scale * update, gate, load)


def expert_hidden(
    method: ToVEConfig, name: str, params: Any, features: ExpertFeatures, grid: tuple[int, int], dtype: Any
) -> jax.Array:
    """Returns GELU(W_1^(k) S_k + b_1^(k)), (B, N, H), in ``dtype``; the features get no gradient."""
    patches = jax.lax.stop_gradient(jnp.asarray(features.patches))
    if name in method.map_experts:
        patches = map_stem_of(method, grid, dtype).apply({"params": params["stem"]}, patches)
    layer = ExpertLayer(grid, method.hidden, method.norm, dtype)
    return layer.apply({"params": {part: params[part] for part in params if part != "stem"}}, patches)


def map_stem_of(method: ToVEConfig, grid: tuple[int, int], dtype: Any = None) -> MapStem:
    """Returns the stem of a map expert."""
    return MapStem(grid, method.stem_width, method.stem_groups, dtype)


def second(method: ToVEConfig, width: int, dtype: Any = None) -> Any:
    """Returns the module of W_2 and b_2."""
    return token_gate.second_layer(method.hidden, width, method.zero_init, dtype)


def student_grid(count: int) -> tuple[int, int]:
    """Returns CLIP's square grid of so many patches."""
    side = math.isqrt(count)
    return side, side


def objective(
    params: dict[str, Any],
    outputs: dict[str, jax.Array],
    features: dict[str, ExpertFeatures],
    batch: dict[str, Any],
    config: Config,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of a batch (see `Method.objective`); features are not read again.

    With a text loss the batch has ``captions`` int32 (B, L) and ``caption_mask`` bool (B, L), the words of each
    caption. Rows without one are left out of it.

    Returns:
      The scalar loss, and scalars: ``loss/{total,text,aux}``, ``gate/{expert}`` (mean weight),
      ``gate/share/{expert}`` (share of tokens whose largest weight it is), ``gate/entropy`` (nats).
    """
    del features
    method, names, rows = config.method, deployed_experts(config), batch["mask"]
    gate = outputs["gate"]
    metrics, total = {}, jnp.zeros((), gate.dtype)
    if method.text_weight:
        losses, told = text_losses(params, outputs["tokens"], batch["captions"], batch["caption_mask"])
        metrics["loss/text"] = masked_mean(losses, rows & told)
        total = total + method.text_weight * metrics["loss/text"]
    if names:
        aux = token_gate.importance_loss(gate, rows)
        if "load" in outputs:
            aux = (aux + token_gate.importance_loss(outputs["load"], rows)) / 2
        metrics["loss/aux"] = aux
        total = total + method.aux_weight * aux
        weights, shares = gate_use(gate)
        for k, name in enumerate(names):
            metrics[f"gate/{name}"] = masked_mean(weights[:, k], rows)
            metrics[f"gate/share/{name}"] = masked_mean(shares[:, k], rows)
        entropy = jax.scipy.special.entr(gate).sum(axis=-1).mean(axis=-1)
        metrics["gate/entropy"] = masked_mean(entropy, rows)
    metrics["loss/total"] = total
    return total, metrics


def text_losses(
    params: dict[str, Any], tokens: jax.Array, captions: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each row's text loss (B,), and which rows have a caption.

    Args:
      params: what `init_extra` returned; ``caption_head`` is read.
      tokens: (B, N, d), T' or those of a merged encoder.
      captions: int (B, L).
      mask: bool (B, L).
    """
    return caption_head.word_loss(caption_logits(params, tokens), captions, mask)


def caption_logits(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Returns the caption head's logits (B, words) of tokens (B, N, d)."""
    head = params["caption_head"]
    return CaptionHead(head["out"]["bias"].shape[0]).apply({"params": head}, tokens)


def gate_use(gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each row's mean weight of every expert and its share of the largest weights, (B, K) both."""
    largest = jax.nn.one_hot(gate.argmax(axis=-1), gate.shape[-1], dtype=gate.dtype)
    return gate.mean(axis=1), largest.mean(axis=1)
