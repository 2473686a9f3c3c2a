"""Detaching ToVE's experts one by one: what each contributes, and what is lost and saved without it."""

from __future__ import annotations

import dataclasses
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from tove_jax.config.schema import Config, ToVEConfig
from tove_jax.data.picture import PictureSource
from tove_jax.data.vocabulary import Vocabulary
from tove_jax.errors import InputError
from tove_jax.eval import predictors, runner
from tove_jax.eval.run import with_stored_settings
from tove_jax.experts import registry
from tove_jax.experts.base import Expert, ExpertFeatures
from tove_jax.experts.run import chosen_experts, load_options, open_stores, standardized
from tove_jax.experts.store import FeatureStore, decode_features
from tove_jax.files.atomic import atomic_write_bytes, atomic_write_json
from tove_jax.methods import tove
from tove_jax.models import vit
from tove_jax.train.checkpoint import load_student

FORMAT = "tove_jax-detach-1"
INCLUDED = (
    "median time of one batch from cut pixels on the device to enriched tokens: CLIP, gate, projector, and each "
    "attached expert run on the spot, one after the other. Reading, decoding and cutting pictures are not included"
)


@dataclasses.dataclass(frozen=True)
class Contribution:
    """How much the gate gives an expert, over calibration pictures and their tokens.

    Attributes:
      gate: c_k, its mean weight.
      share: of the tokens whose largest weight is its.
    """

    gate: float
    share: float


def contributions(
    config: Config,
    params: Mapping[str, Any],
    views: predictors.Views,
    source: PictureSource,
    stores: Mapping[str, FeatureStore],
    indices: Sequence[int],
) -> dict[str, Contribution]:
    """Measures every attached expert's contribution.

    Args:
      config: a ToVE run's settings.
      params: ``{"student", "method"}``.
      views: the pictures.
      source: the pictures' ids.
      stores: of the attached experts.
      indices: the calibration pictures.
    """
    names, module, view = tove.deployed_experts(config), vit.from_config(config.student), views.view
    manifests = {name: stores[name].manifest for name in names}

    @jax.jit
    def use(params: Any, pixels: jax.Array, payloads: Any) -> tuple[jax.Array, jax.Array]:
        features = {
            name: standardized(config, name, manifests[name], decode_features(manifests[name], payload))
            for name, payload in payloads.items()
        }
        clip = tove.clip_tokens(module, params, view.normalize(pixels), config)
        return tove.gate_use(tove.enrich(params["method"], clip, features, config).gate)

    totals = np.zeros((2, len(names)))
    for start in range(0, len(indices), config.eval.batch):
        chosen = [int(index) for index in indices[start : start + config.eval.batch]]
        filled = chosen + chosen[-1:] * (config.eval.batch - len(chosen))
        found = use(params, views(filled), predictors.deployed_payloads(config, source, stores, filled))
        totals += [np.asarray(part, np.float64)[: len(chosen)].sum(axis=0) for part in found]
    weight, share = totals / max(1, len(indices))
    return {name: Contribution(float(weight[k]), float(share[k])) for k, name in enumerate(names)}


def detachment_order(found: Mapping[str, Contribution]) -> list[str]:
    """Returns the experts from the least contribution to the greatest, equal ones by name."""
    return sorted(found, key=lambda name: (found[name].gate, name))


def text_loss(
    params: Mapping[str, Any], patches: predictors.Tokens, table: np.ndarray, indices: Sequence[int], batch: int
) -> float:
    """Returns the mean text loss of pictures that have a caption; NaN when none has.

    Args:
      params: ToVE's own, with its caption head.
      patches: of the encoder judged.
      table: int32 (pictures, L), words of every caption, see `Vocabulary.encode`.
      indices: the pictures judged.
      batch: pictures a step.
    """
    losses = jax.jit(tove.text_losses)
    told = [int(index) for index in indices if (table[index] >= 0).any()]
    total = 0.0
    for start in range(0, len(told), batch):
        chosen = told[start : start + batch]
        found, _ = losses(params, patches(chosen), np.maximum(table[chosen], 0), table[chosen] >= 0)
        total += float(found.sum())
    return total / len(told) if told else float("nan")


