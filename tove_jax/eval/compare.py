"""Compares settings: trains each over the same seeds, and judges every run on the same held-out pictures.

Layout of a comparison's folder::

    start/, features/               one start and one store of each expert, for all runs
    references.json                 pixels, the start and the experts, judged once for all runs
    start-run/                      the run that made the start, where the sweep has one
    <row>/seed<k>/                  a run's folder, with eval/compared.json when it is done
    compare.json, compare.md        what `tove_jax.eval.comparison.collect` finds, and its table

A derived row has no training of its own (experts detached: the run of its row is judged without them) or a short
one (merged: the run of its row is distilled into a plain tower). Its folders look like every other row's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tove_jax import methods
from tove_jax.config.schema import Config, MergeConfig
from tove_jax.config.sweep import SHARED, Row, Sweep
from tove_jax.errors import InputError
from tove_jax.eval.run import Ground, evaluate_run, prepare_ground
from tove_jax.experts.extract import claim
from tove_jax.experts.run import chosen_experts, extract_all
from tove_jax.files.atomic import atomic_write_json
from tove_jax.hf.export import save_start
from tove_jax.hf.start import start_folder
from tove_jax.train.checked import FREE_FIELDS
from tove_jax.train.checkpoint import load_student
from tove_jax.train.loop import train as train_run
from tove_jax.train.state import flatten

FORMAT = "tove_jax-compare-2"


def settings_hash(config: Config) -> str:
    """Returns a hash of the settings that change a run's numbers: all but places, logging, mesh and title."""
    return _hash(config, ("",))


def ground_hash(config: Config) -> str:
    """Returns a hash of the settings that change what all rows share: `SHARED` but for places."""
    return _hash(config, SHARED)


def _hash(config: Config, sections: tuple[str, ...]) -> str:
    free = [field for field in FREE_FIELDS if field != "eval"]
    kept = {
        name: value
        for name, value in flatten(dataclasses.asdict(config)).items()
        if _inside(name, sections) and not _inside(name, free)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _inside(name: str, sections: Any) -> bool:
    return any(not one or f"{name}/".startswith(one.replace(".", "/") + "/") for one in sections)


def run_folder(workdir: Path | str, row: Row | str, seed: int) -> Path:
    """Returns the folder of one run."""
    return Path(workdir) / (row if isinstance(row, str) else row.name) / f"seed{seed}"


def run_config(workdir: Path | str, row: Row, seed: int) -> Config:
    """Returns the settings of one run: the row's with this seed, and the comparison's start and features."""
    workdir, config = Path(workdir), row.config
    method = config.method
    if isinstance(method, MergeConfig) and row.of:
        method = dataclasses.replace(method, source=str(run_folder(workdir, row.of, seed)))
    return dataclasses.replace(
        config,
        title=f"{row.name}, seed {seed}",
        method=method,
        student=dataclasses.replace(config.student, initialize=config.student.initialize or str(workdir / "start")),
        features=dataclasses.replace(config.features, path=config.features.path or str(workdir / "features")),
        # Only the last checkpoint is looked at, and forty runs' would fill a disk.
        train=dataclasses.replace(config.train, seed=seed, keep=1),
    )


def read_record(workdir: Path | str, row: Row, seed: int) -> dict[str, Any] | None:
    """Returns the record of a finished run, or None when it must be trained or judged (again).

    A record counts while the run's settings and its ``eval/predictions.json`` are those it was made of; that of
    a derived row also while the answers of the run it was made of are.
    """
    folder = run_folder(workdir, row, seed)
    try:
        record = json.loads((folder / "eval" / "compared.json").read_text(encoding="utf-8"))
        expected = _stamp(workdir, row, seed)
    except (OSError, ValueError):
        return None
    fits = isinstance(record, dict) and all(record.get(name) == value for name, value in expected.items())
    return record if fits else None


def _stamp(workdir: Path | str, row: Row, seed: int) -> dict[str, str]:
    """Returns what a record must agree with."""
    stamp = {
        "format": FORMAT,
        "config": settings_hash(run_config(workdir, row, seed)),
        "answers": _digest(run_folder(workdir, row, seed)),
    }
    return stamp | ({"of": row.of, "of_answers": _digest(run_folder(workdir, row.of, seed))} if row.of else {})


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "eval" / "predictions.json").read_bytes()).hexdigest()[:16]


