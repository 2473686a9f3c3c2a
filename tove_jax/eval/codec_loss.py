"""What codecs cost a run: bytes a picture, error of the features, change of the method's loss and gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax import methods
from tove_jax.config.schema import Config
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.eval.predictors import Views, run_folder_source
from tove_jax.experts import codecs, pooling, registry
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.experts.manifest import Manifest
from tove_jax.experts.run import expert_cards, open_stores, standardized
from tove_jax.experts.spectrum import Basis
from tove_jax.experts.statistics import codec_basis, reconstruction_error, spread
from tove_jax.experts.store import FeatureStore, decode_features
from tove_jax.train.checkpoint import load_student
from tove_jax.train.initial import initial_parameters
from tove_jax.train.objective import make_student

REFERENCE = "bf16"
SETTINGS = (
    "bf16",
    "fp8",
    "int8",
    "int4:32",
    "int4",
    "int4:128",
    "pca:256+bf16",
    "pca:256+int8",
    "pca:128+int8",
    "pca:128+int4",
)
"""Settings of ``features.codec`` that are measured when none are named, smaller ones where channels are few."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One codec's line.

    Attributes:
      setting: of ``features.codec``.
      bytes: of a picture, over all experts and fields.
      errors: expert -> relative reconstruction error of its patches.
      loss: the loss with these features.
      change: (loss - loss with bf16) / loss with bf16.
      gradient: norm of the difference to bf16's gradient by the student's tokens, over the norm of bf16's.
    """

    setting: str
    bytes: int
    errors: dict[str, float]
    loss: float
    change: float
    gradient: float


def picture_bytes(cards: Mapping[str, ExpertCard], setting: str) -> int:
    """Returns the bytes of one picture's features under a setting of ``features.codec``.

    Args:
      cards: of the experts, with the grid that they give.
      setting: see `codecs.codec_of`.
    """
    total = 0
    for name, card in cards.items():
        shapes: dict[str, tuple[int, ...]] = {"patches": (*card.grid, card.width)}
        if card.summary_width is not None:
            shapes["summary"] = (card.summary_width,)
        if card.has_cls_attention:
            shapes["cls_attention"] = shapes["cls_scores"] = (math.prod(card.grid),)
        codec = codecs.codec_of(setting, name)
        arrays = codecs.payload_arrays(codec, codecs.stored_shapes(codec, shapes))
        total += sum(math.prod(shape) * codecs.dtype_of(dtype).itemsize for shape, dtype in arrays.values())
    return total


def published_cards(config: Config) -> dict[str, ExpertCard]:
    """Returns the cards of a config's experts without any weights: CLIP's from the student's settings."""
    student, found = config.student, {}
    grid = student.image_size // student.patch_size
    for spec in config.features.experts:
        name = registry.parse(spec)[0]
        if name == "clip":
            card = registry.cards()["clip"]
            found[name] = dataclasses.replace(card, grid=(grid, grid), width=student.width, summary_width=student.width)
        else:
            found[name] = registry.describe(spec)
    return found