def median_time(function: Callable[[], Any], repeats: int) -> float:
    """Returns the median milliseconds of a call that ends when its result is there; the first call is left out."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def expert_latency(expert: Expert, batch: int, repeats: int) -> float:
    """Returns the milliseconds an expert takes for a batch of cut pictures."""
    size = expert.card.view.size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    if expert.card.backend != "jax":
        return median_time(lambda: expert.apply(expert.params, pixels), repeats)
    run, params, there = jax.jit(expert.apply), jax.device_put(expert.params), jax.device_put(pixels)
    return median_time(lambda: run(params, there), repeats)


def encoder_latency(
    config: Config, params: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], batch: int, repeats: int
) -> float:
    """Returns the milliseconds of CLIP with gate and projector for a batch, the experts' patches being there.

    Args:
      config: a ToVE run's settings, which say who is attached.
      params: ``{"student", "method"}``.
      shapes: (H, W, D) of every attached expert's patches.
      batch: pictures.
      repeats: timed calls.
    """
    module, size = vit.from_config(config.student), config.student.image_size
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jax.device_put(generator.standard_normal((batch, *shape), np.float32))

    features = {name: ExpertFeatures(draw(*shapes[name])) for name in tove.deployed_experts(config)}
    pixels, params = draw(size, size, 3), jax.device_put(params)
    run = jax.jit(lambda params, pixels, features: tove.tokens(module, params, pixels, features, config))
    return median_time(lambda: run(params, pixels, features), repeats)


def judge(
    config: Config,
    params: Mapping[str, Any],
    patches: predictors.Tokens,
    labels: Sequence[str | None],
    train: list[int],
    held_out: list[int],
    table: np.ndarray | None,
) -> dict[str, Any]:
    """Scores one encoder's patch tokens: ``knn`` and ``probe`` with intervals, ``text`` loss or None.

    Args:
      config: the run's settings.
      params: ToVE's own.
      patches: of the encoder.
      labels: of all pictures.
      train: numbers of the labelled gallery.
      held_out: numbers of the judged pictures.
      table: words of every caption, or None without a text loss.
    """
    student = {"student": lambda indices: patches(indices).mean(axis=1)}
    found = runner.score(student, labels, train, held_out, config.eval).metrics
    result: dict[str, Any] = {}
    for task in ("knn", "probe"):
        result |= {task + end: found[f"eval/{task}/student{end}"] for end in ("", "_low", "_high")}
    result["text"] = None if table is None else text_loss(params, patches, table, held_out, config.eval.batch)
    return result


def detach_run(
    config: Config | None,
    workdir: Path | str,
    *,
    step: int | None = None,
    pictures: int = 0,
    batch: int = 8,
    repeats: int = 5,
    latency: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Detaches a run's experts in ascending order of contribution, without retraining, and judges each encoder.

    Writes ``<workdir>/eval/detach.json`` and ``detach.png``.

    Args:
      config: evaluation settings and places, see `tove_jax.eval.run.with_stored_settings`; None: the run's.
      workdir: the run's folder.
      step: a saved step; the newest when None.
      pictures: held-out pictures that calibrate, spread evenly; 0: all.
      batch: pictures of a timed call.
      repeats: timed calls; their median counts.
      latency: whether to load the experts and time them.
      progress: show a bar.

    Returns:
      What the JSON holds: ``contribution`` {expert: {gate, share}}, ``order`` (first detached first),
      ``latency`` {batch, device, included, experts {expert: ms}} or None, and ``rows``, from all experts
      to none: ``attached``, ``detached`` (the one that left last, or None), ``knn`` and ``probe``
      (accuracies with ``_low`` and ``_high``), ``text`` (loss in nats, None without a caption head),
      ``encoder_ms``, ``experts_ms`` and ``total_ms`` (None without latency).

    Raises:
      InputError: not a ToVE run, no expert attached, or what `evaluate_run` raises.
    """
    workdir = Path(workdir)
    stored, params, provenance = load_student(workdir, step)
    if not isinstance(stored.method, ToVEConfig):
        raise InputError(f"{workdir}: expected a run of ToVE, found config.method.name '{stored.method.name}'")
    if batch < 1 or repeats < 1 or pictures < 0:
        raise InputError(
            f"detach: expected positive numbers, found batch {batch}, repeats {repeats}, pictures {pictures}"
        )
    config = with_stored_settings(stored, config)
    hub = tove.deployed_experts(config)
    if not hub:
        raise InputError(f"{workdir}: no expert is attached, there is nothing to detach")
    source, train, held_out = predictors.run_folder_source(config)
    stores, views = open_stores(config, workdir, only=hub), predictors.views_of(config, source)
    chosen = np.unique(np.linspace(0, len(held_out) - 1, pictures or len(held_out)).astype(int))
    calibration = [held_out[int(place)] for place in chosen]
    contribution = contributions(config, params, views, source, stores, calibration)
    order = detachment_order(contribution)
    words = None
    if "vocabulary" in provenance:
        words = Vocabulary.read(workdir, provenance["vocabulary"]).encode(source.captions)
    times: dict[str, float] | None = {} if latency else None
    if times is not None:
        specs = chosen_experts(config)
        for name in tqdm(hub, desc="latency of experts", unit="expert", disable=not progress, leave=False):
            expert = registry.load(specs[name], **load_options(config, workdir, name))
            times[name] = expert_latency(expert, batch, repeats)
    shapes = {name: stores[name].manifest.shapes["patches"] for name in hub}
    rows = []
    for gone in tqdm(range(len(order) + 1), desc="detach", unit="encoder", disable=not progress):
        names = [name for name in hub if name not in order[:gone]]
        asked = tove.attach(config, names)
        patches = predictors.deployed(asked, params, views, source, stores)
        row: dict[str, Any] = {"attached": names, "detached": order[gone - 1] if gone else None}
        row |= judge(asked, params["method"], patches, source.labels, train, held_out, words)
        row |= dict.fromkeys(("encoder_ms", "experts_ms", "total_ms"))
        if times is not None:
            row["encoder_ms"] = encoder_latency(asked, params, shapes, batch, repeats)
            row["experts_ms"] = sum(times[name] for name in names)
            row["total_ms"] = row["encoder_ms"] + row["experts_ms"]
        rows.append(row)
    device = jax.devices()[0].device_kind
    result = {
        "format": FORMAT,
        "step": int(provenance["step"]),
        "pictures": {"calibration": len(calibration), "held_out": len(held_out)},
        "contribution": {name: dataclasses.asdict(value) for name, value in contribution.items()},
        "order": order,
        "latency": None
        if times is None
        else {"batch": batch, "repeats": repeats, "device": device, "included": INCLUDED, "experts": times},
        "rows": rows,
    }
    atomic_write_json(workdir / "eval" / "detach.json", result)
    atomic_write_bytes(workdir / "eval" / "detach.png", plot(result))
    return result


