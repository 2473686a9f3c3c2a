"""Rows of text for the loader: conversations by batch and epoch, as arrays of static shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tove_jax.config.schema import TextConfig
from tove_jax.data.conversation import IMAGE, Encoded, encode, expand_images, get_template, without_pictures
from tove_jax.data.dialogue import Dialogue, pictures_of
from tove_jax.data.language_batch import PlannedBatch, collate, plan_batches, plan_packed
from tove_jax.data.tokenizer import Tokenizer
from tove_jax.errors import InputError


def bucket_lengths(text: TextConfig) -> tuple[int, ...]:
    """Returns the lengths that batches are padded to, rising; the last one is the limit."""
    if text.pack:
        return (text.limit,)
    buckets = text.buckets or tuple(sorted({-(-text.limit * eighths // 8) for eighths in (3, 4, 6, 8)}))
    if max(buckets) != text.limit or min(buckets) < 2:
        raise InputError(f"config.text.buckets: expected lengths up to text.limit {text.limit}, found {buckets}")
    return tuple(sorted(set(buckets)))


@dataclasses.dataclass(frozen=True)
class Texts:
    """The conversations of a run; everything about a batch follows from its number and the seed.

    Attributes:
      dialogues: of the source.
      numbers: int32 (n,), which of them are read.
      lengths: int32 (n,), tokens of each, as `tove_jax.data.lengths.dialogue_lengths` counts them.
      tokenizer: of the language model.
      settings: template, limit, buckets, packing.
      picture_tokens: places of a picture among the tokens; 0: none, the decoder sees pictures beside them.
      batch: rows of a global batch.
      seed: of the order.
      instruction: tokens of the questions given besides, at most; 0: none are.
      epochs: times over the conversations; None: without end.
    """

    dialogues: Sequence[Dialogue]
    numbers: np.ndarray
    lengths: np.ndarray
    tokenizer: Tokenizer
    settings: TextConfig
    picture_tokens: int
    batch: int
    seed: int = 0
    instruction: int = 0
    epochs: int | None = None

    @functools.cached_property
    def pictures(self) -> np.ndarray:
        """Int32 (n,), pictures of each conversation."""
        counts = (len(pictures_of(self.dialogues, int(number))) for number in self.numbers)
        return np.fromiter(counts, np.int32, len(self.numbers))

    @functools.cached_property
    def epoch_steps(self) -> int:
        """Batches of an epoch."""
        return len(self._epoch(0))

    @functools.cached_property
    def _epoch(self) -> Any:
        # The last two epochs: threads may be at the seam.
        return functools.lru_cache(maxsize=2)(self._plan_epoch)

    def _plan_epoch(self, epoch: int) -> list[PlannedBatch]:
        text, order = self.settings, {"batch": self.batch, "seed": self.seed, "epoch": epoch}
        if text.pack:
            return plan_packed(self.lengths, self.pictures, limit=text.limit, pictures_per_row=text.pictures, **order)
        return plan_batches(
            self.lengths,
            self.pictures > 0,
            bucket_lengths(text),
            by_modality=text.by_modality,
            window=text.window,
            **order,
        )

    def planned(self, step: int) -> tuple[int, PlannedBatch]:
        """Returns the epoch of a batch and its rows: numbers within `numbers`."""
        epoch, place = divmod(step, self.epoch_steps)
        return epoch, self._epoch(epoch)[place]

    def encoded(self, number: int) -> Encoded:
        """Returns a conversation of the source as ids and labels, pictures in their places."""
        dialogue = self.dialogues[number]
        template = get_template(self.settings.template)
        where = f"conversation {dialogue.id!r}"
        row = encode(dialogue.turns, template, self.tokenizer, images=len(dialogue.pictures), where=where)
        if not self.picture_tokens:
            return expand_images(without_pictures(row), (), self.settings.limit)
        return expand_images(row, [self.picture_tokens] * len(dialogue.pictures), self.settings.limit)

    def arrays(self, rows: Sequence[Sequence[int]], length: int) -> dict[str, np.ndarray]:
        """Makes the arrays of some rows of a batch, each the conversations that share it.

        ``input_ids``, ``labels`` int32 and ``attention_mask`` bool (B, L) as `collate` gives them, and ``segments``
        with packing; ``dialogue`` int32 (B,), the row's first conversation, -1 for none; ``instruction`` int32
        (B, I, l), the tokens of the questions asked in each picture's conversation, -1 where there are no more.
        """
        found = collate(
            [[self.encoded(number) for number in row] for row in rows],
            length=length,
            images=self.settings.pictures,
            pad=self.tokenizer.pad,
            records=[row[0] if row else -1 for row in rows],
        )
        wanted = ("input_ids", "labels", "attention_mask", *(("segments",) if self.settings.pack else ()))
        result = {name: found[name] for name in wanted} | {"dialogue": found["record"]}
        if self.instruction:
            result["instruction"] = np.stack([self._questions(row) for row in rows])
        return result

    def _questions(self, row: Sequence[int]) -> np.ndarray:
        """Returns the tokens of the questions about each picture of a row, int32 (I, l), -1 where there are no more."""
        words = np.full((self.settings.pictures, self.instruction), -1, np.int32)
        if get_template(self.settings.template).pictures_only:
            return words
        place = 0
        for number in row:
            turns = [turn["value"] for turn in self.dialogues[number].turns if turn["from"] == "human"]
            parts = [self.tokenizer.split(text.replace(IMAGE, "").strip())[0] for text in turns]
            ids = np.concatenate([np.zeros(0, np.int32), *parts])[: self.instruction]
            count = len(pictures_of(self.dialogues, number))
            words[place : place + count, : len(ids)] = ids
            place += count
        return words
