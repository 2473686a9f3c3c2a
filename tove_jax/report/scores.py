"""How good the features are: the numbers of the evaluation, as tiles, dots and tables of a run's page."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tove_jax.config.schema import METHOD_TITLES
from tove_jax.report import plots
from tove_jax.report.collect import RunData

TASKS = {"knn": "k-nearest neighbours", "probe": "linear probe"}
_EXPERT_COLOURS = 8
_NAMES = {"init": "start of the student", "pixels": "raw pixels", "source": "the run that was merged"}


def colour(name: str, experts: Sequence[str]) -> str:
    """Returns the CSS colour of a network, the same all over the page."""
    if name in ("student", "init", "pixels", "source"):
        return f"var(--{name})"
    if name in experts:
        return f"var(--expert-{list(experts).index(name) % _EXPERT_COLOURS})"
    return "var(--ink)"


def display_name(name: str) -> str:
    """Returns what people read for a network's key."""
    return _NAMES.get(name, name.replace("_", " "))


def shown_name(run: RunData, name: str) -> str:
    """Returns what people read for a network's key on this run's page: a student is called what its method makes."""
    if name == "student":
        return {"tove": "enriched tokens", "merge": "merged tower"}.get(method_name(run), name)
    return display_name(name)


def method_name(run: RunData) -> str:
    """Returns the name of a run's method, empty when it is not known."""
    return run.config.get("method", {}).get("name", "")


def method_title(run: RunData) -> str:
    """Returns what people read for the method of a run, or of the run that it merges; empty when not known."""
    method = run.config.get("method", {})
    method = method.get("source_method", method)
    return METHOD_TITLES.get(method.get("name", ""), method.get("name", ""))


def networks(run: RunData, task: str) -> list[str]:
    """Returns the names with an accuracy: references and student first, then experts."""
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
    return plots.Bar(shown_name(run, name), colour(name, run.experts), value, low, high, name == "student")


def dots(run: RunData, task: str) -> str:
    """Draws the accuracies of all networks by one task."""
    names = networks(run, task)
    rows = [_bar(run, task, name) for name in names]
    said = ", ".join(f"{row.name} {100 * row.value:.1f} %" for row in rows)
    majority = run.metrics.get("eval/majority")
    reference = None if majority is None else ("always the commonest label", majority)
    return plots.dot_chart(rows, f"Held-out accuracy by {TASKS[task]}: {said}.", reference=reference)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One number of the first row."""

    label: str
    value: str
    note: str
    colour: str
    strong: bool = False


def tiles(run: RunData) -> list[Tile]:
    """Returns the numbers of the first row, none without an evaluation."""
    metrics = run.metrics
    if "eval/knn/student" not in metrics:
        return []

    def interval(key: str) -> str:
        return f"95 %: {100 * metrics[f'{key}_low']:.1f} to {100 * metrics[f'{key}_high']:.1f}"

    def percent(key: str) -> str:
        return f"{100 * metrics[key]:.1f} %"

    tiles = []
    note = interval("eval/knn/student") if "eval/knn/student_low" in metrics else ""
    tiles.append(
        Tile(shown_name(run, "student").capitalize(), percent("eval/knn/student"), note, "var(--student)", True)
    )
    for other, label in (("init", "Gain over its start"), ("source", "Against its source")):
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
    scored = [name for name in networks(run, "knn") if name not in ("pixels", "init", "student", "source")]
    if scored:
        best = max(scored, key=lambda name: metrics[f"eval/knn/{name}"])
        note = display_name(best)
        tiles.append(Tile("Best expert", percent(f"eval/knn/{best}"), note, colour(best, run.experts)))
    return tiles


def _cell(metrics: Mapping[str, float], key: str, sign: str = "") -> dict[str, str] | None:
    if key not in metrics:
        return None
    value, low, high = (metrics.get(key + end) for end in ("", "_low", "_high"))
    spread = "" if low is None or high is None else f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"
    return {"value": f"{100 * metrics[key]:{sign}.1f}", "interval": spread}


def merge_rows(run: RunData) -> list[dict[str, Any]]:
    """Returns what a merge lost: the run it merges, the merged tower, and between what the tower would be without it.

    Empty for a run that is no merge, or was not judged beside its source.
    """
    metrics = run.metrics
    if "eval/knn/source" not in metrics:
        return []

    def error(name: str) -> str:
        key = f"eval/merge/error/{name}"
        return f"{metrics[key]:.3f}" if key in metrics else ""

    def row(name: str, key: str, of: str, strong: bool = False, sign: str = "") -> dict[str, Any]:
        cells = {task: _cell(metrics, f"eval/{task}/{key}", sign) for task in TASKS}
        tint = colour("student" if sign else key, run.experts)
        return {"name": name, "colour": tint, "error": of, "strong": strong, **cells}

    rows = [
        row(f"source: the {method_title(run)} run as deployed".replace("  ", " "), "source", "0"),
        row("merged: one plain tower", "student", error("merged"), True),
        row("merged minus source, points", "student_minus_source", "", sign="+"),
    ]
    if error("tower"):
        tower = row("the source's tower alone", "-", error("tower"))
        rows.append(tower | {"colour": "var(--muted)"})
    if "eval/knn/init" in metrics:
        rows.append(row("start of the source", "init", ""))
    return rows


def score_rows(run: RunData) -> list[dict[str, Any]]:
    """Returns the table of accuracies and errors, a network a row."""

    def plain(key: str) -> str:
        return f"{run.metrics[key]:.3f}" if key in run.metrics else ""

    return [
        {
            "name": shown_name(run, name),
            "colour": colour(name, run.experts),
            "knn": _cell(run.metrics, f"eval/knn/{name}"),
            "probe": _cell(run.metrics, f"eval/probe/{name}"),
            "error": plain(f"eval/feature_error/{name}"),
            "linear_init": plain(f"eval/linear_error/init/{name}"),
            "linear_student": plain(f"eval/linear_error/student/{name}"),
            "strong": name == "student",
        }
        for name in networks(run, "knn")
    ]


def categories(run: RunData) -> dict[str, Any] | None:
    """Returns accuracies by category, or None without answers by picture."""
    kept = run.predictions
    if not kept:
        return None
    truth = np.array(kept["truth"])
    answers = {name: np.array(values) for name, values in kept["knn"].items()}
    names = [name for name in networks(run, "knn") if name in answers]
    rows = []
    for number, label in enumerate(kept["classes"]):
        here = truth == number
        if here.any():
            values = [float((answers[name][here] == number).mean()) for name in names]
            rows.append({"label": label, "count": int(here.sum()), "values": values})
    rows.sort(key=lambda row: -row["count"])
    heads = [{"name": shown_name(run, name), "colour": colour(name, run.experts)} for name in names]
    return {"heads": heads, "rows": rows}


def seeds(run: RunData) -> list[dict[str, str]]:
    """Returns means and spreads over several runs, where they were judged together."""
    rows = []
    for name, value in run.metrics.items():
        if (match := re.fullmatch(r"eval/seeds/(.+)/mean", name)) and not match[1].endswith(("_std", "_low", "_high")):
            spread = run.metrics.get(f"eval/seeds/{match[1]}/std", 0.0)
            rows.append({"name": match[1], "mean": f"{100 * value:.1f}", "std": f"{100 * spread:.1f}"})
    return rows