def table(result: Mapping[str, Any]) -> str:
    """Returns what `detach_run` found as plain text: contributions, then an encoder a row."""
    lines = [f"contribution over {result['pictures']['calibration']} held-out pictures, the first to go first:"]
    width = max(len(name) for name in result["order"])
    for name in result["order"]:
        found = result["contribution"][name]
        lines.append(
            f"  {name:{width}s}  mean weight {found['gate']:.3f}, largest on {found['share']:.1%} of the tokens"
        )
    header = ("experts", "detached", "k-NN", "95 % interval", "probe", "95 % interval", "text loss", "latency")
    cells: list[tuple[str, ...]] = [header]
    for row in result["rows"]:
        words = [str(len(row["attached"])), row["detached"] or "none"]
        for task in ("knn", "probe"):
            low, high = row[f"{task}_low"], row[f"{task}_high"]
            words += [f"{row[task]:.1%}", f"{100 * low:.1f} to {100 * high:.1f}"]
        words.append("-" if row["text"] is None else f"{row['text']:.3f}")
        words.append("-" if row["total_ms"] is None else f"{row['total_ms']:.1f} ms")
        cells.append(tuple(words))
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    if result["latency"]:
        timed = result["latency"]
        lines.append(f"latency: batch of {timed['batch']} on {timed['device']}; {timed['included']}.")
    return "\n".join(lines)


def plot(result: Mapping[str, Any]) -> bytes:
    """Draws score, text loss and latency against the number of experts, as PNG.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the plot needs matplotlib: pip install 'tove_jax[report]'") from None
    ink, muted, line, student, other = "#201d19", "#6a645b", "#e3ded4", "#c2410c", "#1f6fc4"
    rows = result["rows"]
    counts = [len(row["attached"]) for row in rows]
    panels: list[tuple[str, list[tuple[str, str, Any, Any]]]] = []
    scores = [("k-NN", student, "knn"), ("linear probe", other, "probe")]
    panels.append(
        (
            "held-out accuracy, %",
            [
                (
                    label,
                    colour,
                    [100 * row[key] for row in rows],
                    [[100 * row[f"{key}_low"] for row in rows], [100 * row[f"{key}_high"] for row in rows]],
                )
                for label, colour, key in scores
            ],
        )
    )
    if all(row["text"] is not None for row in rows):
        panels.append(("text loss, nats", [("", student, [row["text"] for row in rows], None)]))
    if all(row["total_ms"] is not None for row in rows):
        panels.append(
            (
                f"latency, ms a batch of {result['latency']['batch']}",
                [
                    ("with experts", student, [row["total_ms"] for row in rows], None),
                    ("encoder and gate", other, [row["encoder_ms"] for row in rows], None),
                ],
            )
        )
    figure = Figure(figsize=(4.2 * len(panels), 3.4), facecolor="#faf8f4", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_facecolor("#ffffff")
        for label, colour, values, interval in lines:
            axes.plot(counts, values, "o-", color=colour, linewidth=2, markersize=5, label=label)
            if interval is not None:
                axes.fill_between(counts, interval[0], interval[1], color=colour, alpha=0.12, linewidth=0)
        axes.set_title(title, color=ink, fontsize=11, loc="left")
        labels = [
            str(count) + (f"\n- {row['detached']}" if row["detached"] else "")
            for count, row in zip(counts, rows, strict=True)
        ]
        axes.set_xticks(counts, labels, fontsize=7)
        axes.invert_xaxis()
        axes.set_xlabel("attached experts, the last to leave below", color=muted, fontsize=9)
        axes.tick_params(colors=muted)
        axes.grid(axis="y", color=line)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if any(label for label, *_ in lines):
            axes.legend(frameon=False, fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()
