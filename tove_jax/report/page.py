"""Turns a `RunData` into one self-contained HTML page."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from tove_jax.config import schema
from tove_jax.report import plots
from tove_jax.report.collect import PictureMaps, RunData

_EXPERT_COLOURS = 8
_TASKS = {"knn": "k-nearest neighbours", "probe": "linear probe"}


def colour(name: str, experts: Sequence[str]) -> str:
    """Returns the CSS colour of a network, the same all over the page."""
    if name in ("student", "init", "pixels"):
        return f"var(--{name})"
    if name in experts:
        return f"var(--expert-{list(experts).index(name) % _EXPERT_COLOURS})"
    return "var(--ink)"


def display_name(name: str) -> str:
    """Returns what people read for a network's key."""
    return {"init": "start of the student", "pixels": "raw pixels", "source": "the run that was merged"}.get(
        name, name.replace("_", " ")
    )


def data_uri(image: np.ndarray) -> str:
    """Returns an image as a ``data:`` URI: PNG up to 64 pixels a side, else JPEG.

    Args:
      image: uint8 (H, W, 3).
    """
    buffer = io.BytesIO()
    small = max(image.shape[:2]) <= 64
    picture = Image.fromarray(image)
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=86, optimize=True)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _networks(run: RunData, task: str) -> list[str]:
    metrics = run.metrics
    known = [name for name in ("pixels", "init", "student", "source", *run.experts) if f"eval/{task}/{name}" in metrics]
    pattern = re.compile(rf"eval/{task}/(?!student_minus_)(.+)")
    found = [match[1] for name in metrics if (match := pattern.fullmatch(name))]
    ends = ("_std", "_low", "_high")
    rest = [name for name in found if not (name.endswith(ends) and name.rsplit("_", 1)[0] in found)]
    return known + [name for name in rest if name not in known]


def _bar(run: RunData, task: str, name: str) -> plots.Bar:
    key = f"eval/{task}/{name}"
    value = run.metrics[key]
    low, high = run.metrics.get(f"{key}_low", value), run.metrics.get(f"{key}_high", value)
    return plots.Bar(display_name(name), colour(name, run.experts), value, low, high, name == "student")


