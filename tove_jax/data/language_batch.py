"""Batches of conversations: grouped by modality and length and padded to few static lengths, or packed.

The batches of an epoch are a function of the rows' lengths, the seed and the epoch alone, so that every process
plans the same ones without talking to the others, and takes its slice of the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tove_jax.data.conversation import IGNORED, Encoded
from tove_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One global batch.

    Attributes:
      rows: int32 (B,), which conversations, or (B, K), which share a row; -1 for none.
      length: the static length L it is padded to.
    """

    rows: np.ndarray
    length: int

    def shared(self) -> list[list[int]]:
        """Returns the conversations of each row, in their order; none in rows that only fill the batch."""
        return [[int(text) for text in row if text >= 0] for row in self.rows.reshape(len(self.rows), -1)]


def _grouped(rows: np.ndarray, lengths: np.ndarray, batch: int, window: int, rng: np.random.Generator) -> list[Any]:
    """Returns batches of shuffled rows, sorted by length within windows of some batches, the last one shorter."""
    rows = rng.permutation(rows)
    sorted_windows = []
    for first in range(0, len(rows), batch * window):
        part = rows[first : first + batch * window]
        sorted_windows.append(part[np.argsort(-lengths[part], kind="stable")])
    ordered = np.concatenate(sorted_windows) if sorted_windows else rows
    return [ordered[first : first + batch] for first in range(0, len(ordered), batch)]


def plan_batches(
    lengths: np.ndarray,
    pictured: np.ndarray,
    buckets: Sequence[int],
    *,
    batch: int,
    seed: int,
    epoch: int = 0,
    group: np.ndarray | None = None,
    by_modality: bool = True,
    window: int = 1,
    drop_remainder: bool = False,
) -> list[PlannedBatch]:
    """Plans an epoch as LLaVA does: batches of one modality, each sorted by length, in random order.

    What is left of both modalities comes last, mixed. Every row comes once. The order is ours (NumPy's
    generator), the grouping LLaVA's.

    Args:
      lengths: (n,), tokens of each row.
      pictured: bool (n,), whether the row has a picture.
      buckets: lengths a batch may be padded to; one compilation each.
      batch: rows of a global batch.
      seed, epoch: of the order.
      group: (n,), what to sort by instead of `lengths`.
      by_modality: keep pictured rows and text apart.
      window: batches that are sorted together. 1 is LLaVA's, which balances devices; more gives less padding.
      drop_remainder: leave an incomplete last batch out, else it is filled up with -1.

    Raises:
      InputError: no rows, a row longer than the longest bucket, sizes below one.
    """
    lengths, pictured = np.asarray(lengths), np.asarray(pictured, bool)
    group = lengths if group is None else np.asarray(group)
    widths = np.array(sorted(set(buckets)))
    if not len(lengths) or not len(widths) or widths[0] < 1 or batch < 1 or window < 1:
        raise InputError(
            f"batches: expected rows, positive buckets, batch and window, found {len(lengths)} rows, buckets "
            f"{list(buckets)}, batch {batch}, window {window}"
        )
    if not len(lengths) == len(pictured) == len(group):
        raise InputError(f"batches: expected as many lengths as rows, found {len(group)} and {len(pictured)}")
    if lengths.max() > widths[-1]:
        row = int(lengths.argmax())
        raise InputError(f"batches: row {row}: expected at most {widths[-1]} tokens (buckets), found {lengths[row]}")
    rng = np.random.default_rng([seed, epoch])
    apart = by_modality and pictured.any() and not pictured.all()
    sides = [np.flatnonzero(pictured), np.flatnonzero(~pictured)] if apart else [np.arange(len(lengths))]
    whole: list[np.ndarray] = []
    left: list[np.ndarray] = []
    for side in sides:
        for rows in _grouped(side, group, batch, window, rng):
            (whole if len(rows) == batch else left).append(rows)
    order = [whole[index] for index in rng.permutation(len(whole))]
    rest = np.concatenate(left) if left else np.zeros(0, np.int64)
    rest = rest[np.argsort(-group[rest], kind="stable")]
    order += [rest[first : first + batch] for first in range(0, len(rest), batch)]
    plan = []
    for rows in order:
        if len(rows) < batch and drop_remainder:
            continue
        full = np.full(batch, -1, np.int32)
        full[: len(rows)] = rows
        plan.append(PlannedBatch(full, int(widths[np.searchsorted(widths, lengths[rows].max())])))
    return plan


def _pack(rows: np.ndarray, lengths: np.ndarray, pictures: np.ndarray, limit: int, most: int) -> list[list[int]]:
    """Returns rows of at most `limit` tokens and `most` pictures: the longest text first, where it first fits."""
    space, slots = np.full(len(rows), limit), np.full(len(rows), most)
    shared: list[list[int]] = []
    for row in rows[np.argsort(-lengths[rows], kind="stable")]:
        # One row beyond those that are in use is empty, so that there is always a place.
        place = int(np.argmax((space[: len(shared) + 1] >= lengths[row]) & (slots[: len(shared) + 1] >= pictures[row])))
        if place == len(shared):
            shared.append([])
        shared[place].append(int(row))
        space[place] -= lengths[row]
        slots[place] -= pictures[row]
    return shared


