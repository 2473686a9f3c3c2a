"""What a comparison found: rows paired by seed and by held-out picture, and the papers' orders held against it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from tove_jax.config.schema import MergeConfig
from tove_jax.config.sweep import Order, Row, Sweep
from tove_jax.errors import InputError
from tove_jax.eval import bootstrap
from tove_jax.eval.compare import FORMAT, read_record, read_references, run_folder
from tove_jax.eval.runner import TASKS, accuracy_names
from tove_jax.files.atomic import atomic_write_json

Answers = Mapping[str, Mapping[int, Mapping[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much more often one row is right than another, in shares (0.01 is one point).

    Attributes:
      mean: over seeds and pictures.
      std: of the seeds' differences, n - 1; None for a single seed.
      low, high: 95 % over pictures: the seeds' mean on each picture, pictures resampled as pairs.
      seed_low, seed_high: 95 % over seeds: Student's t of the seeds' differences; None for a single seed.
      seeds: how many.
      above: seeds in which the difference is above zero.
    """

    mean: float
    std: float | None
    low: float
    high: float
    seed_low: float | None
    seed_high: float | None
    seeds: int
    above: int


def paired_difference(first: np.ndarray, second: np.ndarray, resamples: int) -> Difference:
    """Compares two rows on the same seeds and pictures.

    Args:
      first: bool (seeds, pictures), whether the row's answer is right.
      second: bool, of the other row, in the same order.
      resamples: of the pictures, see `bootstrap.bootstrap_mean`.

    Raises:
      InputError: other shapes.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 2:
        raise InputError(
            f"paired difference: expected two arrays (seeds, pictures), found {first.shape}, {second.shape}"
        )
    by_seed = (first - second).mean(axis=1)
    pictures = bootstrap.paired_difference(first.mean(axis=0), second.mean(axis=0), resamples)
    mean, count = float(by_seed.mean()), len(by_seed)
    std, low, high = None, None, None
    if count > 1:
        std = float(by_seed.std(ddof=1))
        reach = float(scipy.stats.t.ppf(0.975, count - 1)) * std / count**0.5
        low, high = mean - reach, mean + reach
    return Difference(mean, std, pictures.low, pictures.high, low, high, count, int((by_seed > 0).sum()))


def collect(sweep: Sweep, workdir: Path | str) -> dict[str, Any]:
    """Reads the finished runs and compares them; writes ``<workdir>/compare.json``.

    Args:
      sweep: what to compare; runs that are not done are left out, and listed.
      workdir: the comparison's folder.

    Returns:
      What the JSON holds: ``baseline``, ``seeds``, ``missing`` (folders of runs not done), ``pictures`` (held
      out), ``references`` (accuracy of the start, of raw pixels, of the experts and of the commonest label),
      ``runs`` (a record each), ``rows`` (name, of, detached, merged, seeds, pictures_seen, and for both tasks mean,
      std over seeds (None for one), low and high over pictures), ``differences`` (row, against, task, seeds, and
      the fields of `Difference`), over the seeds that both rows have, and ``orders`` (source and verdict beside
      those of the difference "better minus worse", see `verdict`).

    Raises:
      InputError: no run is done, or two were judged on other pictures.
    """
    workdir = Path(workdir)
    runs: list[dict[str, Any]] = []
    missing: list[str] = []
    right: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    judged: tuple[Path, list[str], list[int]] | None = None
    for row in sweep.rows:
        for seed in sweep.seeds:
            folder, record = run_folder(workdir, row, seed), read_record(workdir, row, seed)
            if record is None:
                missing.append(folder.relative_to(workdir).as_posix())
                continue
            answers = json.loads((folder / "eval" / "predictions.json").read_text(encoding="utf-8"))
            judged = judged or (folder, answers["ids"], answers["truth"])
            if (answers["ids"], answers["truth"]) != judged[1:]:
                raise InputError(f"{folder}: was judged on other pictures than {judged[0]}: they cannot be paired")
            truth = np.asarray(answers["truth"])
            right.setdefault(row.name, {})[seed] = {
                task: np.asarray(answers[task]["student"]) == truth for task in TASKS
            }
            runs.append(record)
    if judged is None:
        raise InputError(f"{workdir}: no run of the comparison is done yet")
    resamples = sweep.rows[0].config.eval.resamples
    rows = {row.name: row for row in sweep.rows}
    result = {
        "format": FORMAT,
        "baseline": sweep.baseline,
        "seeds": list(sweep.seeds),
        "missing": missing,
        "pictures": len(judged[1]),
        "references": _references(read_references(sweep, workdir)),
        "runs": runs,
        "rows": [_summary(row, rows, right[row.name], resamples) for row in sweep.rows if row.name in right],
        "differences": [
            found
            for row in sweep.rows
            for against in dict.fromkeys((sweep.baseline, row.against))
            if against and against != row.name
            for task in TASKS
            if (found := _difference(row.name, against, task, right, resamples))
        ],
        "orders": [
            found for order in sweep.orders for task in TASKS if (found := _order(order, task, right, resamples))
        ],
    }
    atomic_write_json(workdir / "compare.json", result)
    return result


def verdict(found: Difference) -> str:
    """Says whether a difference that a paper found above zero is so here.

    Returns:
      ``yes`` when its 95 % interval over seeds (Student's t) lies above zero, ``no`` when below, ``unclear`` when
      it holds zero or there is a single seed.
    """
    if found.seed_low is None or found.seed_high is None:
        return "unclear"
    return "yes" if found.seed_low > 0 else "no" if found.seed_high < 0 else "unclear"


def _references(metrics: Mapping[str, float]) -> dict[str, float]:
    names = [f"{task}/{name}" for task in TASKS for name in accuracy_names(metrics)] + ["majority"]
    return {name: metrics[f"eval/{name}"] for name in names if f"eval/{name}" in metrics}


def _summary(
    row: Row, rows: Mapping[str, Row], seeds: Mapping[int, Mapping[str, np.ndarray]], resamples: int
) -> dict[str, Any]:
    merged = isinstance(row.config.method, MergeConfig)
    # A detached row has its run's training, a merged one its own after that.
    trained = (row, rows[row.of]) if merged and row.of else (row,)
    result: dict[str, Any] = {
        "row": row.name,
        "of": row.of,
        "detached": list(row.detached),
        "merged": merged,
        "seeds": len(seeds),
        "pictures_seen": sum(one.config.train.steps * one.config.train.batch for one in trained),
    }
    spread = bootstrap.over_runs([{task: float(one[task].mean()) for task in TASKS} for one in seeds.values()])
    for task in TASKS:
        pictures = bootstrap.bootstrap_mean(np.mean([one[task] for one in seeds.values()], axis=0), resamples)
        result[f"{task}/mean"] = spread[f"{task}/mean"]
        result[f"{task}/std"] = spread[f"{task}/std"] if len(seeds) > 1 else None
        result |= {f"{task}/low": pictures.low, f"{task}/high": pictures.high}
    return result


def _paired(row: str, against: str, task: str, right: Answers, resamples: int) -> Difference | None:
    shared = [seed for seed in right.get(row, {}) if seed in right.get(against, {})]
    if not shared:
        return None
    ours, theirs = (np.stack([right[name][seed][task] for seed in shared]) for name in (row, against))
    return paired_difference(ours, theirs, resamples)


def _difference(row: str, against: str, task: str, right: Answers, resamples: int) -> dict[str, Any] | None:
    found = _paired(row, against, task, right, resamples)
    return None if found is None else {"row": row, "against": against, "task": task, **dataclasses.asdict(found)}


def _order(order: Order, task: str, right: Answers, resamples: int) -> dict[str, Any] | None:
    found = _paired(order.above, order.below, task, right, resamples)
    named = {"worse": order.below, "better": order.above, "source": order.source, "task": task}
    return None if found is None else {**named, **dataclasses.asdict(found), "verdict": verdict(found)}
