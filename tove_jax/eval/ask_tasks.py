"""Opens a model and judges it by what it answers, task by task."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from tove_jax.errors import InputError
from tove_jax.eval.answers import Result, evaluate_answers
from tove_jax.eval.tasks.registry import Options, check_names, open_task, parse_wanted
from tove_jax.language.answer import Answerer
from tove_jax.language.decode import Decoding
from tove_jax.parallel import together
from tove_jax.train.checkpoint import is_run, load_settings

OWN = "held_out"
_ENDS = 2**16


@dataclasses.dataclass(frozen=True)
class Model:
    """Which model answers.

    Attributes:
      folder: a run's folder, a Hugging Face folder or a hub id.
      step: of a run, a saved step; None: the newest.
      experts: of a ToVE run, those attached; None: all that it has.
      template: of the conversation; empty: the model's own.
    """

    folder: str
    step: int | None = None
    experts: tuple[str, ...] | None = None
    template: str = ""

    def describe(self) -> str:
        """Returns the model and its state in words that are the same wherever it lies, so that answers can be gone on
        with on another machine and are not mixed with another model's.

        Raises:
          InputError: a run without checkpoints, or without that step.
        """
        path = Path(self.folder).expanduser()
        if is_run(path):
            found = f"{path.resolve().name} at step {load_settings(path, self.step)[1]['step']}"
        elif path.is_dir():
            found = f"{path.resolve().name} {_content(path)}"
        else:
            found = self.folder
        if self.experts is not None:
            found += f", experts {'+'.join(self.experts) or 'none'}"
        return found + (f", template {self.template}" if self.template else "")


def _content(folder: Path) -> str:
    """A hash of a folder's files: names, sizes, and both ends of each."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as stream:
            found.update(stream.read(_ENDS))
            stream.seek(max(0, size - _ENDS))
            found.update(stream.read(_ENDS))
    return found.hexdigest()[:16]


def open_model(model: Model) -> Answerer:
    """Opens a model on this process's own devices; raises InputError where nothing that answers is there."""
    from tove_jax.eval.answerers import open_answerer

    return open_answerer(model.folder, step=model.step, experts=model.experts, template=model.template)


def ask_tasks(
    model: Model,
    wanted: Sequence[str],
    workdir: Path | str | None = None,
    options: Options | None = None,
    *,
    limit: int = 0,
    batch: int = 16,
    beams: int = 1,
    resamples: int = 1000,
    overwrite: bool = False,
    open_answerer: Callable[[Model], Answerer] = open_model,
) -> list[Result]:
    """Answers tasks with a model; see `evaluate_answers` for what is written.

    Args:
      model: that answers.
      wanted: tasks, see `tasks.registry.parse_wanted`; ``held_out`` alone takes the model's own run.
      workdir: where results go; None: the run's folder, or ``runs/<name>`` for a Hugging Face folder.
      options: how the tasks are asked.
      limit, batch, resamples, overwrite: see `evaluate_answers`.
      beams: width of beam search, for written answers.
      open_answerer: opens the model, once, after all questions were read.

    Returns:
      The results that this process has, all in the first one.

    Raises:
      InputError: no such task or file, a model that cannot be opened, what `evaluate_answers` refuses.
    """
    # A run is asked about its own pictures unless told.
    wanted = [
        f"{text}={model.folder}" if text.partition("@")[0] == OWN and "=" not in text else text for text in wanted
    ]
    options, parsed = options or Options(), [parse_wanted(text) for text in wanted]
    check_names(parsed)
    if workdir is None:
        path = Path(model.folder).expanduser()
        workdir = path if is_run(path) else Path("runs") / path.name
    tasks = [open_task(one, options) for one in parsed]
    described = model.describe()
    if together.several():
        together.agree({"model": described, "tasks": ", ".join(f"{t.name}: {len(t.questions)}" for t in tasks)})
    answerer = open_answerer(model)
    results = []
    for task in tasks:
        found = evaluate_answers(
            task,
            answerer,
            workdir,
            model=described,
            decoding=Decoding(new_tokens=task.new_tokens, beams=beams),
            limit=limit,
            batch=batch,
            resamples=resamples,
            overwrite=overwrite,
            process_index=jax.process_index() if together.several() else 0,
            process_count=jax.process_count() if together.several() else 1,
            progress=together.is_first(),
        )
        if found is not None:
            results.append(found)
        elif together.is_first():
            raise InputError(
                f"{task.name}: answers of other processes are missing in {Path(workdir) / 'eval'}; the processes need "
                "a disk that all of them share"
            )
    return results