class State(NamedTuple):
    """One run of a comparison and how far it is.

    Attributes:
      row: which.
      seed: which.
      done: whether its record counts, and that of the run it is derived of.
      step: the newest saved step of its training; None when there is none, or nothing to train.
    """

    row: Row
    seed: int
    done: bool
    step: int | None


def states(sweep: Sweep, workdir: Path | str) -> list[State]:
    """Returns every run in the order in which `run_sweep` takes them; reads, and writes nothing."""
    result: list[State] = []
    for seed in sweep.seeds:
        done: dict[str, bool] = {}
        for row in sweep.rows:
            done[row.name] = read_record(workdir, row, seed) is not None and done.get(row.of, True)
            folder = run_folder(workdir, row, seed) / "checkpoints"
            steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
            result.append(State(row, seed, done[row.name], max(steps, default=None)))
    return result


def run_sweep(
    sweep: Sweep,
    workdir: Path | str,
    *,
    train: Callable[..., int] = train_run,
    evaluate: Callable[..., Any] = evaluate_run,
    extract: Callable[..., Any] = extract_all,
    ground: Callable[[Config, Path], Ground] = prepare_ground,
    progress: bool = True,
    part: bool = False,
) -> int:
    """Makes the start and what the rows' experts lack, then trains and judges every run that is not done.

    A run that was stopped goes on from its checkpoint. All rows have a seed before the next one begins, so
    that a comparison that is stopped early is still one. A start that is trained is trained once, with the file's seed.

    Args:
      sweep: what to compare.
      workdir: the comparison's folder.
      train: ``train(config, folder, progress=...)``, an exit status.
      evaluate: ``evaluate(config, folder, run=..., ground=...)``, see `evaluate_run`; writes ``metrics.json`` and
        ``eval/predictions.json`` there.
      extract: as `tove_jax.experts.run.extract_all`.
      ground: judges what all rows share, see `prepare_ground`.
      progress: show bars.
      part: others are at work on other runs of the same folder; the start is made by whoever comes first.

    Returns:
      0 when all runs are done, else the status of the training that was stopped.

    Raises:
      InputError: another process is at work in the folder, or on one of the runs, a run there has other settings,
        or what training and evaluation raise.
      NonFiniteError: from training; the runs done before it are kept.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir: cannot make {workdir}: {error.strerror}") from None
    with contextlib.ExitStack() as claims:
        if not part and not claims.enter_context(claim(workdir / "compare.lock")):
            raise InputError(f"{workdir}: another `tove compare` is at work here")
        runs = states(sweep, workdir)
        for one in runs:
            folder = run_folder(workdir, one.row, one.seed)
            folder.mkdir(parents=True, exist_ok=True)
            if not claims.enter_context(claim(folder / "run.lock")):
                raise InputError(f"{folder}: another process is at work here")
        if all(one.done for one in runs):
            return 0
        with claim(workdir / "compare-start.lock", wait=True):
            if status := _make_start(sweep, workdir, train, extract, progress):
                return status
            start_folder(_shared_config(sweep, workdir), workdir)
        shared = _prepare(sweep, workdir, extract, ground, progress)
        for number, (row, seed, *_) in enumerate(runs, 1):
            # Asked again: the run that a derived one was made of may have answered otherwise this time.
            if read_record(workdir, row, seed) is not None:
                continue
            print(f"compare: run {number} of {len(runs)}: {row.name}, seed {seed}", file=sys.stderr)
            config, folder = run_config(workdir, row, seed), run_folder(workdir, row, seed)
            trained = run_folder(workdir, row.of, seed) if row.detached else None
            if trained is None and (status := train(config, folder, progress=progress)):
                return status
            evaluate(config, folder, run=trained, ground=shared)
            atomic_write_json(folder / "eval" / "compared.json", _record(workdir, row, seed, config))
            # No row runs another's programs, and forty runs' would stay in memory.
            jax.clear_caches()
            gc.collect()
    return 0


def _make_start(
    sweep: Sweep, workdir: Path, train: Callable[..., int], extract: Callable[..., Any], progress: bool
) -> int:
    """Trains the tower that all rows start from, where the sweep has settings for it, and keeps it in ``start``.

    Returns:
      0, or the status of a training that was stopped.

    Raises:
      InputError: the start that is there was made in another way.
    """
    start, folder, made = workdir / "start", workdir / "start-run", workdir / "start.json"
    wanted = {"format": FORMAT, "config": settings_hash(sweep.start) if sweep.start else ""}
    if start.exists():
        found = json.loads(made.read_text(encoding="utf-8")) if made.is_file() else wanted | {"config": ""}
        if found != wanted:
            raise InputError(
                f"{start}: expected the start that the sweep's settings make, found one made in another way; "
                "its runs cannot be gone on with: take another --workdir"
            )
        return 0
    if sweep.start is None:
        return 0
    config = dataclasses.replace(sweep.start, title=sweep.start.title or "start")
    print("compare: the start of all rows", file=sys.stderr)
    extract(config, folder, progress=progress)
    if status := train(config, folder, progress=progress):
        return status
    stored, params, _ = load_student(folder)
    atomic_write_json(made, wanted)
    student = dataclasses.replace(stored.student, initialize=str(folder))
    save_start(dataclasses.replace(stored, student=student), params["student"], start)
    jax.clear_caches()
    return 0


def _prepare(
    sweep: Sweep,
    workdir: Path,
    extract: Callable[..., Any],
    ground: Callable[[Config, Path], Ground],
    progress: bool,
) -> Ground:
    """Makes the features of every expert that a row learns from, and judges them, once for all rows."""
    config = _shared_config(sweep, workdir)
    extract(config, workdir, progress=progress)
    shared = ground(config, workdir)
    with claim(workdir / "references.lock", wait=True):
        # Parts of a sweep judge the experts of their own rows, and add them to what the others found.
        metrics = read_references(sweep, workdir) | dict(shared.metrics)
        record = {"format": FORMAT, "config": ground_hash(config), "metrics": metrics}
        atomic_write_json(workdir / "references.json", record)
    return shared


def _shared_config(sweep: Sweep, workdir: Path) -> Config:
    """Returns settings with every expert that a row learns from; the seed of the start is the file's."""
    specs: dict[str, None] = {}
    for row in sweep.rows:
        read = methods.get(row.config.method.name).training_experts(row.config)
        specs.update(dict.fromkeys(chosen_experts(row.config, read).values()))
    row = sweep.rows[0]
    return dataclasses.replace(
        run_config(workdir, row, row.config.train.seed),
        student=row.config.student,
        features=dataclasses.replace(row.config.features, experts=tuple(specs)),
    )


def read_references(sweep: Sweep, workdir: Path | str) -> dict[str, float]:
    """Returns the metrics of what all rows share, as `run_sweep` left them; empty when they are of other settings."""
    try:
        record = json.loads((Path(workdir) / "references.json").read_text(encoding="utf-8"))
        fits = record["format"] == FORMAT and record["config"] == ground_hash(sweep.rows[0].config)
        return dict(record["metrics"]) if fits else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _record(workdir: Path, row: Row, seed: int, config: Config) -> dict[str, Any]:
    """Returns what is known of a run that has just been judged, flat, JSON-ready."""
    metrics = json.loads((run_folder(workdir, row, seed) / "metrics.json").read_text(encoding="utf-8"))
    wanted = ("train/", "perf/", "eval/")
    return {
        "row": row.name,
        "seed": seed,
        **_stamp(workdir, row, seed),
        "pictures_seen": config.train.steps * config.train.batch,
        **{
            name: value
            for name, value in sorted(metrics.items())
            if name.startswith(wanted) and not name.endswith(("_std", "_low", "_high"))
        },
    }
