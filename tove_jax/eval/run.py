"""Evaluates runs: builds the predict functions from a run's folder and writes what the runner found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tove_jax import methods
from tove_jax.config.derive import attached_experts, detach
from tove_jax.config.schema import Config, MergeConfig
from tove_jax.data.picture import PictureSource
from tove_jax.errors import InputError
from tove_jax.eval import bootstrap, merge, predictors, runner
from tove_jax.eval.metrics_file import is_of_features, replace_metrics
from tove_jax.experts.computed import open_or_compute
from tove_jax.files import mirror
from tove_jax.files.atomic import atomic_write_json
from tove_jax.parallel import together
from tove_jax.train.checkpoint import load_student
from tove_jax.train.initial import start_parameters


def with_stored_settings(stored: Config, config: Config | None) -> Config:
    """Returns what was trained, evaluated as `config` says.

    Args:
      stored: the settings in the checkpoint; they decide student, method, experts and split.
      config: gives `eval`, and where things lie on this machine: `features.path`, `data.path`,
        `data.images`, `data.annotations`, `data.cache`, `student.initialize`. None: everything as stored. A merge uses the
        features and the start of its source, so there an empty path is as stored.
    """
    if config is None:
        return stored
    data = {name: getattr(config.data, name) for name in ("path", "images", "annotations", "cache", "threads")}
    features, start = config.features.path, config.student.initialize
    if isinstance(stored.method, MergeConfig):
        features, start = features or stored.features.path, start or stored.student.initialize
    return dataclasses.replace(
        stored,
        eval=config.eval,
        data=dataclasses.replace(stored.data, **data),
        features=dataclasses.replace(stored.features, path=features),
        student=dataclasses.replace(stored.student, initialize=start),
    )


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all runs of one comparison share: pictures, their cut views, and everyone judged but the students.

    Attributes:
      source: the pictures.
      train: numbers of the training pictures.
      held_out: numbers of the judged ones.
      views: the student's view of them.
      references: pixels, the start and the experts, scored once.
      metrics: their numbers, as `runner.score` names them.
    """

    source: PictureSource
    train: list[int]
    held_out: list[int]
    views: predictors.Views
    references: Mapping[str, runner.Scored]
    metrics: Mapping[str, float]


def prepare_ground(config: Config, workdir: Path | str) -> Ground:
    """Judges all that runs with the same pictures, start and experts have in common.

    Args:
      config: gives pictures, evaluation, the student's view and shape, the start, and the experts.
      workdir: where features and start lie unless the settings say.
    """
    workdir = Path(workdir)
    source, train, held_out = predictors.run_folder_source(config)
    views = predictors.views_of(config, source)
    start = start_parameters(config, workdir)
    stores = open_or_compute(config, workdir, source)
    functions = predictors.reference_predictors(config, start, views, source, stores)
    found = runner.score(functions, source.labels, train, held_out, config.eval)
    return Ground(source, train, held_out, views, found.scored, found.metrics)


