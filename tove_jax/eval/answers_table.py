"""Several models' answers to one task side by side: accuracy by group, what needs no picture, paired differences.

Every number comes from the answers that `tove eval --tasks` keeps in a run's folder. Intervals are 95 % over pictures: all
questions about a picture are drawn together.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tove_jax.data.questions import GROUPS, majority_shares
from tove_jax.data.vqa import VqaRecord
from tove_jax.errors import InputError
from tove_jax.eval.bootstrap import Interval, bootstrap_clusters
from tove_jax.eval.tasks.vqa import exact_match

ALL = "all"
"""The column of all questions."""
RESAMPLES = 1000
NO_PICTURE_COUNT = 4
"""Questions a wording, on average, for its commonest answer to say what is known without a picture [choice of ours]."""


@dataclasses.dataclass(frozen=True)
class Told:
    """The kept answers of one run to one task.

    Attributes:
      path: of the file.
      settings: how they were answered, ``model`` among them.
      records: by the question's id, see `tove_jax.eval.answers`.
    """

    path: Path
    settings: Mapping[str, Any]
    records: Mapping[str, Mapping[str, Any]]


class Cell(NamedTuple):
    """A mean with its interval, and the number of questions it is over."""

    mean: float
    low: float
    high: float
    questions: int


def read_told(run: Path | str, task: str = "held_out") -> Told:
    """Reads ``<run>/eval/<task>.jsonl``.

    Raises:
      InputError: no such file, a damaged line, or no answer that was judged.
    """
    path = Path(run) / "eval" / f"{task}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: expected answers of `tove eval --tasks {task}=... --workdir {run}`: {error}"
        ) from error
    settings: Mapping[str, Any] = {}
    records: dict[str, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: expected JSON, cannot read it: {error}") from error
        if not isinstance(record, dict) or (number == 1 and not isinstance(record.get("settings"), dict)):
            raise InputError(f"{path}, line {number}: expected an object, the first with settings")
        if number == 1:
            settings = record["settings"]
        elif isinstance(record.get("score"), (int, float)):
            records[str(record.get("id"))] = record
    if not records:
        raise InputError(f"{path}: expected judged answers, found none; call `tove eval --tasks` again until it ends")
    return Told(path, settings, records)


def no_picture(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns by group what the commonest right answer to each wording scores, `ALL` of them among the groups.

    That is the most that can be known without a picture, for it is counted on these very questions. Groups are left out
    where wordings hardly repeat, answers are not judged by being equal to the right one, or have several right ones.
    """
    found: dict[str, list[VqaRecord]] = {}
    for record in records:
        right = record.get("right") or []
        answer = record.get("answer")
        exact = len(right) == 1 and isinstance(answer, str) and exact_match(answer, right) == record["score"]
        one = VqaRecord(str(record["id"]), None, str(record["prompt"]), tuple(right) if exact else ())
        found.setdefault(str(record.get("group", "")), []).append(one)
    shares, counts = {}, {}
    for group, asked in found.items():
        repeated = len(asked) >= NO_PICTURE_COUNT * len({one.question for one in asked})
        if repeated and all(one.answers for one in asked):
            counts[group], shares[group] = majority_shares(asked)[""]
    if len(shares) == len(found):
        total = sum(counts.values())
        shares[ALL] = sum(shares[group] * count for group, count in counts.items()) / total
    shares.pop("", None)
    return shares