def plan_packed(
    lengths: np.ndarray,
    pictures: np.ndarray,
    *,
    limit: int,
    pictures_per_row: int,
    batch: int,
    seed: int,
    epoch: int = 0,
    window: int = 4096,
    drop_remainder: bool = False,
) -> list[PlannedBatch]:
    """Plans an epoch of rows that several conversations share; ours, LLaVA has none.

    Which conversations share a row follows from the seed alone, the order of the rows from the epoch too: so every
    epoch has as many batches. In windows of shuffled conversations the longest is placed first, in the first row
    that has room (first fit decreasing).

    Args:
      lengths: (n,), tokens of each conversation.
      pictures: (n,), pictures of each.
      limit: tokens of a row.
      pictures_per_row: pictures of a row at most.
      batch: rows of a global batch.
      seed, epoch: of the order.
      window: conversations that are packed together. More gives less padding and takes longer.
      drop_remainder: leave an incomplete last batch out, else it is filled up with empty rows.

    Returns:
      Batches whose `PlannedBatch.rows` are (B, K), K the most texts that share a row of the epoch.

    Raises:
      InputError: no conversations, one that is longer than the limit or has too many pictures, sizes below one.
    """
    lengths, pictures = np.asarray(lengths), np.asarray(pictures)
    if not len(lengths) or len(lengths) != len(pictures) or min(limit, batch, window) < 1:
        raise InputError(
            f"packing: expected conversations, as many counts of pictures, positive limit, batch and window, found "
            f"{len(lengths)}, {len(pictures)}, {limit}, {batch} and {window}"
        )
    for found, most, what in ((lengths, limit, "tokens"), (pictures, pictures_per_row, "pictures")):
        if found.max() > most:
            row = int(found.argmax())
            raise InputError(f"packing: conversation {row}: expected at most {most} {what}, found {found[row]}")
    order = np.random.default_rng([seed]).permutation(len(lengths))
    shared = [
        row
        for first in range(0, len(order), window)
        for row in _pack(order[first : first + window], lengths, pictures, limit, pictures_per_row)
    ]
    table = np.full((-(-len(shared) // batch) * batch, max(map(len, shared))), -1, np.int32)
    for place, number in enumerate(np.random.default_rng([seed, epoch]).permutation(len(shared))):
        table[place, : len(shared[number])] = shared[number]
    whole = len(shared) // batch if drop_remainder else len(table) // batch
    return [PlannedBatch(table[first * batch : (first + 1) * batch], limit) for first in range(whole)]


Row = Encoded | Sequence[Encoded] | None
"""One conversation, several that share a row, or nothing."""


def _texts(row: Row) -> Sequence[Encoded]:
    if row is None:
        return ()
    return (row,) if isinstance(row, Encoded) else row


def collate(
    rows: Sequence[Row], *, length: int, images: int, pad: int, records: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Makes the arrays of a batch, padded on the right.

    ``input_ids`` int32 (B, L): `IMAGE_ID` at every position of a picture, `pad` in the padding;
    ``labels`` int32 (B, L): `IGNORED` where nothing is learned; ``attention_mask`` bool (B, L): False in the
    padding; ``segments`` int32 (B, L): the number of the conversation within its row, from 1, and 0 in the padding;
    ``image_positions`` int32 (B, I): where each picture's first token stands, -1 for no picture;
    ``image_counts`` int32 (B,); ``record`` int32 (B,): -1 for filling rows. Shapes depend on the arguments
    alone. The k-th position with `IMAGE_ID` of a row takes the k-th of the row's picture tokens:
    ``jnp.cumsum(input_ids == IMAGE_ID, -1) - 1`` says which. A conversation's first token is never learned, for in
    a shared row another one stands before it.

    Args:
      rows: conversations, or lists of those that share a row; None, or an empty list, only fills the batch.
      length: L.
      images: I, pictures of a row at most.
      pad: id of the padding.
      records: of the rows; their number in the batch if None.

    Raises:
      InputError: a row longer than L, or with more than I pictures.
    """
    count = len(rows)
    arrays = {
        "input_ids": np.full((count, length), pad, np.int32),
        "labels": np.full((count, length), IGNORED, np.int32),
        "attention_mask": np.zeros((count, length), bool),
        "segments": np.zeros((count, length), np.int32),
        "image_positions": np.full((count, images), -1, np.int32),
        "image_counts": np.zeros(count, np.int32),
        "record": np.full(count, -1, np.int32),
    }
    for number, row in enumerate(rows):
        texts = _texts(row)
        if not texts:
            continue
        record = number if records is None else int(records[number])
        tokens, pictures = sum(map(len, texts)), sum(len(text.starts) for text in texts)
        if tokens > length or pictures > images:
            raise InputError(
                f"record {record}: expected at most {length} tokens and {images} pictures, found {tokens} and "
                f"{pictures}"
            )
        first = shown = 0
        for segment, text in enumerate(texts, 1):
            place = slice(first, first + len(text))
            arrays["input_ids"][number, place] = text.ids
            arrays["labels"][number, place] = text.labels
            arrays["labels"][number, first] = IGNORED
            arrays["segments"][number, place] = segment
            arrays["image_positions"][number, shown : shown + len(text.starts)] = text.starts + first
            first, shown = first + len(text), shown + len(text.starts)
        arrays["attention_mask"][number, :first] = True
        arrays["image_counts"][number] = shown
        arrays["record"][number] = record
    return arrays
