"""Compares settings: trains each over the same seeds, and pairs the answers by seed and by held-out picture.

Layout of a comparison's folder::

    start/, features/               one start and one store of each expert, for all runs
    <row>/seed<k>/                  a run's folder, with eval/compared.json when it is done
    compare.json, compare.md        what `collect` finds, and its table
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.stats

from tove_jax import methods
from tove_jax.config.schema import Config
from tove_jax.config.sweep import Row, Sweep
from tove_jax.errors import InputError
from tove_jax.eval import bootstrap
from tove_jax.eval.run import evaluate_run
from tove_jax.experts.extract import claim
from tove_jax.experts.run import chosen_experts, extract_all
from tove_jax.files.atomic import atomic_write_json
from tove_jax.hf.start import start_folder
from tove_jax.train.checkpoint import FREE_FIELDS
from tove_jax.train.loop import train as train_run
from tove_jax.train.state import flatten

FORMAT = "tove_jax-compare-1"
TASKS = ("knn", "probe")
TITLES = {"knn": "k-NN", "probe": "linear probe"}


def settings_hash(config: Config) -> str:
    """Returns a hash of the settings that change a run's numbers: all but places, logging, mesh and title."""
    free = tuple(field.replace(".", "/") for field in FREE_FIELDS if field != "eval")
    kept = {
        name: value
        for name, value in flatten(dataclasses.asdict(config)).items()
        if not any(name == field or name.startswith(field + "/") for field in free)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def run_folder(workdir: Path | str, row: Row, seed: int) -> Path:
    """Returns the folder of one run."""
    return Path(workdir) / row.name / f"seed{seed}"


def run_config(workdir: Path | str, row: Row, seed: int) -> Config:
    """Returns the settings of one run: the row's with this seed, and the comparison's start and features."""
    workdir, config = Path(workdir), row.config
    return dataclasses.replace(
        config,
        title=f"{row.name}, seed {seed}",
        student=dataclasses.replace(config.student, initialize=config.student.initialize or str(workdir / "start")),
        features=dataclasses.replace(config.features, path=config.features.path or str(workdir / "features")),
        train=dataclasses.replace(config.train, seed=seed),
    )


def read_record(workdir: Path | str, row: Row, seed: int) -> dict[str, Any] | None:
    """Returns the record of a finished run, or None when it must be trained or judged (again).

    A record counts while the run's settings and its ``eval/predictions.json`` are those it was made of.
    """
    folder = run_folder(workdir, row, seed)
    try:
        record = json.loads((folder / "eval" / "compared.json").read_text(encoding="utf-8"))
        answers = _digest(folder)
    except (OSError, ValueError):
        return None
    expected = {"format": FORMAT, "config": settings_hash(run_config(workdir, row, seed)), "answers": answers}
    fits = isinstance(record, dict) and all(record.get(name) == value for name, value in expected.items())
    return record if fits else None


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "eval" / "predictions.json").read_bytes()).hexdigest()[:16]


