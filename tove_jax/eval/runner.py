"""The evaluation itself: sees only functions from picture numbers to features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from tqdm import tqdm

from tove_jax.config.schema import EvalConfig
from tove_jax.errors import InputError
from tove_jax.eval import bootstrap, feature_error, knn, probe
from tove_jax.parallel import together

TASKS = ("knn", "probe")

Predictor = Callable[[list[int]], np.ndarray]

#: Predictors that are not experts.
REFERENCES = ("pixels", "init", "student", "source")


@dataclasses.dataclass(frozen=True)
class Scored:
    """One predictor's features and answers, as another evaluation of the same pictures can use them again.

    Attributes:
      gallery: float32 (training pictures, D), or None where nothing is compared with the features themselves.
      queries: float32 (held-out pictures, D), or None.
      answers: task to the class number of each held-out picture.
    """

    gallery: np.ndarray | None
    queries: np.ndarray | None
    answers: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      metrics: flat names to numbers, see `evaluate`.
      classes: sorted names of the labels.
      held_out: numbers of the judged pictures.
      truth: label of each of them.
      predictions: ``{"knn" | "probe": {predictor: label of each}}``.
      scored: of each predictor that ran.
    """

    metrics: dict[str, float]
    classes: tuple[str, ...]
    held_out: tuple[int, ...]
    truth: tuple[str, ...]
    predictions: dict[str, dict[str, tuple[str, ...]]]
    scored: dict[str, Scored]


def run_predictor(name: str, predictor: Predictor, indices: Sequence[int], batch: int) -> np.ndarray:
    """Runs one predictor over pictures, `batch` at a time; several processes share the batches, and all get all rows.

    Args:
      name: of the predictor, for messages.
      predictor: the function.
      indices: numbers of the pictures.
      batch: most pictures a call.

    Returns:
      float32 (n, D).

    Raises:
      InputError: the predictor gives another number of rows, or values that are not finite.
    """
    index, count = (jax.process_index(), jax.process_count()) if together.several() else (0, 1)
    starts = range(0, len(indices), batch)
    # A process without a batch of its own runs the first, so that it knows the width; its rows are not taken.
    mine = list(starts)[index::count] or [0]
    parts = []
    for start in tqdm(mine, desc=f"features of {name}", unit="batch", leave=False, disable=index > 0):
        wanted = [int(number) for number in indices[start : start + batch]]
        part = np.asarray(predictor(wanted), np.float32)
        if part.ndim != 2 or len(part) != len(wanted):
            raise InputError(f"features of {name}: expected ({len(wanted)}, D), found {part.shape}")
        if not np.isfinite(part).all():
            row = wanted[int(np.argmin(np.isfinite(part).all(axis=1)))]
            raise InputError(f"features of {name}: picture number {row} has values that are not finite")
        parts.append(part)
    if count == 1:
        return np.concatenate(parts)
    gathered = together.gather_rows(np.concatenate(parts))
    whole = np.empty((len(indices), gathered[0].shape[1]), np.float32)
    for process, rows in enumerate(gathered):
        taken = 0
        for start in list(starts)[process::count]:
            size = min(batch, len(indices) - start)
            whole[start : start + size] = rows[taken : taken + size]
            taken += size
    return whole


def _labelled(labels: Sequence[str | None], indices: Sequence[int], what: str) -> list[int]:
    kept = [int(index) for index in indices if labels[index] is not None]
    if not kept:
        raise InputError(f"evaluation: expected {what} pictures with a label, found none among {len(indices)}")
    return kept


def score(
    predictors: Mapping[str, Predictor],
    labels: Sequence[str | None],
    train_indices: Sequence[int],
    held_out_indices: Sequence[int],
    config: EvalConfig,
    known: Mapping[str, Scored] | None = None,
) -> Evaluation:
    """As `evaluate`, and keeps every single answer.

    Args:
      predictors: these run.
      labels: as in `evaluate`.
      train_indices: as in `evaluate`.
      held_out_indices: as in `evaluate`.
      config: as in `evaluate`.
      known: further predictors, scored before on the same pictures with the same settings: they do not run and
        get no accuracies here, but what runs is compared with them.

    Raises:
      InputError: as in `evaluate`, or a known predictor with another number of answers.
    """
    train = _labelled(labels, train_indices, "training")
    held_out = _labelled(labels, held_out_indices, "held-out")
    if overlap := set(train) & set(held_out):
        raise InputError(f"evaluation: picture number {min(overlap)} is both in training and held out")
    classes = tuple(sorted({str(labels[index]) for index in (*train, *held_out)}))
    number = {name: position for position, name in enumerate(classes)}
    train_labels = np.array([number[str(labels[index])] for index in train])
    truth = np.array([number[str(labels[index])] for index in held_out])

    metrics: dict[str, float] = {}
    everyone = dict(known or {})
    for name, scored in everyone.items():
        if any(len(answers) != len(truth) for answers in scored.answers.values()):
            raise InputError(f"evaluation: {name} was scored on other pictures than these {len(truth)}")

    def record(name: str, interval: bootstrap.Interval) -> None:
        metrics[name] = interval.mean
        metrics[f"{name}_std"] = interval.std
        metrics[f"{name}_low"] = interval.low
        metrics[f"{name}_high"] = interval.high

    for name, predictor in predictors.items():
        gallery = run_predictor(name, predictor, train, config.batch)
        queries = run_predictor(name, predictor, held_out, config.batch)
        answers = {
            "knn": knn.classify(gallery, train_labels, queries, config.neighbours),
            "probe": probe.fit(gallery, train_labels, config.probe_l2).predict(queries),
        }
        for task, answer in answers.items():
            record(f"eval/{task}/{name}", bootstrap.bootstrap_mean(answer == truth, config.resamples))
        # Raw pixels are many numbers, and nothing is guessed from them.
        if name == "pixels":
            everyone[name] = Scored(None, None, answers)
        else:
            everyone[name] = Scored(gallery, queries, answers)

    for task in TASKS if "student" in predictors else ():
        ours = everyone["student"].answers[task] == truth
        for other in ("init", "pixels", "source"):
            if other in everyone:
                theirs = everyone[other].answers[task] == truth
                difference = bootstrap.paired_difference(ours, theirs, config.resamples)
                record(f"eval/{task}/student_minus_{other}", difference)
    for expert, target in everyone.items():
        for name in ("init", "student") if expert not in REFERENCES else ():
            if name not in everyone or not (name in predictors or expert in predictors):
                continue
            guess = everyone[name]
            metrics[f"eval/linear_error/{name}/{expert}"] = feature_error.linear_error(
                _there(guess.gallery), _there(target.gallery), _there(guess.queries), _there(target.queries)
            )
    metrics["eval/majority"] = float((truth == np.bincount(train_labels).argmax()).mean())
    metrics["eval/pictures/train"] = len(train)
    metrics["eval/pictures/held_out"] = len(held_out)
    metrics["eval/classes"] = len(classes)
    return Evaluation(
        metrics,
        classes,
        tuple(held_out),
        tuple(classes[number] for number in truth),
        {
            task: {name: tuple(classes[answer] for answer in everyone[name].answers[task]) for name in predictors}
            for task in TASKS
        },
        {name: everyone[name] for name in predictors},
    )