def groups_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the groups in the order of columns, without `ALL`."""
    return ordered({str(record.get("group", "")) for record in records} - {""})


def ordered(groups: Iterable[str]) -> list[str]:
    """Returns groups in the order in which they are shown."""
    return sorted(groups, key=lambda name: (GROUPS.index(name) if name in GROUPS else len(GROUPS), name))


def cells(records: Sequence[Mapping[str, Any]], values: np.ndarray, resamples: int = RESAMPLES) -> dict[str, Cell]:
    """Returns the mean over all questions and over each group, with intervals over pictures.

    Args:
      records: their groups and pictures.
      values: (records,), such as their scores.
      resamples: of the bootstrap.
    """
    own = np.array([str(record.get("group", "")) for record in records])
    pictures = [str((record.get("pictures") or [record["id"]])[0]) for record in records]
    found = {}
    for group in (ALL, *groups_of(records)):
        counted = np.ones(len(own), bool) if group == ALL else own == group
        got: Interval = bootstrap_clusters(np.where(counted, values, np.nan), np.array(pictures), resamples)
        found[group] = Cell(got.mean, got.low, got.high, int(counted.sum()))
    return found


def _titles(runs: Sequence[Path]) -> list[str]:
    """Returns the runs' titles, or their folders' names where they have none or share one."""
    from tove_jax.train.checkpoint import load_settings

    names = [run.resolve().name for run in runs]
    titles = []
    for run, name in zip(runs, names, strict=True):
        try:
            titles.append(load_settings(run)[0].title or name)
        except InputError:
            titles.append(name)
    if len(set(titles)) == len(titles):
        return titles
    return names if len(set(names)) == len(names) else [run.as_posix() for run in runs]


def compare_answers(
    runs: Sequence[Path | str], task: str = "held_out", *, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Puts several runs' answers to one task side by side.

    Args:
      runs: folders, in the order of the rows.
      task: the name that its results are filed under.
      resamples: of the bootstrap over pictures.

    Returns:
      ``task``, ``groups`` (columns), ``runs`` (``title``, ``model``, ``cells`` by group: mean, low, high, questions),
      ``no_picture`` (see `no_picture`, of the questions that all runs answered) and ``differences`` of all pairs
      (``row`` minus ``against``, ``cells`` over the questions that both answered; no cell where there are none).

    Raises:
      InputError: no runs or one twice; what `read_told` refuses; answers given in other ways, or to another question under
        one id.
    """
    folders = [Path(run) for run in runs]
    if not folders or len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"answers: expected runs, each once, found {', '.join(map(str, runs)) or 'none'}")
    told = [read_told(folder, task) for folder in folders]
    titles = _titles(folders)
    for one in told[1:]:
        for name in sorted({*one.settings, *told[0].settings} - {"model"}):
            if one.settings.get(name) != told[0].settings.get(name):
                raise InputError(
                    f"{one.path}, line 1: settings.{name}: expected {told[0].settings.get(name)!r} as in {told[0].path}, "
                    f"found {one.settings.get(name)!r}; answer alike, or the numbers do not compare"
                )
    rows = [
        {"title": title, "model": one.settings.get("model", ""), "cells": _plain(_scored(one, resamples))}
        for title, one in zip(titles, told, strict=True)
    ]
    differences = [
        {"row": titles[later], "against": titles[first], "cells": _plain(_paired(told[later], told[first], resamples))}
        for first, later in itertools.combinations(range(len(told)), 2)
    ]
    shared = [record for id, record in told[0].records.items() if all(id in one.records for one in told[1:])]
    every = [record for one in told for record in one.records.values()]
    return {
        "task": task,
        "groups": [ALL, *groups_of(every)],
        "runs": rows,
        "no_picture": no_picture(shared),
        "differences": differences,
    }


def _scored(told: Told, resamples: int) -> dict[str, Cell]:
    records = list(told.records.values())
    return cells(records, np.array([record["score"] for record in records], np.float64), resamples)


def _paired(told: Told, against: Told, resamples: int) -> dict[str, Cell]:
    records, values = [], []
    for id, record in told.records.items():
        if (other := against.records.get(id)) is None:
            continue
        if record.get("asked") != other.get("asked"):
            raise InputError(f"{told.path}: question {id!r} is another one than in {against.path}")
        records.append(record)
        values.append(record["score"] - other["score"])
    return cells(records, np.array(values, np.float64), resamples) if records else {}


def _plain(found: Mapping[str, Cell]) -> dict[str, dict[str, Any]]:
    return {group: cell._asdict() for group, cell in found.items()}


def table(result: Mapping[str, Any]) -> str:
    """Returns what `compare_answers` found as two Markdown tables and what their numbers mean."""
    groups = result["groups"]
    heading = ["model", *(group.replace("_", " ") for group in groups)]
    first = [heading]
    first += [[row["title"], *(_cell(row["cells"].get(group)) for group in groups)] for row in result["runs"]]
    alone = result["no_picture"]
    if alone:
        first.append(["no picture", *(f"{100 * alone[group]:.1f}" if group in alone else "" for group in groups)])
    counts = [row["cells"].get(group, {}).get("questions", 0) for row in result["runs"] for group in groups]
    by_run = [counts[start : start + len(groups)] for start in range(0, len(counts), len(groups))]
    if all(one == by_run[0] for one in by_run):
        first.append(["questions", *(f"{count:,}" for count in by_run[0])])
    notes = [
        f"Task {result['task']}: right answers in per cent, in brackets 95 % over pictures (questions about a picture are "
        "drawn together)."
    ]
    if not all(one == by_run[0] for one in by_run):
        said = ", ".join(f"{row['title']} {one[0]:,}" for row, one in zip(result["runs"], by_run, strict=True))
        notes.append(f"Questions answered: {said}; differences are over those that both answered.")
    if alone:
        notes.append(
            "No picture: the commonest right answer to each wording, counted on these questions, the most that is known "
            "without looking."
        )
    lines = _aligned(first)
    if result["differences"]:
        second = [["difference in points", *heading[1:]]]
        second += [
            [f"{one['row']} − {one['against']}", *(_cell(one["cells"].get(group), "+") for group in groups)]
            for one in result["differences"]
        ]
        lines += ["", *_aligned(second)]
        notes.append("Differences are paired by question. One run each: other seeds would move them too.")
    return "\n".join([*lines, "", " ".join(notes)])


def _cell(cell: Mapping[str, Any] | None, sign: str = "") -> str:
    if not cell:
        return ""
    mean, low, high = (f"{100 * cell[name]:{sign}.1f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:]]
