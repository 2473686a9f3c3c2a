"""What a run answered: the tasks it was judged by, and a few pictures with question, answer and where it looked."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tove_jax.errors import InputError
from tove_jax.eval import answers_table
from tove_jax.eval.tasks.base import plain_name
from tove_jax.files.atomic import atomic_write_bytes, atomic_write_json
from tove_jax.report import plots

_ENDS = ("_std", "_low", "_high")
_SHOWN = 24
_COLOURS = 8


class Score(NamedTuple):
    """A metric of a task, as it is: shares from 0 to 1, MME's points.

    Attributes:
      name: of the metric.
      value: of it.
      low, high: its 95 % interval, or None.
      no_picture: what the commonest answer to each wording scores, or None where that says nothing.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    no_picture: float | None = None


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """An answered task.

    Attributes:
      task: its name.
      questions: answered ones.
      scores: its metrics, the main one first.
    """

    task: str
    questions: int
    scores: tuple[Score, ...]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about one picture.

    Attributes:
      id: of the picture.
      question: as the model read it.
      right: the right answer.
      answer: the model's.
      correct: whether they are equal, as the task `held_out` counts it.
      image: uint8 (S, S, 3), what the encoder saw.
      look: uint8 (S, S, 3), where the model looked for its answer laid over it; None: that could not be told.
      chance: the probability of the whole answer and its end; None as `look`.
    """

    id: str
    question: str
    right: str
    answer: str
    correct: bool
    image: np.ndarray
    look: np.ndarray | None = None
    chance: float | None = None


def read_scores(workdir: Path) -> tuple[TaskScores, ...]:
    """Reads the results of `tove eval --tasks` in a run's folder, by name of the task.

    Raises:
      InputError: a file that cannot be read, or kept answers that are damaged.
    """
    found = []
    for path in sorted((workdir / "eval").glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: expected JSON, cannot read it: {error}") from error
        if not isinstance(content, dict) or not {"task", "main", "questions", "metrics"} <= set(content):
            continue
        metrics, alone = content["metrics"], {}
        if any(name == "accuracy" or name.startswith("accuracy/") for name in metrics):
            alone = _no_picture(workdir, str(content["task"]))
        names = [name for name in metrics if not (name.endswith(_ENDS) and name.rpartition("_")[0] in metrics)]
        groups = answers_table.ordered(name.partition("/")[2] for name in names)
        names.sort(key=lambda name: (name != content["main"], groups.index(name.partition("/")[2])))
        scores = [
            Score(name, metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high"), alone.get(name))
            for name in names
        ]
        found.append(TaskScores(str(content["task"]), int(content["questions"]), tuple(scores)))
    return tuple(found)


def _no_picture(workdir: Path, task: str) -> dict[str, float]:
    """Returns what needs no picture by the name of the metric."""
    if not (workdir / "eval" / f"{task}.jsonl").exists():
        return {}
    told = answers_table.read_told(workdir, task)
    shares = answers_table.no_picture(list(told.records.values()))
    return {
        "accuracy" if group == answers_table.ALL else f"accuracy/{plain_name(group)}": share
        for group, share in shares.items()
    }


def task_tables(tasks: Sequence[TaskScores]) -> list[dict[str, Any]]:
    """Returns what the page shows of each task: ``task``, ``questions``, ``rows``, ``hidden`` (rows left out),
    ``alone`` (whether anything is known without a picture) and ``chart`` (accuracy by group, or "").
    """
    found = []
    for one in tasks:
        rows = []
        for score in one.scores[:_SHOWN]:
            scale = 1.0 if score.name.startswith("points/") else 100.0
            words = [
                "" if value is None else f"{scale * value:.1f}"
                for value in (score.value, score.low, score.high, score.no_picture)
            ]
            interval = f"{words[1]} to {words[2]}" if words[1] and words[2] else ""
            rows.append({"name": score.name, "value": words[0], "interval": interval, "no_picture": words[3]})
        by_group = {
            score.name.partition("/")[2]: score
            for score in one.scores
            if score.name.startswith("accuracy/") and score.low is not None
        }
        groups = [by_group[name] for name in answers_table.ordered(by_group)]
        chart = ""
        if 1 < len(groups) <= _COLOURS:
            curve = plots.Curve(
                "",
                "var(--student)",
                [score.value for score in groups],
                [score.low or 0.0 for score in groups],
                [score.high or 0.0 for score in groups],
            )
            chart = plots.cluster_chart(
                [_words(score.name.partition("/")[2]) for score in groups],
                [curve],
                f"Share of right answers to {one.task} by group.",
                references=[score.no_picture for score in groups],
            )
        alone = any(row["no_picture"] for row in rows)
        hidden = len(one.scores) - len(rows)
        found.append(
            {
                "task": one.task,
                "questions": one.questions,
                "rows": rows,
                "hidden": hidden,
                "alone": alone,
                "chart": chart,
            }
        )
    return found


def _words(group: str) -> str:
    return group.replace("_", " ")


def draw(result: Mapping[str, Any]) -> str:
    """Draws what `answers_table.compare_answers` found: bars by group, a colour a run; an SVG file's text."""
    groups = result["groups"]

    def values(cells: Mapping[str, Mapping[str, float]], name: str) -> list[float]:
        return [cells[group][name] if group in cells else math.nan for group in groups]

    curves = [
        plots.Curve(
            row["title"],
            f"var(--expert-{number % _COLOURS})",
            values(row["cells"], "mean"),
            values(row["cells"], "low"),
            values(row["cells"], "high"),
        )
        for number, row in enumerate(result["runs"])
    ]
    said = ", ".join(f"{row['title']} {100 * row['cells'][answers_table.ALL]['mean']:.1f} %" for row in result["runs"])
    alone = result["no_picture"]
    chart = plots.cluster_chart(
        [_words(group) for group in groups],
        curves,
        f"Share of right answers to {result['task']}: {said}.",
        references=[alone.get(group) for group in groups],
        width=760,
    )
    note = "lines: 95 % over pictures" + ("; dashed: what is known without a picture" if alone else "")
    return plots.sheet([(f"Right answers, {_words(result['task'])}\n{note}", chart)])


def write_comparison(runs: Sequence[Path], task: str = "held_out", folder: Path | None = None) -> str:
    """Compares several runs' answers; writes ``answers_<task>.json``, ``.md`` and ``.svg``.

    Args:
      runs: folders, in the order of the rows.
      task: the name that its results are filed under.
      folder: where the files go; None: the folder that the first run lies in.

    Returns:
      The table, Markdown.

    Raises:
      InputError: as `answers_table.compare_answers`.
    """
    result = answers_table.compare_answers(runs, task)
    text = answers_table.table(result)
    name = (folder or runs[0].resolve().parent) / f"answers_{task}"
    name.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(name.with_suffix(".json"), result)
    atomic_write_bytes(name.with_suffix(".md"), f"{text}\n".encode())
    atomic_write_bytes(name.with_suffix(".svg"), draw(result).encode())
    return text
