"""How many tokens every conversation has, counted once and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tove_jax.data.cache import one_at_a_time
from tove_jax.data.conversation import Template, count_tokens
from tove_jax.data.dialogue import Dialogue
from tove_jax.data.tokenizer import Tokenizer
from tove_jax.files.atomic import atomic_write_bytes

_VERSION = 1
"""Raised when the same conversations, template and tokenizer would give other counts."""
_BATCH = 1024


def picture_counts(dialogues: Sequence[Dialogue]) -> np.ndarray:
    """Returns how many pictures each conversation has, int32 (n,)."""
    return np.fromiter((len(dialogue.pictures) for dialogue in dialogues), np.int32, len(dialogues))


def _key(dialogues: Sequence[Dialogue], template: Template, tokenizer: Tokenizer) -> str:
    """Returns a hash of everything that the counts depend on."""
    content = hashlib.sha256()
    settings = [_VERSION, dataclasses.asdict(template), tokenizer.begin, tokenizer.space_first]
    content.update(json.dumps(settings, sort_keys=True).encode())
    content.update(tokenizer.inner.backend_tokenizer.to_str().encode())
    for dialogue in dialogues:
        said = [part for turn in dialogue.turns for part in (turn["from"], turn["value"])]
        content.update(json.dumps([len(dialogue.pictures), said]).encode())
    return content.hexdigest()[:24]


def _kept(path: Path, count: int) -> np.ndarray | None:
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None  # absent, or damaged: counted anew
    return counts if counts.shape == (count,) and counts.dtype == np.int32 else None


def _count(dialogues: Sequence[Dialogue], template: Template, tokenizer: Tokenizer, progress: bool) -> np.ndarray:
    counts = np.zeros(len(dialogues), np.int32)
    with tqdm(total=len(dialogues), desc="count tokens", unit=" texts", disable=not progress, leave=False) as bar:
        for first in range(0, len(dialogues), _BATCH):
            part = dialogues[first : first + _BATCH]
            counts[first : first + len(part)] = count_tokens(
                [dialogue.turns for dialogue in part],
                template,
                tokenizer,
                images=[len(dialogue.pictures) for dialogue in part],
                where=[f"conversation {dialogue.id!r}" for dialogue in part],
            )
            bar.update(len(part))
    return counts


def dialogue_lengths(
    dialogues: Sequence[Dialogue],
    template: Template,
    tokenizer: Tokenizer,
    *,
    picture_tokens: int,
    limit: int,
    cache: Path | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Counts the tokens of every conversation as `tove_jax.data.conversation.expand_images` leaves them.

    Args:
      dialogues: conversations.
      template, tokenizer: as `tove_jax.data.conversation.encode` takes them.
      picture_tokens: places of a picture in the row; 0 where the model sees pictures beside the text.
      limit: tokens that a row keeps.
      cache: folder in which the counts are kept, under a hash of conversations, template and tokenizer; one of
        several processes counts and the others wait. None: nothing is kept.
      progress: show a progress bar.

    Returns:
      int32 (n,), at most `limit`.

    Raises:
      InputError: naming the conversation: unknown role, empty answer, an image token without image or the reverse,
        and what else `encode` refuses.
    """
    if cache is None:
        counts = _count(dialogues, template, tokenizer, progress)
    else:
        path = cache / "text-lengths" / f"{_key(dialogues, template, tokenizer)}.npy"
        found = _kept(path, len(dialogues))
        if found is None:
            with one_at_a_time(path):
                found = _kept(path, len(dialogues))
                if found is None:
                    found = _count(dialogues, template, tokenizer, progress)
                    buffer = io.BytesIO()
                    np.save(buffer, found, allow_pickle=False)
                    atomic_write_bytes(path, buffer.getvalue())
        counts = found
    whole = counts.astype(np.int64) + picture_tokens * picture_counts(dialogues).astype(np.int64)
    return np.minimum(whole, limit).astype(np.int32)
