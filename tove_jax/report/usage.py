"""How a run used its experts: routers, gates and their detaching, and the charts of the training history."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tove_jax.report import plots
from tove_jax.report.collect import RunData
from tove_jax.report.scores import colour, display_name, method_name

COLLAPSED = 0.9
"""A layer counts as collapsed where one LoRA expert takes this share of the tokens, or more [choice of ours]."""


def _series(run: RunData, names: Mapping[str, str], colours: Mapping[str, str]) -> list[plots.Series]:
    result = []
    for key, label in names.items():
        rows = [row for row in run.history if key in row]
        if rows:
            steps = [float(row["step"] or 0) for row in rows]
            result.append(plots.Series(label, colours[key], steps, [row[key] for row in rows]))
    return result


def charts(run: RunData) -> dict[str, str]:
    """Returns every chart of the training history that it has numbers for, by name."""
    keys = dict.fromkeys(key for row in run.history for key in row if key != "step")
    result: dict[str, str] = {}

    def add(name: str, found: Mapping[str, str], colours: Mapping[str, str], alt: str, **options: Any) -> None:
        series = _series(run, found, colours)
        if series:
            result[name] = plots.line_chart(series, alt, **options)

    def add_experts(name: str, pattern: str, alt: str, others: Mapping[str, str] | None = None, **options: Any) -> None:
        """Adds a chart with a line an expert; in the pattern ``{}`` stands for its name, as it does for `others`."""
        known = {expert: (display_name(expert), colour(expert, run.experts)) for expert in run.experts}
        known |= {other: (label, "var(--ink)") for other, label in (others or {}).items()}
        found = {pattern.format(one): said for one, said in known.items() if pattern.format(one) in keys}
        labels = {key: label for key, (label, _) in found.items()}
        add(name, labels, {key: tint for key, (_, tint) in found.items()}, alt, **options)

    shades = ("var(--ink)", "var(--expert-0)", "var(--expert-1)", "var(--expert-3)", "var(--expert-4)")
    parts = [key for key in keys if re.fullmatch(r"loss/[^/]+", key) and key.split("/")[1] not in run.experts]
    parts.sort(key=lambda key: (key != "loss/total", key))
    labels = {key: key.removeprefix("loss/").replace("_", " ") for key in parts}
    tints = {key: shades[index % len(shades)] for index, key in enumerate(parts)}
    add("loss", labels, tints, "Loss and its parts over steps.", logarithmic=True)
    rate = {"perf/images_per_s": ""} if "perf/images_per_s" in keys else {}
    add("rate", rate, {"perf/images_per_s": "var(--student)"}, "Pictures trained a second over steps.", from_zero=True)
    if "text/accuracy" in keys:
        alone = {"loss/text": ""} if "loss/text" in keys else {}
        add("text_loss", alone, {"loss/text": "var(--student)"}, "Text loss over steps.", from_zero=True)
        right = {"text/accuracy": ""}
        alt = "Share of learned tokens that were the likeliest, over steps."
        add("text_accuracy", right, {"text/accuracy": "var(--student)"}, alt, from_zero=True)
        rows = {
            key: said for key, said in {"text/learned": "learned", "text/padding": "padding"}.items() if key in keys
        }
        tints = {"text/learned": "var(--student)", "text/padding": "var(--muted)"}
        add(
            "text_rows",
            rows,
            tints,
            "Shares of all positions that are learned, and padding, over steps.",
            from_zero=True,
        )
    error = {"merge/error": ""} if "merge/error" in keys else {}
    alt = "Squared error of the merged tower's tokens over the variance of the source's, over steps."
    add("merge_error", error, {"merge/error": "var(--student)"}, alt, logarithmic=True)
    patches = "loss/{}/patches" if any(f"loss/{name}/patches" in keys for name in run.experts) else "loss/{}"
    add_experts("expert_loss", patches, "Distillation loss of each expert over steps.", logarithmic=True)
    add_experts("weights", "weight/{}", "Weight of each expert in the loss over steps.", from_zero=True)
    alt = "Variance of each expert's targets over steps."
    add_experts("variance", "target/{}/variance", alt, {"coarse": "all, fused"}, logarithmic=True)
    add_experts("peak", "score/{}/peak", "Largest token score of each expert times the number of tokens, over steps.")
    add_experts("gate", "gate/{}", "Mean gate weight of each expert over steps.", from_zero=True)
    add_experts("gate_share", "gate/share/{}", "Share of tokens led by each expert, over steps.", from_zero=True)
    for group in routers(run):
        result[f"busiest_{group['name']}"] = _busiest(run, group)
    return result


def _busiest(run: RunData, group: Mapping[str, Any]) -> str:
    """Draws the share of each layer's busiest LoRA expert over the steps."""
    rows, series = group["rows"], []
    for position, row in enumerate(rows):
        share = 100 if len(rows) == 1 else round(35 + 65 * position / (len(rows) - 1))
        tint = f"color-mix(in oklab, var(--student) {share}%, var(--muted))"
        logged = [one for one in run.history if row["keys"][0] in one]
        values = [max((one.get(key) or 0.0) for key in row["keys"]) for one in logged]
        series.append(plots.Series(f"layer {row['layer']}", tint, [float(one["step"] or 0) for one in logged], values))
    alt = f"Share of tokens that go to each layer's busiest LoRA expert{group['of']}, over steps."
    return plots.line_chart(series, alt, from_zero=True)