def _dots(run: RunData, task: str) -> str:
    names = _networks(run, task)
    rows = [_bar(run, task, name) for name in names]
    said = ", ".join(f"{row.name} {100 * row.value:.1f} %" for row in rows)
    majority = run.metrics.get("eval/majority")
    reference = None if majority is None else ("always the commonest label", majority)
    return plots.dot_chart(rows, f"Held-out accuracy by {_TASKS[task]}: {said}.", reference=reference)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One number of the first row."""

    label: str
    value: str
    note: str
    colour: str
    strong: bool = False


def _tiles(run: RunData) -> list[Tile]:
    metrics = run.metrics
    if "eval/knn/student" not in metrics:
        return []

    def interval(key: str) -> str:
        return f"95 %: {100 * metrics[f'{key}_low']:.1f} to {100 * metrics[f'{key}_high']:.1f}"

    def percent(key: str) -> str:
        return f"{100 * metrics[key]:.1f} %"

    tiles = []
    note = interval("eval/knn/student") if "eval/knn/student_low" in metrics else ""
    tiles.append(Tile("Student", percent("eval/knn/student"), note, "var(--student)", True))
    for other, label in (("init", "Gain over its start"), ("source", "Beside the run it merges")):
        gain = f"eval/knn/student_minus_{other}"
        if gain not in metrics:
            continue
        note = (
            f"points, {100 * metrics[f'{gain}_low']:+.1f} to {100 * metrics[f'{gain}_high']:+.1f}"
            if f"{gain}_low" in metrics
            else "points"
        )
        tiles.append(Tile(label, f"{100 * metrics[gain]:+.1f}", note, "var(--student)"))
    for name, label in (("init", "Start"), ("pixels", "Raw pixels")):
        key = f"eval/knn/{name}"
        if key in metrics:
            note = interval(key) if f"{key}_low" in metrics else ""
            tiles.append(Tile(label, percent(key), note, f"var(--{name})"))
    scored = [name for name in _networks(run, "knn") if name not in ("pixels", "init", "student", "source")]
    if scored:
        best = max(scored, key=lambda name: metrics[f"eval/knn/{name}"])
        note = display_name(best)
        tiles.append(Tile("Best expert", percent(f"eval/knn/{best}"), note, colour(best, run.experts)))
    return tiles


def _score_rows(run: RunData) -> list[dict[str, Any]]:
    def cell(key: str) -> dict[str, str] | None:
        if key not in run.metrics:
            return None
        value, low, high = (run.metrics.get(key + end) for end in ("", "_low", "_high"))
        spread = "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
        return {"value": f"{100 * value:.1f}", "interval": spread}

    def plain(key: str) -> str:
        return f"{run.metrics[key]:.3f}" if key in run.metrics else ""

    return [
        {
            "name": display_name(name),
            "colour": colour(name, run.experts),
            "knn": cell(f"eval/knn/{name}"),
            "probe": cell(f"eval/probe/{name}"),
            "error": plain(f"eval/feature_error/{name}"),
            "linear_init": plain(f"eval/linear_error/init/{name}"),
            "linear_student": plain(f"eval/linear_error/student/{name}"),
            "strong": name == "student",
        }
        for name in _networks(run, "knn")
    ]


def _categories(run: RunData) -> dict[str, Any] | None:
    kept = run.predictions
    if not kept:
        return None
    truth = np.array(kept["truth"])
    answers = {name: np.array(values) for name, values in kept["knn"].items()}
    names = [name for name in _networks(run, "knn") if name in answers]
    rows = []
    for number, label in enumerate(kept["classes"]):
        here = truth == number
        if here.any():
            values = [float((answers[name][here] == number).mean()) for name in names]
            rows.append({"label": label, "count": int(here.sum()), "values": values})
    rows.sort(key=lambda row: -row["count"])
    heads = [{"name": display_name(name), "colour": colour(name, run.experts)} for name in names]
    return {"heads": heads, "rows": rows}


def _series(run: RunData, names: Mapping[str, str], colours: Mapping[str, str]) -> list[plots.Series]:
    result = []
    for key, label in names.items():
        rows = [row for row in run.history if key in row]
        if rows:
            steps = [float(row["step"] or 0) for row in rows]
            result.append(plots.Series(label, colours[key], steps, [row[key] for row in rows]))
    return result


def _charts(run: RunData) -> dict[str, str]:
    """Returns every chart of the training section that the history has numbers for."""
    keys = dict.fromkeys(key for row in run.history for key in row if key != "step")
    charts = {}

    def add(name: str, found: Mapping[str, str], colours: Mapping[str, str], alt: str, **options: Any) -> None:
        series = _series(run, found, colours)
        if series:
            charts[name] = plots.line_chart(series, alt, **options)

    shades = ("var(--ink)", "var(--expert-0)", "var(--expert-1)", "var(--expert-3)", "var(--expert-4)")
    parts = [key for key in keys if re.fullmatch(r"loss/[^/]+", key) and key.split("/")[1] not in run.experts]
    parts.sort(key=lambda key: (key != "loss/total", key))
    labels = {key: key.removeprefix("loss/").replace("_", " ") for key in parts}
    colours = {key: shades[index % len(shades)] for index, key in enumerate(parts)}
    add("loss", labels, colours, "Loss and its parts over steps.", logarithmic=True)
    found = {key: match[1] for key in keys if (match := re.fullmatch(r"loss/([^/]+)(?:/patches)?", key))}
    found = {key: name for key, name in found.items() if name in run.experts}
    by_expert = {key: colour(name, run.experts) for key, name in found.items()}
    labels = {key: display_name(name) for key, name in found.items()}
    add("expert_loss", labels, by_expert, "Distillation loss of each expert over steps.", logarithmic=True)
    found = {f"weight/{name}": display_name(name) for name in run.experts if f"weight/{name}" in keys}
    by_expert = {f"weight/{name}": colour(name, run.experts) for name in run.experts}
    add("weights", found, by_expert, "Weight of each expert in the loss over steps.", from_zero=True)
    rate = {"perf/images_per_s": ""} if "perf/images_per_s" in keys else {}
    alt = "Pictures trained a second over steps."
    add("rate", rate, {"perf/images_per_s": "var(--student)"}, alt, from_zero=True)
    layers = _router(run)
    if layers:
        ramp = len(layers["rows"])
        busiest = {}
        for position, row in enumerate(layers["rows"]):
            share = 100 if ramp == 1 else round(35 + 65 * position / (ramp - 1))
            tint = f"color-mix(in oklab, var(--student) {share}%, var(--muted))"
            rows = [one for one in run.history if row["keys"][0] in one]
            values = [max((one.get(key) or 0.0) for key in row["keys"]) for one in rows]
            steps = [float(one["step"] or 0) for one in rows]
            busiest[row["layer"]] = plots.Series(f"layer {row['layer']}", tint, steps, values)
        alt = "Share of tokens that go to each layer's busiest LoRA expert, over steps."
        charts["busiest"] = plots.line_chart(list(busiest.values()), alt, from_zero=True)
    return charts


def _waiting(run: RunData) -> str:
    waits = [row["perf/data_wait"] for row in run.history if row.get("perf/data_wait") is not None]
    if not waits:
        return "Pictures a second."
    return f"Pictures a second. Waiting for data takes {100 * float(np.median(waits)):.1f} % of a step (median)."


def _router(run: RunData) -> dict[str, Any] | None:
    pattern = re.compile(r"router/load/([^/]+)/([^/]+)")
    last: dict[tuple[str, str], float] = {}
    for row in run.history:
        for key, value in row.items():
            if (match := pattern.fullmatch(key)) and value is not None:
                last[match[1], match[2]] = value

    def order(name: str) -> tuple[int, str]:
        digits = re.sub(r"\D", "", name)
        return int(digits) if digits else -1, name

    layers = sorted({layer for layer, _ in last}, key=order)
    experts = sorted({expert for _, expert in last}, key=order)
    if not layers:
        return None
    rows = [
        {
            "layer": str(int(layer)) if layer.isdigit() else layer,
            "values": [last.get((layer, expert), 0.0) for expert in experts],
            "keys": [f"router/load/{layer}/{expert}" for expert in experts],
        }
        for layer in layers
    ]
    top = max(value for row in rows for value in row["values"]) or 1.0
    return {"experts": experts, "rows": rows, "top": top, "uniform": 1 / len(experts)}


def _settings(run: RunData) -> list[dict[str, Any]]:
    """Returns the config as sections of rows, each with its sentence and whether it is a default."""
    sections: dict[str, list[dict[str, Any]]] = {}

    def walk(values: Mapping[str, Any], defaults: Mapping[str, Any], kind: Any, path: tuple[str, ...]) -> None:
        fields = {field.name: field for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        for name, value in values.items():
            field = fields.get(name)
            usual = defaults.get(name) if isinstance(defaults, Mapping) else None
            if isinstance(value, Mapping):
                inner = field.default_factory if field is not None else None
                walk(value, usual or {}, inner, (*path, name))
                continue
            text = json.dumps(value, ensure_ascii=False)
            sections.setdefault(".".join(path) or "run", []).append(
                {
                    "name": name,
                    "value": text,
                    "changed": bool(run.defaults) and text != json.dumps(usual, ensure_ascii=False),
                    "doc": field.metadata.get("doc", "") if field is not None else "",
                }
            )

    walk(run.config, run.defaults, schema.Config, ())
    return [{"name": name, "rows": rows} for name, rows in sections.items()]


def _gallery(pictures: Sequence[PictureMaps], group: str, experts: Sequence[str]) -> dict[str, Any] | None:
    columns: dict[str, str] = {}
    rows = []
    for picture in pictures:
        panels = [panel for panel in picture.panels if panel.group == group]
        for panel in panels:
            columns.setdefault(panel.column, colour(panel.colour, experts) if panel.colour else "var(--muted)")
        if panels:
            cells = {panel.column: {"src": data_uri(panel.image), "alt": panel.alt} for panel in panels}
            rows.append({"picture": picture, "src": data_uri(picture.image), "cells": cells})
    return {"columns": columns, "rows": rows} if rows else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    result = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result.update(_flat(value, f"{prefix}{name} / "))
        else:
            result[prefix + str(name)] = value if isinstance(value, str) else json.dumps(value, default=str)
    return result


def _photographs(pictures: Sequence[PictureMaps]) -> dict[str, list[str]]:
    """Returns the captions of the photographs shown, by licence."""
    found: dict[str, list[str]] = {}
    for picture in pictures:
        if picture.origin == "photograph":
            found.setdefault(picture.licence, []).append(picture.caption)
    return found


def _lead(run: RunData) -> str:
    student = run.config.get("student", {})
    words = []
    if student:
        words.append(
            f"A {student['layers']}-layer vision transformer of width {student['width']} "
            f"({student['image_size']} px, patch {student['patch_size']})"
        )
    else:
        words.append("A vision encoder")
    if run.experts:
        words.append(f"distilled from {len(run.experts)} frozen experts")
    name = run.config.get("method", {}).get("name")
    if name:
        words.append("by " + {"move_kd": "MoVE-KD"}.get(name, name))
    text = " ".join(words) + "."
    if run.history:
        text += f" {plots.number(float(run.history[-1]['step'] or 0))} steps"
        if run.config.get("train", {}).get("batch"):
            text += f" of {run.config['train']['batch']} pictures"
        text += "."
    if "eval/pictures/held_out" in run.metrics:
        text += (
            f" Judged on {run.metrics['eval/pictures/held_out']:,.0f} held-out pictures in "
            f"{run.metrics.get('eval/classes', 0):.0f} categories."
        )
    return text


def _seeds(run: RunData) -> list[dict[str, str]]:
    rows = []
    for name, value in run.metrics.items():
        if (match := re.fullmatch(r"eval/seeds/(.+)/mean", name)) and not match[1].endswith(("_std", "_low", "_high")):
            spread = run.metrics.get(f"eval/seeds/{match[1]}/std", 0.0)
            rows.append({"name": match[1], "mean": f"{100 * value:.1f}", "std": f"{100 * spread:.1f}"})
    return rows


def render(run: RunData) -> str:
    """Renders the page.

    Args:
      run: what to show.

    Returns:
      HTML without scripts and without any reference to another file or host.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tove_jax.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    evaluated = "eval/knn/student" in run.metrics
    return environment.get_template("report.html").render(
        run=run,
        lead=_lead(run),
        tiles=_tiles(run),
        dots={task: _dots(run, task) for task in _TASKS if _networks(run, task)} if evaluated else {},
        tasks=_TASKS,
        scores=_score_rows(run),
        categories=_categories(run),
        charts=_charts(run),
        speed_note=_waiting(run),
        router=_router(run),
        attention=_gallery(run.pictures, "attention", run.experts),
        components=_gallery(run.pictures, "components", run.experts),
        settings=_settings(run),
        photographs=_photographs(run.pictures),
        provenance=_flat(run.provenance),
        colours={name: colour(name, run.experts) for name in run.experts},
        display_name=display_name,
        seeds=_seeds(run),
        seed_count=int(run.metrics.get("eval/seeds/count", 0)),
    )
