"""Answers on disk: a line each, after a line of settings; written as they come, read again by whoever goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tove_jax.errors import InputError
from tove_jax.eval.tasks.base import Question, Task
from tove_jax.files.atomic import atomic_write_bytes

Record = dict[str, Any]


class Marks:
    """A short hash of what each question asks, so that an answer to something else is not taken for its own."""

    def __init__(self, task: Task):
        self._task = task
        self._choices: tuple[tuple[str, ...], str] = ((), "")

    def __call__(self, question: Question) -> str:
        """Returns 16 hex digits of prompt, pictures' ids, and what is ranked."""
        choices = "" if self._task.mode == "write" else self._hash_choices(question)
        pictures = [self._task.source.ids[number] for number in question.pictures]
        return _hash([question.prompt, pictures, choices])

    def _hash_choices(self, question: Question) -> str:
        # Thousands of questions may share thousands of choices.
        if self._choices[0] is not question.choices:
            self._choices = question.choices, _hash(list(self._task.ranked(question)))
        return self._choices[1]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class AnswerFiles:
    """The files of one task in one folder.

    Attributes:
      folder: of the files.
      name: of the task.
      settings: what the answers depend on beside the questions; JSON.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]

    @property
    def whole(self) -> Path:
        """All answers, when they are there."""
        return self.folder / f"{self.name}.jsonl"

    def part(self, index: int, count: int) -> Path:
        """The answers of one process among several."""
        return self.whole if count == 1 else self.folder / f"{self.name}.part-{index}-of-{count}.jsonl"

    def parts(self) -> list[Path]:
        """All parts that are there, whoever wrote them."""
        pattern = re.compile(rf"{re.escape(self.name)}\.part-\d+-of-\d+\.jsonl")
        return sorted(path for path in self.folder.glob("*.jsonl") if pattern.fullmatch(path.name))

    def read(self, marks: Mapping[str, str]) -> tuple[dict[str, Record], dict[str, Record]]:
        """Reads the answers from all files.

        Args:
          marks: of the questions that are asked now, by id.

        Returns:
          Records by id: of these questions, and of others that were asked before. A last line that is still being
          written, or was cut off, is left out.

        Raises:
          InputError: a file of other settings, an answer to another question of the same id, a damaged line.
        """
        found: dict[str, Record] = {}
        others: dict[str, Record] = {}
        for path in (self.whole, *self.parts()):
            try:
                lines = path.read_bytes().split(b"\n")[:-1]
            except FileNotFoundError:
                continue
            for number, line in enumerate(lines, 1):
                record = self._parse(path, number, line)
                if number == 1:
                    self._check_settings(path, record)
                elif (id := str(record.get("id"))) not in marks:
                    others[id] = record
                else:
                    if record.get("asked") != marks[id]:
                        raise InputError(
                            f"{path}, line {number}: field asked: question {id!r} was another one when it was answered; "
                            "answer anew with --overwrite, or use another folder"
                        )
                    found[id] = record
        return found, others

    def _parse(self, path: Path, number: int, line: bytes) -> Record:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: expected JSON, cannot read it: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: expected an object, found {type(record).__name__}")
        if number > 1 and not isinstance(record.get("answer"), str) and not isinstance(record.get("scores"), list):
            raise InputError(f"{path}, line {number}: field answer: expected text, found {record.get('answer')!r:.40}")
        return record

    def _check_settings(self, path: Path, record: Record) -> None:
        found = record.get("settings")
        if not isinstance(found, dict):
            raise InputError(f"{path}, line 1: field settings: expected an object, found {found!r:.40}")
        for name in sorted({*found, *self.settings}):
            if found.get(name) != self.settings.get(name):
                raise InputError(
                    f"{path}, line 1: settings.{name}: the answers there are of {found.get(name)!r}, expected "
                    f"{self.settings.get(name)!r}; answer anew with --overwrite, or use another folder"
                )

    def open_part(self, index: int, count: int) -> Any:
        """Opens a process's file to write at its end; makes it, or cuts off a line that was not finished."""
        path = self.part(index, count)
        if not path.exists() or b"\n" not in (content := path.read_bytes()):
            atomic_write_bytes(path, self._header())
        elif not content.endswith(b"\n"):
            with open(path, "r+b") as stream:
                stream.truncate(content.rindex(b"\n") + 1)
        return open(path, "ab")

    def write_whole(self, records: Iterable[Record]) -> None:
        """Writes all answers as one file, then removes the parts."""
        atomic_write_bytes(self.whole, self._header() + b"".join(line(record) for record in records))
        for path in self.parts():
            path.unlink(missing_ok=True)

    def remove(self, index: int, count: int) -> None:
        """Removes this process's answers; the first process also the whole file and parts of another division."""
        paths = {self.part(index, count)}
        if index == 0:
            paths |= {self.whole} | {path for path in self.parts() if not path.name.endswith(f"-of-{count}.jsonl")}
        for path in paths:
            path.unlink(missing_ok=True)

    def _header(self) -> bytes:
        return line({"task": self.name, "settings": dict(self.settings)})


def line(record: Record) -> bytes:
    """Returns a record as a line of JSON."""
    # What UTF-8 has no bytes for, such as half of a surrogate pair, becomes JSON's own escape.
    return (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def append(stream: Any, records: Sequence[Record]) -> None:
    """Writes records and waits until they are on the disk."""
    stream.write(b"".join(map(line, records)))
    stream.flush()
    os.fsync(stream.fileno())