def run_sweep(
    sweep: Sweep,
    workdir: Path | str,
    *,
    train: Callable[..., int] = train_run,
    evaluate: Callable[..., Any] = evaluate_run,
    extract: Callable[..., Any] = extract_all,
    progress: bool = True,
) -> int:
    """Extracts what the rows' experts lack, then trains and judges every run that is not done, seed by seed.

    A run that was stopped goes on from its checkpoint. All rows have a seed before the next one begins, so
    that a comparison that is stopped early is still one.

    Args:
      sweep: what to compare.
      workdir: the comparison's folder.
      train: ``train(config, folder, progress=...)``, an exit status.
      evaluate: ``evaluate(config, folder)``; writes ``metrics.json`` and ``eval/predictions.json`` there.
      extract: as `tove_jax.experts.run.extract_all`.
      progress: show bars.

    Returns:
      0 when all runs are done, else the status of the training that was stopped.

    Raises:
      InputError: another process is at work in the folder, a run there has other settings, or what training
        and evaluation raise.
      NonFiniteError: from training; the runs done before it are kept.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir: cannot make {workdir}: {error.strerror}") from None
    with claim(workdir / "compare.lock") as mine:
        if not mine:
            raise InputError(f"{workdir}: another `tove compare` is at work here")
        runs = [(row, seed) for seed in sweep.seeds for row in sweep.rows]
        pending = [(row, seed) for row, seed in runs if read_record(workdir, row, seed) is None]
        if pending:
            _prepare(sweep, workdir, extract, progress)
        for number, (row, seed) in enumerate(pending, len(runs) - len(pending) + 1):
            print(f"compare: run {number} of {len(runs)}: {row.name}, seed {seed}", file=sys.stderr)
            config, folder = run_config(workdir, row, seed), run_folder(workdir, row, seed)
            if status := train(config, folder, progress=progress):
                return status
            evaluate(config, folder)
            record = _record(row, seed, config, folder)
            atomic_write_json(folder / "eval" / "compared.json", record)
            jax.clear_caches()  # No row runs another's programs, and thirty runs' would stay in memory.
    return 0


def _prepare(sweep: Sweep, workdir: Path, extract: Callable[..., Any], progress: bool) -> None:
    """Makes the start and the features of every expert that a row learns from, once for all rows."""
    specs: dict[str, None] = {}
    for row in sweep.rows:
        read = methods.get(row.config.method.name).training_experts(row.config)
        specs.update(dict.fromkeys(chosen_experts(row.config, read).values()))
    first = sweep.rows[0].config
    config = dataclasses.replace(first, features=dataclasses.replace(first.features, experts=tuple(specs)))
    start_folder(config, workdir)
    extract(config, workdir, progress=progress)


def _record(row: Row, seed: int, config: Config, folder: Path) -> dict[str, Any]:
    """Returns what is known of a run that has just been judged, flat, JSON-ready."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    wanted = ("train/", "perf/", "eval/")
    return {
        "format": FORMAT,
        "row": row.name,
        "seed": seed,
        "config": settings_hash(config),
        "answers": _digest(folder),
        "pictures_seen": config.train.steps * config.train.batch,
        **{
            name: value
            for name, value in sorted(metrics.items())
            if name.startswith(wanted) and not name.endswith(("_std", "_low", "_high"))
        },
    }


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
      out), ``references`` (accuracy of the start, of raw pixels and of the commonest label), ``runs`` (a record
      each), ``rows`` (name, seeds, pictures_seen, and for both tasks mean, std over seeds (None for one), low and high over
      pictures) and ``differences`` (row, against, task, seeds, and the fields of `Difference`), over the seeds
      that both rows have.

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
    result = {
        "format": FORMAT,
        "baseline": sweep.baseline,
        "seeds": list(sweep.seeds),
        "missing": missing,
        "pictures": len(judged[1]),
        "references": _references(runs),
        "runs": runs,
        "rows": [_summary(row, right[row.name], resamples) for row in sweep.rows if row.name in right],
        "differences": [
            found
            for row in sweep.rows
            for against in dict.fromkeys((sweep.baseline, row.against))
            if against and against != row.name
            for task in TASKS
            if (found := _difference(row.name, against, task, right, resamples))
        ],
    }
    atomic_write_json(workdir / "compare.json", result)
    return result


def _references(runs: list[dict[str, Any]]) -> dict[str, float]:
    names = [f"{task}/{name}" for task in TASKS for name in ("init", "pixels")] + ["majority"]
    return {name: runs[0][f"eval/{name}"] for name in names if f"eval/{name}" in runs[0]}


def _summary(row: Row, seeds: Mapping[int, Mapping[str, np.ndarray]], resamples: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "row": row.name,
        "seeds": len(seeds),
        "pictures_seen": row.config.train.steps * row.config.train.batch,
    }
    spread = bootstrap.over_runs([{task: float(one[task].mean()) for task in TASKS} for one in seeds.values()])
    for task in TASKS:
        pictures = bootstrap.bootstrap_mean(np.mean([one[task] for one in seeds.values()], axis=0), resamples)
        result[f"{task}/mean"] = spread[f"{task}/mean"]
        result[f"{task}/std"] = spread[f"{task}/std"] if len(seeds) > 1 else None
        result |= {f"{task}/low": pictures.low, f"{task}/high": pictures.high}
    return result


def _difference(
    row: str, against: str, task: str, right: Mapping[str, Mapping[int, Mapping[str, np.ndarray]]], resamples: int
) -> dict[str, Any] | None:
    shared = [seed for seed in right.get(row, {}) if seed in right.get(against, {})]
    if not shared:
        return None
    ours, theirs = (np.stack([right[name][seed][task] for seed in shared]) for name in (row, against))
    return {
        "row": row,
        "against": against,
        "task": task,
        **dataclasses.asdict(paired_difference(ours, theirs, resamples)),
    }


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
    for name, title in (("init", "start"), ("pixels", "raw pixels")):
        if f"knn/{name}" in result["references"]:
            words = [title, "", ""]
            for task in TASKS:
                words += [f"{100 * result['references'][f'{task}/{name}']:.1f}", "", ""]
            cells.append(words)
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for number, row in enumerate(cells):
        padded = [
            cell.ljust(width) if column in (0, 4, 5, 7, 8) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip())
        if markdown and not number:
            lines.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines += ["", *_notes(result)]
    return "\n".join(lines)


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
        "95 % over pictures; then in how many seeds the row is above."
    ]
    if "majority" in result["references"]:
        notes[0] += f" Always the commonest label: {100 * result['references']['majority']:.1f} %."
    if result["missing"]:
        notes.append(f"Not done: {', '.join(result['missing'])}.")
    return notes