def codec_losses(
    config: Config,
    workdir: Path,
    settings: Sequence[str] = SETTINGS,
    records: int = 128,
    progress: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measures codecs on a run's stores, training pictures and student.

    The student is the run's newest checkpoint, or its beginning where there is none. Dropout's key is fixed. The
    stores' own codec comes before those measured, so stores of bf16 or float32 are wanted. Axes for PCA are
    fitted on other records than are measured. Where the method needs an expert's full grid, pooled tokens
    are repeated over it.

    Args:
      config: the run's settings.
      workdir: the run's folder.
      settings: of ``features.codec``; one that asks for more axes than an expert has channels keeps all channels.
      records: training pictures.
      progress: called with each row.

    Returns:
      A row a setting, bf16 first.

    Raises:
      InputError: stores that are missing or pooled, or a setting that does not exist.
    """
    method = methods.get(config.method.name)
    stores = open_stores(config, workdir, only=method.training_experts(config))
    for store in stores.values():
        if codecs.parse(store.manifest.codec).quantizer not in ("float32", "bf16"):
            raise InputError(f"{store.path}: expected a store of float32 or bf16, found {store.manifest.codec}")
    source, train, _ = run_folder_source(config)
    chosen = list(spread(train, records))
    batch = min(config.eval.batch, len(chosen))
    chosen = chosen[: len(chosen) // batch * batch]
    ids = [source.ids[index] for index in chosen]
    views = Views(source, View.of_student(config.student), config.data.threads)
    params = _parameters(config, workdir)
    cards = {name: _card(store) for name, store in stores.items()}
    patches = {name: np.asarray(store.features(ids).patches) for name, store in stores.items()}

    # Compiled once for all codecs that leave the grid as it is.
    step = _loss(config)
    rows: list[Row] = []
    reference: np.ndarray | None = None
    for setting in dict.fromkeys((REFERENCE, *settings)):
        setting = ",".join(f"{name}={_limited(setting, name, cards[name].width)}" for name in stores)
        chosen_codecs = {name: codecs.codec_of(setting, name) for name in stores}
        bases = {name: codec_basis(codec, stores[name], ids) for name, codec in chosen_codecs.items()}
        decode = _decoder(config, stores, chosen_codecs, bases)
        losses, gradients = [], []
        for start in range(0, len(ids), batch):
            rest = {name: stores[name].read_batch(ids[start : start + batch]) for name in stores}
            payloads = {
                name: {
                    **{key: value for key, value in rest[name].items() if not key.startswith("patches")},
                    **codecs.encode(codec, patches[name][start : start + batch], basis=bases[name]),
                }
                for name, codec in chosen_codecs.items()
            }
            value, by_tokens = step(params, views(chosen[start : start + batch]), decode(payloads))
            losses.append(float(value))
            gradients.append(np.asarray(by_tokens, np.float32))
        gradient = np.concatenate(gradients)
        if reference is None:
            reference = gradient
        loss = float(np.mean(losses))
        base = rows[0].loss if rows else loss
        rows.append(
            Row(
                setting,
                picture_bytes(cards, setting),
                {
                    name: reconstruction_error(codec, patches[name], bases[name]).relative
                    for name, codec in chosen_codecs.items()
                },
                loss,
                loss / base - 1 if base else 0.0,
                float(np.linalg.norm(gradient - reference)) / max(float(np.linalg.norm(reference)), 1e-30),
            )
        )
        if progress is not None:
            progress(rows[-1])
    return rows


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a Markdown table."""
    names = list(rows[0].errors)
    head = ["codec", "bytes a picture", *(f"error of `{name}`" for name in names), "loss", "change", "gradient"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            f"`{_short(row.setting)}`",
            f"{row.bytes:,}",
            *(f"{row.errors[name]:.2%}" for name in names),
            f"{row.loss:.5f}",
            f"{row.change:+.3%}",
            f"{row.gradient:.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def size_table(config: Config, settings: Sequence[str]) -> str:
    """Returns bytes of a picture's features under some settings, as a Markdown table; reads no store."""
    cards = published_cards(config)
    whole = picture_bytes(cards, REFERENCE)
    lines = ["| codec | MB a picture | of bf16 |", "|---|---|---|"]
    for setting in dict.fromkeys((REFERENCE, *settings)):
        size = picture_bytes(cards, setting)
        lines.append(f"| `{setting}` | {size / 1e6:.2f} | {size / whole:.0%} |")
    return "\n".join(lines)


def _parameters(config: Config, workdir: Path) -> Any:
    if (workdir / "checkpoints").is_dir():
        return load_student(workdir)[1]
    return initial_parameters(config, workdir, expert_cards(config, workdir))[0]


def _card(store: FeatureStore) -> ExpertCard:
    """Returns as much of a card as `picture_bytes` reads, from what a store holds."""
    shapes = store.manifest.shapes
    card = registry.cards()["clip"]
    return dataclasses.replace(
        card,
        name=store.manifest.expert["name"],
        grid=(shapes["patches"][0], shapes["patches"][1]),
        width=shapes["patches"][2],
        summary_width=shapes["summary"][0] if "summary" in shapes else None,
        has_cls_attention="cls_attention" in shapes,
    )


def _limited(setting: str, name: str, width: int) -> str:
    """Returns an expert's codec without PCA where it would not take channels away."""
    codec = codecs.parse(codecs.codec_of(setting, name))
    return str(dataclasses.replace(codec, pca=None) if codec.pca and codec.pca >= width else codec)


def _short(setting: str) -> str:
    """Returns a setting with one codec of all experts in its short spelling."""
    chosen = {item.partition("=")[2] for item in setting.split(",")}
    return chosen.pop() if len(chosen) == 1 else setting


def _decoder(
    config: Config,
    stores: Mapping[str, FeatureStore],
    chosen: Mapping[str, str],
    bases: Mapping[str, Basis | None],
) -> Callable[[Any], dict[str, ExpertFeatures]]:
    """Returns the jitted map from payloads of some codecs to what the method sees."""
    manifests: dict[str, Manifest] = {}
    for name, store in stores.items():
        shapes = codecs.stored_shapes(chosen[name], store.manifest.shapes)
        manifests[name] = dataclasses.replace(store.manifest, codec=chosen[name], shapes=shapes, basis=bases[name])
    resizes = getattr(config.method, "target", None) == "interpolate"

    def decoded(name: str, payload: Any) -> ExpertFeatures:
        features = standardized(config, name, manifests[name], decode_features(manifests[name], payload))
        if resizes and name != getattr(config.method, "clip_expert", None):
            return features
        full = stores[name].manifest.shapes["patches"][:2]
        return features._replace(patches=pooling.unpool(features.patches, *full))

    return jax.jit(lambda payloads: {name: decoded(name, payload) for name, payload in payloads.items()})


def _loss(config: Config) -> Callable[[Any, np.ndarray, Any], tuple[jax.Array, jax.Array]]:
    """Returns the jitted ``(params, pixels, features) -> (loss, its gradient by the student's tokens)``."""
    method, student, view = (
        methods.get(config.method.name),
        make_student(config),
        View.of_student(config.student),
    )

    @jax.jit
    def run(params: Any, pixels: jax.Array, features: Any) -> tuple[jax.Array, jax.Array]:
        outputs = method.forward(student, params, view.normalize(pixels), features, config, jax.random.key(0))
        name = config.student.feature
        batch = {"mask": jnp.ones(len(pixels), bool)}

        def loss(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            total, metrics = method.objective(
                params.get("method", {}), {**outputs, name: tokens}, features, batch, config
            )
            return total, metrics.get("loss/kd", total)

        gradient, value = jax.grad(loss, has_aux=True)(outputs[name])
        return value, gradient

    return run