def waiting(run: RunData) -> str:
    """Returns what is said below the chart of the speed."""
    waits = [wait for row in run.history if (wait := row.get("perf/data_wait")) is not None]
    if not waits:
        return "Pictures a second."
    return f"Pictures a second. Waiting for data takes {100 * float(np.median(waits)):.1f} % of a step (median)."


def _loads(run: RunData) -> dict[tuple[str, str], float]:
    """Returns the last logged load of each (layer, LoRA expert)."""
    pattern = re.compile(r"router/load/([^/]+)/([^/]+)")
    last: dict[tuple[str, str], float] = {}
    for row in run.history:
        for key, value in row.items():
            if (match := pattern.fullmatch(key)) and value is not None:
                last[match[1], match[2]] = value
    return last


def _order(name: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", name)
    return int(digits) if digits else -1, name


def routers(run: RunData) -> list[dict[str, Any]]:
    """Returns the load of each group of LoRA experts: one of MoLE, the teacher-specific and the general of MoLA.

    Returns:
      For each group ``name``, ``title``, ``of`` (for sentences), ``experts`` (headings), ``uniform`` (an even
      share), ``collapsed`` (layers where one expert takes `COLLAPSED` or more) and ``rows``: ``layer``,
      ``values``, ``keys`` (of the history), ``largest`` and ``collapsed``. Empty without routers.
    """
    last = _loads(run)
    layers, experts = (sorted({key[place] for key in last}, key=_order) for place in (0, 1))
    if not layers:
        return []
    adapter = run.config.get("student", {}).get("adapter", {})
    groups: list[tuple[str, str, Sequence[str], Sequence[str]]] = []
    if adapter.get("kind") == "mola":
        count = adapter["teacher_experts"]
        first, rest = experts[:count], experts[count:]
        names = [display_name(name) for name in run.experts[: len(first)]]
        titles = names + [f"teacher {place + 1}" for place in range(len(names), len(first))]
        groups.append(("teacher", "teacher-specific experts", first, titles))
        groups.append(("general", "general experts", rest, [f"general {place + 1}" for place in range(len(rest))]))
    else:
        groups.append(("mole", "LoRA experts", experts, [f"LoRA {name}" for name in experts]))
    return [_group(last, layers, *group, alone=len(groups) == 1) for group in groups if group[2]]


def _group(
    last: Mapping[tuple[str, str], float],
    layers: Sequence[str],
    name: str,
    title: str,
    experts: Sequence[str],
    headings: Sequence[str],
    *,
    alone: bool,
) -> dict[str, Any]:
    rows = []
    for layer in layers:
        values = [last.get((layer, expert), 0.0) for expert in experts]
        rows.append(
            {
                "layer": str(int(layer)) if layer.isdigit() else layer,
                "values": values,
                "keys": [f"router/load/{layer}/{expert}" for expert in experts],
                "largest": max(values),
                # One expert alone takes everything, and nothing can collapse.
                "collapsed": len(experts) > 1 and max(values) >= COLLAPSED,
            }
        )
    return {
        "name": name,
        "title": title,
        "of": "" if alone else f" among the {title}",
        "experts": list(headings),
        "rows": rows,
        "uniform": 1 / len(experts),
        "collapsed": [row["layer"] for row in rows if row["collapsed"]],
    }


def detaching(run: RunData) -> dict[str, Any] | None:
    """Returns the curve of score and latency over ever fewer experts, or None before `tove detach`.

    Returns:
      ``charts`` (name to SVG), ``contribution`` (a row an expert, the first to go first), ``rows`` (an encoder
      each, all experts first), ``note`` (what the latency counts) and ``calibration`` (pictures).
    """
    found = run.detach
    if not found:
        return None
    rows = found["rows"]
    places = [
        (str(len(row["attached"])), f"−\u00a0{display_name(row['detached'])}" if row["detached"] else "all")
        for row in rows
    ]
    said = {"knn": ("k-NN", "var(--student)"), "probe": ("linear probe", "var(--expert-0)")}
    curves = [
        plots.Curve(
            label,
            tint,
            [row[task] for row in rows],
            [row[f"{task}_low"] for row in rows],
            [row[f"{task}_high"] for row in rows],
        )
        for task, (label, tint) in said.items()
    ]
    result = {
        "scores": plots.place_chart(
            places, curves, "Held-out accuracy of encoders with ever fewer experts.", percent=True
        )
    }
    if all(row["text"] is not None for row in rows):
        text = [plots.Curve("", "var(--student)", [row["text"] for row in rows])]
        result["text"] = plots.place_chart(places, text, "Text loss of encoders with ever fewer experts.")
    if found["latency"]:
        times = [
            plots.Curve("with experts", "var(--student)", [row["total_ms"] for row in rows]),
            plots.Curve("encoder, gate", "var(--expert-0)", [row["encoder_ms"] for row in rows]),
        ]
        alt = "Milliseconds a batch of encoders with ever fewer experts."
        result["latency"] = plots.place_chart(places, times, alt, from_zero=True)
    shares = found["contribution"]
    return {
        "charts": result,
        "contribution": [
            {
                "name": display_name(name),
                "colour": colour(name, run.experts),
                "gate": shares[name]["gate"],
                "share": shares[name]["share"],
            }
            for name in found["order"]
        ],
        "rows": [
            {
                "count": len(row["attached"]),
                "detached": display_name(row["detached"]) if row["detached"] else "none",
                **{
                    task: {
                        "value": f"{100 * row[task]:.1f}",
                        "interval": f"{100 * row[f'{task}_low']:.1f} to {100 * row[f'{task}_high']:.1f}",
                    }
                    for task in said
                },
                "text": "" if row["text"] is None else f"{row['text']:.3f}",
                "latency": "" if row["total_ms"] is None else f"{row['total_ms']:.1f}",
            }
            for row in rows
        ],
        "latency": found["latency"],
        "calibration": found["pictures"]["calibration"],
    }


def answering(run: RunData) -> bool:
    """Returns whether a run has a language model, or was asked all the same."""
    return run.config.get("language", {}).get("kind", "none") != "none" or bool(run.tasks or run.asked)


def sections(run: RunData) -> list[tuple[str, str]]:
    """Returns the page's sections, id and heading in the bar; a run without settings has those of MoVE-KD."""
    name = method_name(run)
    adapter = run.config.get("student", {}).get("adapter", {}).get("kind", "")
    judged = "evaluation" not in run.missing
    # A run that answers is not asked for its features as well.
    shown = [("numbers", "Numbers")] if judged or not answering(run) else []
    shown += [("answers", "Answers")] if answering(run) else []
    shown += [("merge", "Merging")] if name == "merge" else []
    shown += [("training", "Training")]
    shown += [("experts", "Gate" if name == "tove" else "Experts")] if name != "merge" else []
    shown += [("detach", "Detaching")] if name == "tove" else []
    shown += [("routing", "Routing")] if adapter != "none" else []
    shown += [("attention", "Attention")]
    shown += (
        [("weights", "Tokens")] if any(panel.group == "weights" for one in run.pictures for panel in one.panels) else []
    )
    last = ("features", *(("evaluation",) if judged or not answering(run) else ()), "settings", "provenance")
    return [*shown, *[(name, name.capitalize()) for name in last]]
