"""Answers a task's questions with a model, keeps every answer, and scores them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tove_jax.data.split import spread
from tove_jax.errors import InputError
from tove_jax.eval import bootstrap
from tove_jax.eval.answer_file import AnswerFiles, Marks, Record, append
from tove_jax.eval.metrics_file import replace_metrics
from tove_jax.eval.tasks.base import Question, Task, group_by
from tove_jax.files import mirror
from tove_jax.files.atomic import atomic_write_json
from tove_jax.language.answer import Answerer
from tove_jax.language.decode import Decoding
from tove_jax.parallel import together

_DAY = 24 * 3600.0
_SHOWN = 24


@dataclasses.dataclass(frozen=True)
class Result:
    """What the answers to one task are worth.

    Attributes:
      task: its name.
      main: the metric that stands for it.
      metrics: see the task's scorer; beside each mean over questions also ``_std``, ``_low`` and ``_high``. Empty where
        the right answers are secret.
      questions: answered ones.
      answers: file with each of them.
    """

    task: str
    main: str
    metrics: Mapping[str, float]
    questions: int
    answers: Path


def limited(task: Task, limit: int) -> list[Question]:
    """Returns some of a task's questions, spread evenly over it; whole units, so a few more may come.

    Args:
      task: the task.
      limit: units at most; 0: all.
    """
    if limit <= 0:
        return list(task.questions)
    units = list(group_by(task.questions, lambda question: question.unit or f"\0{question.id}").values())
    places = [place for number in spread(len(units), limit) for place in units[int(number)]]
    chosen = [task.questions[place] for place in sorted(places)]
    return chosen if task.restrict is None or len(chosen) == len(task.questions) else task.restrict(chosen)


def evaluate_answers(
    task: Task,
    answerer: Answerer,
    workdir: Path | str,
    *,
    model: str = "",
    decoding: Decoding | None = None,
    limit: int = 0,
    batch: int = 16,
    resamples: int = 1000,
    overwrite: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    progress: bool = True,
) -> Result | None:
    """Answers what is not yet answered, and scores the whole.

    Answers go to ``<workdir>/eval/<task>.jsonl``, on the disk after each batch, so that a run that was killed goes on
    where it was. Several processes answer every `process_count`-th question each, with a model of their own, into files
    of their own on a disk, or in an object store, that they share; the first one gathers them. Numbers go to
    ``<workdir>/eval/<task>.json`` and as ``eval/<task>/...`` into ``<workdir>/metrics.json``.

    Args:
      task: questions and scorer.
      answerer: the model.
      workdir: the run's folder.
      model: names the model and its state; answers of another one are not gone on with.
      decoding: how text is written; greedy, `Task.new_tokens` at most, when None.
      limit: see `limited`; 0: all questions.
      batch: rows a call: prompts, or choices that are ranked.
      resamples: of the bootstrap, over pictures; 0: no intervals.
      overwrite: begin anew whatever is there.
      process_index: this process among `process_count`.
      process_count: processes that share the questions.
      threads: that read pictures.
      progress: show a bar.

    Returns:
      The result; None in all processes but the first, and there while answers of others are missing.

    Raises:
      InputError: answers of another model or other settings or questions, a damaged picture, an answerer that gives
        another number of answers, settings out of range.
    """
    if batch < 1 or limit < 0 or not 0 <= process_index < process_count:
        raise InputError(
            f"{task.name}: expected batch > 0, limit >= 0 and a process below {process_count}, found {batch}, {limit} "
            f"and {process_index}"
        )
    decoding = decoding or Decoding(new_tokens=task.new_tokens)
    questions = limited(task, limit)
    hashed = Marks(task)
    marks = {question.id: hashed(question) for question in questions}
    if len(marks) != len(questions):
        raise InputError(f"{task.name}: expected each question's id once, found one again")
    files = AnswerFiles(Path(workdir) / "eval", task.name, _settings(task, decoding, model))
    if overwrite:
        files.remove(process_index, process_count)
        together.barrier("overwrite", _DAY)
    present, _ = files.read(marks)
    mine = [question for question in questions[process_index::process_count] if question.id not in present]
    if mine:
        with files.open_part(process_index, process_count) as stream:
            bar = tqdm(
                total=len(questions[process_index::process_count]),
                initial=len(questions[process_index::process_count]) - len(mine),
                desc=task.name,
                unit="question",
                disable=not progress,
            )
            with bar:
                for records in _answer(task, answerer, decoding, mine, batch, threads):
                    append(stream, [{**record, "asked": marks[record["id"]]} for record in records])
                    bar.update(len(records))
    mirror.share(workdir, [files.part(process_index, process_count)])
    together.barrier("answers", _DAY)
    if process_index:
        return None
    mirror.take(workdir, [files.part(index, process_count) for index in range(1, process_count)])
    present, others = files.read(marks)
    if len(present) < len(questions):
        return None
    records = [present[question.id] for question in questions]
    worth, metrics = _judge(task, questions, records, resamples)
    files.write_whole([*_told(task, questions, records, worth), *others.values()])
    result = {"task": task.name, "main": task.main, "questions": len(questions), "settings": dict(files.settings)}
    atomic_write_json(files.folder / f"{task.name}.json", {**result, "metrics": metrics})
    own = f"eval/{task.name}/"
    shared = {own + name: value for name, value in metrics.items()} | {f"{own}questions": float(len(questions))}
    replace_metrics(Path(workdir), shared, lambda name: name.startswith(own))
    return Result(task.name, task.main, metrics, len(questions), files.whole)


def _settings(task: Task, decoding: Decoding, model: str) -> dict[str, Any]:
    """Returns what answers depend on; of the decoding what is not usual, so that further settings change no file."""
    if task.mode != "write":
        return {"model": model, "mode": task.mode, "mean": task.mean}
    usual = dataclasses.asdict(Decoding(new_tokens=1))
    how = {name: value for name, value in dataclasses.asdict(decoding).items() if value != usual[name]}
    how = {name: list(value) if isinstance(value, tuple) else value for name, value in how.items()}
    return {"model": model, "mode": task.mode, **how, "new_tokens": decoding.new_tokens}


def _answer(
    task: Task, answerer: Answerer, decoding: Decoding, questions: Sequence[Question], batch: int, threads: int
) -> Iterator[list[Record]]:
    """Yields records batch by batch; the pictures of the next batch are read meanwhile."""
    calls = list(_batches(task, questions, batch))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        reading = _read(task, calls[0], pool)
        for number, call in enumerate(calls):
            coming = _read(task, calls[number + 1], pool) if number + 1 < len(calls) else {}
            shown = [[reading[place].result() for place in question.pictures] for question in call]
            reading = coming
            if task.mode == "write":
                # The last batch is filled up, so that one shape is compiled.
                missing = len(calls[0]) - len(call)
                prompts = [question.prompt for question in call]
                texts = answerer.answer(shown + shown[-1:] * missing, prompts + prompts[-1:] * missing, decoding)
                _check_count(task, len(texts), len(call) + missing)
                texts = texts[: len(call)]
                yield [{"id": question.id, "answer": text} for question, text in zip(call, texts, strict=True)]
                continue
            found = []
            for question, scores in zip(call, _rank(task, answerer, call, shown, batch), strict=True):
                if task.mode == "rank":
                    found.append({"id": question.id, "scores": [float(score) for score in scores]})
                else:
                    found.append({"id": question.id, "answer": task.ranked(question)[int(np.argmax(scores))]})
            yield found


def _read(task: Task, questions: Sequence[Question], pool: ThreadPoolExecutor) -> dict[int, Future[np.ndarray]]:
    numbers = {number for question in questions for number in question.pictures}
    return {number: pool.submit(_image, task, number) for number in sorted(numbers)}


def _image(task: Task, number: int) -> np.ndarray:
    return task.source[number].image


def _batches(task: Task, questions: Sequence[Question], batch: int) -> Iterator[list[Question]]:
    """Divides questions so that a call has `batch` rows at most, or one question whose choices alone are more."""
    rows, call = 0, list[Question]()
    for question in questions:
        count = 1 if task.mode == "write" else len(task.ranked(question))
        if call and rows + count > batch:
            yield call
            rows, call = 0, []
        call.append(question)
        rows += count
    if call:
        yield call


def _rank(
    task: Task, answerer: Answerer, call: Sequence[Question], shown: Sequence[Sequence[np.ndarray]], batch: int
) -> list[np.ndarray]:
    prompts, choices = [question.prompt for question in call], [task.ranked(question) for question in call]
    if len(call) == 1 and len(choices[0]) > batch:
        pieces = [choices[0][start : start + batch] for start in range(0, len(choices[0]), batch)]
        return [np.concatenate([_ranked(task, answerer, shown, prompts, [piece])[0] for piece in pieces])]
    return _ranked(task, answerer, shown, prompts, choices)


def _ranked(
    task: Task,
    answerer: Answerer,
    shown: Sequence[Sequence[np.ndarray]],
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
) -> list[np.ndarray]:
    found = answerer.rank(shown, prompts, choices, mean=task.mean)
    _check_count(task, len(found), len(prompts))
    for scores, texts in zip(found, choices, strict=True):
        if np.shape(scores) != (len(texts),) or not np.isfinite(scores).all():
            raise InputError(f"{task.name}: expected {len(texts)} finite log-likelihoods, found {np.asarray(scores)}")
    return [np.asarray(scores, np.float32) for scores in found]


def _check_count(task: Task, found: int, expected: int) -> None:
    if found != expected:
        raise InputError(f"{task.name}: expected {expected} answers of the model, found {found}")


def _judge(
    task: Task, questions: Sequence[Question], records: Sequence[Record], resamples: int
) -> tuple[np.ndarray | None, dict[str, float]]:
    """Returns what each answer is worth and the metrics; nothing where right answers are secret."""
    metrics: dict[str, float] = {}
    if not all(question.answers for question in questions):
        return None, metrics
    told = [np.asarray(one["scores"]) if task.mode == "rank" else one["answer"] for one in records]
    scores = task.score(questions, told)
    # Questions about one picture are no independent samples.
    names = [f"p{question.pictures[0]}" if question.pictures else f"q{question.id}" for question in questions]
    clusters = np.unique(names, return_inverse=True)[1]
    for name, value in scores.metrics.items():
        metrics[name] = value
        if name in scores.each and resamples:
            found = bootstrap.bootstrap_clusters(scores.each[name], clusters, resamples)
            metrics |= {f"{name}_std": found.std, f"{name}_low": found.low, f"{name}_high": found.high}
    return scores.each.get(task.main, scores.each.get("accuracy")), metrics


def _told(
    task: Task, questions: Sequence[Question], records: Sequence[Record], worth: np.ndarray | None
) -> Iterator[Record]:
    """Yields records with what was asked, for people and for the report."""
    for number, (question, record) in enumerate(zip(questions, records, strict=True)):
        more: Record = {"prompt": question.prompt, "pictures": [task.source.ids[place] for place in question.pictures]}
        if question.group:
            more["group"] = question.group
        if question.answers and task.mode != "rank":
            more["right"] = list(dict.fromkeys(question.answers))
        if worth is not None and np.isfinite(worth[number]):
            more["score"] = float(worth[number])
        kept: Record = {name: record[name] for name in ("id", "answer", "scores", "asked") if name in record}
        yield {**kept, **more}


def table(results: Sequence[Result]) -> str:
    """Returns the results as a Markdown table; shares and CIDEr times 100, MME's points as they are."""
    rows = [("task", "metric", "value", "95 % interval", "questions")]
    for result in results:
        shown = [name for name in result.metrics if not _is_beside(name, result.metrics)]
        grouped = [name for name in shown if "/" in name and name.partition("/")[0] in result.metrics]
        if len(shown) > _SHOWN or len({name.partition("/")[2] for name in grouped}) == 1:
            shown = [name for name in shown if name not in grouped or name == result.main]
        shown.sort(key=lambda name: name != result.main)
        if not shown:
            rows.append((result.task, "right answers are secret", "", "", f"{result.questions:,}"))
        for number, name in enumerate(shown):
            scale = 1.0 if name.startswith("points/") else 100.0
            interval = ""
            if f"{name}_low" in result.metrics:
                low, high = (scale * result.metrics[f"{name}_{end}"] for end in ("low", "high"))
                interval = f"{low:.1f} to {high:.1f}"
            first = number == 0
            rows.append(
                (
                    result.task if first else "",
                    name,
                    f"{scale * result.metrics[name]:.1f}",
                    interval,
                    f"{result.questions:,}" if first else "",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["| " + " | ".join(_cell(row[c], widths[c], c) for c in range(5)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (widths[c] + 1) + (":" if c in (2, 4) else "-") for c in range(5)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(text: str, width: int, column: int) -> str:
    return text.rjust(width) if column in (2, 4) else text.ljust(width)


def _is_beside(name: str, metrics: Mapping[str, float]) -> bool:
    return name.endswith(("_std", "_low", "_high")) and name.rpartition("_")[0] in metrics
