"""The plot of a comparison: every row's accuracies with their intervals, as one SVG file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tove_jax.report import plots

_TASKS = {"knn": "k nearest neighbours", "probe": "a linear probe"}


def draw(result: Mapping[str, Any]) -> str:
    """Draws what `tove_jax.eval.compare.collect` found, a chart a task.

    Args:
      result: of `collect`; its rows' ``{task}/mean``, ``low`` and ``high`` are drawn, the start as a dashed line.

    Returns:
      The text of an SVG file.
    """
    charts = []
    for task, words in _TASKS.items():
        rows = []
        for row in result["rows"]:
            first = row["row"] == result["baseline"]
            colour = "var(--pixels)" if first else "var(--source)" if row["of"] else "var(--student)"
            rows.append(plots.Bar(row["row"], colour, *(row[f"{task}/{name}"] for name in ("mean", "low", "high"))))
        start = result["references"].get(f"{task}/init")
        said = ", ".join(f"{row.name} {100 * row.value:.1f} %" for row in rows)
        alt = f"Held-out accuracy by {words}: {said}."
        chart = plots.dot_chart(rows, alt, reference=None if start is None else ("start", start))
        counts = {row["seeds"] for row in result["rows"]}
        seeds = "one seed" if counts == {1} else "mean over seeds"
        dashed = "" if start is None else "; dashed: the start"
        derived = "; blue: made of another row's runs" if any(row["of"] for row in result["rows"]) else ""
        charts.append((f"Accuracy by {words}\n{seeds}, 95 % over pictures{dashed}{derived}", chart))
    return plots.sheet(charts)
