"""The table of a comparison, as plain text or Markdown, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tove_jax.eval.compare import State
from tove_jax.eval.runner import TASKS

ORDERS = (
    "Reproduced: the difference, better minus worse in the paper, is the mean over seeds ± its standard deviation, "
    "in points. Yes: its 95 % interval over seeds (Student's t) lies above zero; no: below; unclear: it holds zero, or "
    "there is one seed."
)
TITLES = {"knn": "k-NN", "probe": "linear probe"}


def table(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """Returns what `collect` found as one table, in points of accuracy, and what its numbers mean.

    Args:
      result: of `collect`.
      markdown: with bars between the cells, in place of plain aligned text.
    """
    baseline = result["baseline"]
    header = ["row", "seeds", "pictures seen"]
    for task in TASKS:
        header += [f"{TITLES[task]}, %", f"minus {baseline}", "minus its step before"]
    cells = [header]
    found = {(one["row"], one["against"], one["task"]): one for one in result["differences"]}
    for row in result["rows"]:
        words = [row["row"], str(row["seeds"]), f"{row['pictures_seen']:,}"]
        for task in TASKS:
            words.append(f"{100 * row[f'{task}/mean']:.1f}{_spread(row[f'{task}/std'])}")
            words.append(_cell(found.get((row["row"], baseline, task))))
            steps = [
                one
                for (name, other, of), one in found.items()
                if (name, of) == (row["row"], task) and other != baseline
            ]
            words.append(f"{steps[0]['against']}: {_cell(steps[0])}" if steps else "")
        cells.append(words)
    for name in (key.removeprefix("knn/") for key in result["references"] if key.startswith("knn/")):
        words = [{"init": "start", "pixels": "raw pixels"}.get(name, name), "", ""]
        for task in TASKS:
            words += [f"{100 * result['references'][f'{task}/{name}']:.1f}", "", ""]
        cells.append(words)
    lines = [*_aligned(cells, (0, 4, 5, 7, 8), markdown), "", *_notes(result)]
    if result["orders"]:
        lines += ["", *_aligned(_orders(result), (0, 2, 4), markdown), "", ORDERS]
    return "\n".join(lines)


def runs_table(runs: Sequence[State]) -> str:
    """Returns every run of a comparison with how far it is, as plain text.

    Args:
      runs: of `tove_jax.eval.compare.states`.
    """
    cells = [("row", "seed", "made by", "state")]
    for row, seed, done, step in runs:
        steps = row.config.train.steps
        made = f"detaching {', '.join(row.detached)} from {row.of}" if row.detached else f"{steps} steps"
        made = f"merging {row.of}, {made}" if row.of and not row.detached else made
        state = "done" if done else "pending"
        if not done and step is not None:
            state += f", saved at step {step} of {steps}"
        cells.append((row.name, str(seed), made, state))
    count = sum(run.done for run in runs)
    return "\n".join([*_aligned(cells, (0, 2, 3), False), "", f"{count} of {len(runs)} runs are done"])


def _aligned(cells: Sequence[Sequence[str]], left: Sequence[int], markdown: bool) -> list[str]:
    """Returns rows of equal width; the columns of `left` begin at the left."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for number, row in enumerate(cells):
        padded = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip())
        if markdown and not number:
            sides = [
                "-" * (width + 2) if column in left else "-" * (width + 1) + ":" for column, width in enumerate(widths)
            ]
            lines.append("|" + "|".join(sides) + "|")
    return lines


def _orders(result: Mapping[str, Any]) -> list[list[str]]:
    """Returns the papers' orders, both tasks in a row."""
    header = ["order in the paper"]
    for task in TASKS:
        header += [f"{TITLES[task]}: difference", "reproduced"]
    cells: dict[tuple[str, str, str], list[str]] = {}
    for one in result["orders"]:
        words = f"{one['worse']} < {one['better']}" + (f" ({one['source']})" if one["source"] else "")
        row = cells.setdefault((one["worse"], one["better"], one["source"]), [words])
        spread = _spread(one["std"])
        row += [f"{100 * one['mean']:+.1f}{spread}, above in {one['above']} of {one['seeds']}", one["verdict"]]
    return [header, *cells.values()]


def _spread(std: float | None) -> str:
    return "" if std is None else f" ± {100 * std:.1f}"


def _cell(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    interval = f"{100 * one['low']:+.1f} to {100 * one['high']:+.1f}"
    return f"{100 * one['mean']:+.1f}{_spread(one['std'])} ({interval}), {one['above']} of {one['seeds']}"


def _notes(result: Mapping[str, Any]) -> list[str]:
    seeds = ", ".join(str(seed) for seed in result["seeds"])
    notes = [
        f"Seeds {seeds}; {result['pictures']} held-out pictures; all rows have one start and one set of features. "
        "After ±: standard deviation over seeds. Differences are paired by seed and picture, in points; in brackets "
        "95 % over pictures; then in how many seeds the row is above. A derived row is compared with the row it is of."
    ]
    if "majority" in result["references"]:
        notes[0] += f" Always the commonest label: {100 * result['references']['majority']:.1f} %."
    for row in result["rows"]:
        if row["detached"]:
            notes.append(f"{row['row']}: the runs of {row['of']}, judged without {', '.join(row['detached'])}.")
        elif row["merged"] and row["of"]:
            notes.append(
                f"{row['row']}: the runs of {row['of']}, distilled into a plain tower; the pictures of both are counted."
            )
    if result["missing"]:
        notes.append(f"Not done: {', '.join(result['missing'])}.")
    return notes
