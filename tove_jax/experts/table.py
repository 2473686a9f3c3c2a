"""The table of experts, printed from their cards: for the command line and the docs."""

from __future__ import annotations

from collections.abc import Mapping

from tove_jax.experts.base import ExpertCard
from tove_jax.experts.registry import cards

COLUMNS = (
    "name",
    "expert",
    "paper",
    "weights",
    "licence",
    "input",
    "tokens",
    "width",
    "parameters",
    "runs in",
    "checked against",
)
SHORT = ("name", "expert", "licence", "input", "tokens", "width", "parameters", "runs in")
_RUNS = {"jax": "JAX", "host": "host (ONNX runtime)"}


def row(card: ExpertCard) -> dict[str, str]:
    """Returns one expert's cells, by column."""
    view = card.view
    return {
        "name": card.name,
        "expert": card.title,
        "paper": card.paper,
        "weights": card.weights,
        "licence": card.licence,
        "input": f"{view.size} px, {view.fit}, {view.interpolation}",
        "tokens": f"{card.grid[0]} x {card.grid[1]}" + (" + summary" if card.summary_width else ""),
        "width": str(card.width),
        "parameters": f"{card.parameters / 1e6:.1f} M" if card.parameters else "as the weights",
        "runs in": _RUNS[card.backend],
        "checked against": card.checked_against,
    }


def markdown(known: Mapping[str, ExpertCard] | None = None) -> str:
    """Returns a Markdown table of the given experts; of all registered ones when None."""
    rows = [row(card) for card in (cards() if known is None else known).values()]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for cells in rows:
        lines.append("| " + " | ".join(_escape(cells, column) for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def _escape(cells: Mapping[str, str], column: str) -> str:
    text = cells[column].replace("|", "\\|")
    return f"`{text}`" if column == "name" else text


def plain(known: Mapping[str, ExpertCard] | None = None) -> str:
    """Returns a table for a terminal, aligned, with the columns that fit one."""
    rows = [dict(zip(SHORT, SHORT, strict=True))]
    rows += [row(card) for card in (cards() if known is None else known).values()]
    widths = {column: max(len(cells[column]) for cells in rows) for column in SHORT}
    lines = ["  ".join(cells[column].ljust(widths[column]) for column in SHORT).rstrip() for cells in rows]
    return "\n".join(lines) + "\n"
