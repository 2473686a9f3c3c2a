"""Turns a `RunData` into one self-contained HTML page."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from tove_jax.config import schema
from tove_jax.report import plots
from tove_jax.report.asked import task_tables
from tove_jax.report.collect import PictureMaps, RunData
from tove_jax.report.scores import (
    TASKS,
    categories,
    colour,
    display_name,
    dots,
    merge_rows,
    method_name,
    method_title,
    networks,
    score_rows,
    seeds,
    tiles,
)  # fmt: skip
from tove_jax.report.usage import COLLAPSED, answering, charts, detaching, routers, sections, waiting


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
            cells = {
                panel.column: {"src": data_uri(panel.image), "alt": panel.alt, "note": panel.note} for panel in panels
            }
            rows.append({"picture": picture, "src": data_uri(picture.image), "cells": cells})
    return {"columns": columns, "rows": rows} if rows else None


def _cards(run: RunData) -> list[dict[str, Any]]:
    """Returns what the page shows of each question about a picture."""
    return [
        {
            "asked": one,
            "image": data_uri(one.image),
            "look": None if one.look is None else data_uri(one.look),
            "chance": "" if one.chance is None else f"{100 * one.chance:.0f} %",
        }
        for one in run.asked
    ]


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
    """Returns the page's first sentences: what the encoder is, how it came about, on what it was judged."""
    student, method = run.config.get("student", {}), method_name(run)
    what = "A vision encoder"
    if student:
        what = (
            f"A {student['layers']}-layer vision transformer of width {student['width']} "
            f"({student['image_size']} px, patch {student['patch_size']})"
        )
    title, experts = method_title(run), len(run.experts)
    by = f" by {title}" if title else ""
    if method == "merge":
        text = f"{what}, plain: merged from a run of {title}, whose tokens it was taught."
    elif method == "tove":
        attached = len(run.config["method"]["attached"]) if not run.config["method"]["attach_all"] else experts
        text = f"{what}, frozen, its tokens enriched{by} with what {_count(attached, 'frozen expert')} say."
    elif experts:
        text = f"{what} distilled from {_count(experts, 'frozen expert')}{by}."
    else:
        text = f"{what}{by}."
    language = run.config.get("language", {})
    if language.get("kind", "none") != "none":
        text += f" A language model of {language['layers']} layers and width {language['width']} reads its tokens."
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _merging(run: RunData) -> dict[str, Any] | None:
    """Returns what was merged into what, or None for a run that is no merge."""
    method = run.config.get("method", {})
    if method_name(run) != "merge":
        return None
    source = method["source_method"]
    if source.get("name") == "tove":
        names = [name for name in run.experts if source["attach_all"] or name in source["attached"]]
        beside = "with " + ", ".join(map(display_name, names)) + " beside it" if names else "without experts"
    else:
        kind = {"mole": "MoLE", "mola": "MoLA"}.get(method["source_adapter"]["kind"], "no")
        beside = f"with {kind} adapters"
    what = f"the last {method['blocks']} blocks" if method["blocks"] else "all blocks"
    if method["lora_rank"]:
        what = f"low-rank updates (rank {method['lora_rank']}) of {what}"
    return {
        "source": f"{method_title(run)} {beside}",
        "folder": PurePath(method["source"]).name,
        "step": f"step {method['source_step']}" if method["source_step"] else "last step",
        "trained": f"{what}, begun as the {'tower' if method['begin'] == 'tower' else 'start'} of the source",
        "loss": method["loss"],
        "rows": merge_rows(run),
    }


def _weight_words(run: RunData) -> dict[str, str]:
    """Returns what is said beside charts and maps that mean something else in each method."""
    method = run.config.get("method", {})
    tokens = {
        "hawaii": "Each teacher's token scores s in the fine-grained loss: where its own tokens agree most among "
        "each other. Dark is a picture's least score, bright its largest; below each, the largest over the mean. "
        "Scores that are all alike weigh nothing (1.00 ×).",
        "tove": "How much of each token's added knowledge comes from each expert: the gate's weights, which sum to one "
        "over the experts of a token. All maps have one scale; below each, its mean weight.",
    }
    tokens["merge"] = tokens["tove"].replace("the gate's", "the source's gate")
    source = {"probs": "CLIP's attention", "scores": "a softmax of CLIP's attention scores"}.get(
        method.get("token_weight_source", ""), "a softmax of CLIP's attention, which makes it nearly even"
    )
    if method.get("teacher_weighting", True):
        weights = "CLIP's is pinned by the method, the others share the rest by their agreement with CLIP."
    else:
        weights = "They are fixed by the settings (`teacher_prior`)."
    return {
        "tokens": tokens.get(
            method.get("name", ""),
            f"What each token counts in the loss beside its even share: {source}. Dark is a picture's least weight, "
            "bright its largest; below each, the largest over the mean.",
        ),
        "weights": f"Mean over a batch; together they make one. {weights}",
    }


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
    scores = score_rows(run)
    return environment.get_template("report.html").render(
        run=run,
        method=method_name(run),
        sections=sections(run),
        lead=_lead(run),
        tiles=tiles(run),
        dots={task: dots(run, task) for task in TASKS if networks(run, task)} if evaluated else {},
        tasks=TASKS,
        scores=scores,
        errors={name for name in ("error", "linear_init", "linear_student") if any(row[name] for row in scores)},
        categories=categories(run),
        charts=charts(run),
        speed_note=waiting(run),
        say=_weight_words(run),
        routers=routers(run),
        collapsed=COLLAPSED,
        detaching=detaching(run),
        merging=_merging(run),
        attention=_gallery(run.pictures, "attention", run.experts),
        weights=_gallery(run.pictures, "weights", run.experts),
        components=_gallery(run.pictures, "components", run.experts),
        answering=answering(run),
        tasks_told=task_tables(run.tasks),
        cards=_cards(run),
        settings=_settings(run),
        photographs=_photographs(run.pictures),
        provenance=_flat(run.provenance),
        colours={name: colour(name, run.experts) for name in run.experts},
        display_name=display_name,
        seeds=seeds(run),
        seed_count=int(run.metrics.get("eval/seeds/count", 0)),
    )