def _there(values: np.ndarray | None) -> np.ndarray:
    assert values is not None, "only raw pixels are kept without features, and they are no expert"
    return values


def evaluate(
    predictors: Mapping[str, Predictor],
    labels: Sequence[str | None],
    train_indices: Sequence[int],
    held_out_indices: Sequence[int],
    config: EvalConfig,
) -> dict[str, float]:
    """Judges features by the labels of held-out pictures.

    Args:
      predictors: name to a function from picture numbers (n) to features (n, D). ``pixels``,
        ``init`` (the student's start), ``student`` and ``source`` (the run that a merged student was
        taught by) are known by name; every other is an expert.
      labels: of all pictures, by number; those without a label are left out.
      train_indices: numbers of the labelled gallery.
      held_out_indices: numbers of the judged pictures.
      config: neighbours, resamples, penalty, batch.

    Returns:
      Flat names to numbers: ``eval/{knn,probe}/{name}`` accuracies from 0 to 1;
      ``eval/{knn,probe}/student_minus_{init,pixels,source}`` paired differences; beside each of these
      ``_std``, ``_low`` and ``_high``, its bootstrap error and 95 % interval;
      ``eval/linear_error/{init,student}/{expert}`` (see `feature_error.linear_error`);
      ``eval/majority``, the accuracy of always naming the training pictures' commonest label (the
      alphabetically first of equals); ``eval/pictures/{train,held_out}`` and ``eval/classes``.

    Raises:
      InputError: no labelled pictures, fewer than two classes, a picture on both sides, features of
        the wrong shape or not finite, or settings out of range.
    """
    return score(predictors, labels, train_indices, held_out_indices, config).metrics


def table(metrics: Mapping[str, float]) -> str:
    """Returns the accuracies as a plain text table: references first, then experts.

    Args:
      metrics: what `evaluate` returned, perhaps among other metrics.
    """
    names = accuracy_names(metrics)
    rows: list[tuple[str, ...]] = [("", "k-NN", "95 % interval", "linear probe", "95 % interval")]
    for name in names:
        cells = [name]
        for task in ("knn", "probe"):
            key = f"eval/{task}/{name}"
            cells.append(f"{100 * metrics[key]:.1f} %")
            cells.append(f"{100 * metrics[f'{key}_low']:.1f} to {100 * metrics[f'{key}_high']:.1f}")
        rows.append(tuple(cells))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    if "eval/majority" in metrics:
        lines.append(f"always the commonest label: {100 * metrics['eval/majority']:.1f} %")
    for task, title in (("knn", "k-NN"), ("probe", "probe")):
        for other, words in (("init", "its start"), ("source", "the run it merges")):
            key = f"eval/{task}/student_minus_{other}"
            if key in metrics:
                lines.append(
                    f"student minus {words}, {title}: {100 * metrics[key]:+.1f} points "
                    f"({100 * metrics[f'{key}_low']:+.1f} to {100 * metrics[f'{key}_high']:+.1f})"
                )
    if "eval/merge/error/merged" in metrics:
        lines.append(
            f"squared error of the tokens beside the run it merges: {metrics['eval/merge/error/merged']:.3f}, "
            f"of the run's tower alone {metrics['eval/merge/error/tower']:.3f} (1: the mean token)"
        )
    return "\n".join(lines)


def accuracy_names(metrics: Mapping[str, float]) -> list[str]:
    """Returns the names with a k-NN accuracy: references first, then experts, in stored order."""
    prefix = "eval/knn/"
    suffixes = ("_std", "_low", "_high")
    found = [
        name.removeprefix(prefix)
        for name in metrics
        if name.startswith(prefix)
        and not name.removeprefix(prefix).startswith("student_minus_")
        and not (name.endswith(suffixes) and name.rsplit("_", 1)[0] in metrics)
    ]
    return [name for name in REFERENCES if name in found] + [name for name in found if name not in REFERENCES]
