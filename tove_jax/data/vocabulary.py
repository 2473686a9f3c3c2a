"""The words of captions as numbers: split, counted and numbered the same way everywhere."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_write_json

FORMAT = "tove_jax-vocabulary-1"
FILE_NAME = "vocabulary.json"


def split_words(caption: str) -> list[str]:
    """Returns the lower-case words of a caption, split at whitespace and punctuation."""
    return re.findall(r"[^\W_]+", caption.lower())


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Numbered words.

    Attributes:
      words: word i is number i.
      length: words of a caption that are kept at most.
    """

    words: tuple[str, ...]
    length: int

    @classmethod
    def build(cls, captions: Iterable[str | None], *, size: int, minimum: int, length: int) -> Vocabulary:
        """Takes the commonest words, equal counts in alphabetical order.

        Args:
          captions: of the training pictures; None where there is none.
          size: most words.
          minimum: occurrences a word needs.
          length: see `Vocabulary`.

        Raises:
          InputError: no word occurs often enough, or a size below one.
        """
        if size < 1 or length < 1:
            raise InputError(f"vocabulary: expected one word or more, found size {size} and length {length}")
        counts = collections.Counter(word for text in captions if text for word in split_words(text))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        words = tuple(word for word in ordered if counts[word] >= minimum)[:size]
        if not words:
            raise InputError(
                f"captions: expected words that occur {minimum} times or more in the training captions, found none "
                f"among {len(counts)} words; this loss needs pictures with captions"
            )
        return cls(words, length)

    def encode(self, captions: Sequence[str | None]) -> np.ndarray:
        """Returns each caption's distinct known words in order, int32 (n, length), -1 where there are no more."""
        number = {word: index for index, word in enumerate(self.words)}
        table = np.full((len(captions), self.length), -1, np.int32)
        for row, text in enumerate(captions):
            known = [number[word] for word in dict.fromkeys(split_words(text or "")) if word in number]
            known = known[: self.length]
            table[row, : len(known)] = known
        return table

    @property
    def hash(self) -> str:
        """SHA-256 of words and length, first 16 digits."""
        return hashlib.sha256(json.dumps([self.length, *self.words]).encode()).hexdigest()[:16]

    def write(self, folder: Path | str) -> None:
        """Writes ``vocabulary.json`` into a run's folder."""
        content = {"format": FORMAT, "hash": self.hash, "length": self.length, "words": list(self.words)}
        atomic_write_json(Path(folder) / FILE_NAME, content)

    @classmethod
    def read(cls, folder: Path | str, expected: str | None = None) -> Vocabulary:
        """Reads what `write` wrote.

        Args:
          folder: the run's.
          expected: hash that the words must have.

        Raises:
          InputError: missing, damaged, or other words than expected.
        """
        path = Path(folder) / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            words, length = content["words"], content["length"]
            good = content["format"] == FORMAT and isinstance(words, list) and isinstance(length, int)
            if not good or not all(isinstance(word, str) for word in words):
                raise ValueError(f"not of format {FORMAT}")
        except FileNotFoundError:
            raise InputError(f"{path}: no vocabulary here; `tove train` writes it") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"{path}: expected a vocabulary, cannot read it: {error}") from error
        found = cls(tuple(words), length)
        if expected is not None and found.hash != expected:
            raise InputError(f"{path}: expected the words the run was trained with, {expected}, found {found.hash}")
        return found