def evaluate_run(
    config: Config | None,
    workdir: Path | str,
    *,
    step: int | None = None,
    run: Path | str | None = None,
    ground: Ground | None = None,
) -> dict[str, float]:
    """Evaluates a run's checkpoint.

    Writes ``eval/`` metrics into ``<workdir>/metrics.json``, where other metrics stay, and every
    single answer into ``<workdir>/eval/predictions.json``. Several processes share the pictures whose features are
    judged; the first writes.

    Args:
      config: evaluation settings and places, see `with_stored_settings`; None: those of the run.
      workdir: the run's folder.
      step: a saved step; the newest when None.
      run: folder of the checkpoint, when that is not `workdir`. A ToVE run is then judged with the experts
        attached that `config` names, and the others detached.
      ground: what was judged before. Then only the student runs, and its numbers alone are written.

    Returns:
      The metrics of `runner.evaluate`, ``eval/feature_error/{expert}`` and ``eval/step``; of a merge also
      ``eval/merge/error/{merged,tower}``, see `merge.token_errors`.

    Raises:
      InputError: no checkpoint, no features, or pictures without labels.
    """
    workdir = Path(workdir)
    stored, params, provenance = load_student(Path(run or workdir), step)
    if run is not None and config is not None and (attached := attached_experts(stored)):
        stored = detach(stored, [name for name in attached if name not in attached_experts(config)])
    config = with_stored_settings(stored, config)
    if ground is None:
        source, train, held_out = predictors.run_folder_source(config)
        views = predictors.views_of(config, source)
    else:
        source, train, held_out, views = ground.source, ground.train, ground.held_out, ground.views
    read = methods.get(config.method.name).training_experts(config)
    stores, functions = open_or_compute(config, workdir, source, read), {}
    if ground is None:
        functions = predictors.reference_predictors(config, start_parameters(config, workdir), views, source, stores)
    patches = predictors.deployed(config, params, views, source, stores)
    functions["student"] = predictors.student_predictor(config, params["student"], views, patches)
    lost: dict[str, float] = {}
    if isinstance(config.method, MergeConfig):
        target, predictor = merge.source_tokens(config, params["teacher"], views, source, stores)
        if ground is None:
            functions["source"] = predictor
        lost = merge.token_errors(config, params["teacher"], views, patches, target, held_out)
    references = None if ground is None else ground.references
    found = runner.score(functions, source.labels, train, held_out, config.eval, references)
    metrics = dict(found.metrics)
    errors = predictors.feature_errors(config, params.get("method", {}), patches, source, stores, held_out)
    metrics.update({f"eval/feature_error/{name}": value for name, value in errors.items()})
    metrics.update({f"eval/merge/error/{name}": value for name, value in lost.items()})
    metrics["eval/step"] = int(provenance["step"])
    number = {name: position for position, name in enumerate(found.classes)}
    answers = {
        task: {name: [number[label] for label in labels] for name, labels in by_name.items()}
        for task, by_name in found.predictions.items()
    }
    record = {
        "classes": list(found.classes),
        "ids": [source.ids[index] for index in found.held_out],
        "truth": [number[label] for label in found.truth],
        **answers,
    }
    if together.is_first() or mirror.mirror_of(workdir) is not None:  # a mirror is this process's own
        atomic_write_json(workdir / "eval" / "predictions.json", record, indent=None)
        write_metrics(workdir, metrics)
    together.barrier("evaluated")  # the others may read what is written
    return metrics


def evaluate_runs(config: Config | None, workdirs: Sequence[Path | str]) -> dict[str, float]:
    """Evaluates several runs of one setting, usually seeds, and their spread.

    Args:
      config: as in `evaluate_run`, for each.
      workdirs: the runs' folders; the first gets the summary beside its own metrics.

    Returns:
      ``eval/seeds/count`` and, for each accuracy, difference and error,
      ``eval/seeds/{knn/student, ...}/{mean,std}`` (sample standard deviation).

    Raises:
      InputError: as `evaluate_run`, or the runs were evaluated on different pictures.
    """
    runs = [evaluate_run(config, workdir) for workdir in workdirs]
    held_out = {Path(workdir): _judged(Path(workdir)) for workdir in workdirs}
    first = Path(workdirs[0])
    for workdir, ids in held_out.items():
        if ids != held_out[first]:
            raise InputError(f"{workdir}: was judged on other pictures than {first}: the spread would mean nothing")
    summary = bootstrap.over_runs([_plain(metrics) for metrics in runs])
    result = {f"eval/seeds/{name}": value for name, value in summary.items()}
    if together.is_first():
        write_metrics(first, {**runs[0], **result})
    return result


def _judged(workdir: Path) -> list[str]:
    return json.loads((workdir / "eval" / "predictions.json").read_text(encoding="utf-8"))["ids"]


def _plain(metrics: dict[str, float]) -> dict[str, float]:
    kinds = ("eval/knn/", "eval/probe/", "eval/feature_error/", "eval/linear_error/")
    return {
        name.removeprefix("eval/"): value
        for name, value in metrics.items()
        if name.startswith(kinds)
        and not (name.endswith(("_std", "_low", "_high")) and name.rsplit("_", 1)[0] in metrics)
    }


def write_metrics(workdir: Path, metrics: dict[str, float]) -> None:
    """Replaces the features' ``eval/`` metrics in a run's ``metrics.json``; the others stay as they are.

    Raises:
      InputError: the file there is not a JSON object, or cannot be written.
    """
    replace_metrics(workdir, metrics, is_of_features)
