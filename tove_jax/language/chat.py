"""Answers in a conversation about pictures: template, tokens, decoding, around any of our language models."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.data.conversation import IGNORED, IMAGE, IMAGE_ID, Template, encode, encode_prompt
from tove_jax.data.tokenizer import Tokenizer
from tove_jax.errors import InputError
from tove_jax.language.decode import Decoding
from tove_jax.language.generate import generate, pad_rows, rank
from tove_jax.language.model import LanguageModel
from tove_jax.models.llava import place_pictures

See = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
"""From pictures, uint8 (H, W, 3), to each one's tokens as the decoder reads them, (n, W)."""

_MULTIPLE = 32  # prompts' lengths are rounded up to it, so that few are compiled
_RANKED = 64  # choices of a prompt that are read at once
_KEPT = 128  # pictures whose tokens are kept, for several questions about one


@dataclasses.dataclass
class Chat:
    """An `Answerer` (see `tove_jax.language.answer`) of a tower and one of our language models.

    Attributes:
      model: the modules.
      params: ``{"projector", "model", "lora"}``.
      tokenizer: of the decoder.
      template: of the conversation.
      see: what the pictures become.
      limit: tokens of a prompt and its answer at most.
      seed: of sampling.
    """

    model: LanguageModel
    params: Any
    tokenizer: Tokenizer
    template: Template
    see: See
    limit: int
    seed: int = 0

    def __post_init__(self) -> None:
        self._kept: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self._calls = 0

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens at which an answer ends: the tokenizer's, and the template's."""
        own = self.tokenizer.split(self.template.end)[0] if self.template.end else []
        return tuple(dict.fromkeys([self.tokenizer.end, *map(int, own[-1:])]))

    def answer(self, pictures: Sequence[Sequence[np.ndarray]], prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """Answers questions about pictures; see `Answerer.answer`."""
        _check_counts(pictures, prompts)
        if not prompts:
            return []
        if not decoding.ends:
            decoding = dataclasses.replace(decoding, ends=self.ends, pad=self.tokenizer.pad)
        seen = [self.tokens(shown) for shown in pictures]
        rows = [
            self.placed(encode_prompt(_turns(prompt, len(shown)), self.template, self.tokenizer, images=len(shown)), s)
            for prompt, shown, s in zip(prompts, pictures, seen, strict=True)
        ]
        self._check_length(rows, decoding.new_tokens)
        self._calls += 1
        found = generate(
            self.model.decoder,
            self.params["model"],
            **self._inputs(rows, seen),
            decoding=decoding,
            lora=self.params.get("lora"),
            key=jax.random.fold_in(jax.random.key(self.seed), self._calls) if decoding.sample else None,
        )
        tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)
        ends = set(decoding.ends)
        return [
            self.tokenizer.text(int(id) for id in row[:length] if id not in ends).strip()
            for row, length in zip(tokens, lengths, strict=True)
        ]

    def rank(
        self,
        pictures: Sequence[Sequence[np.ndarray]],
        prompts: Sequence[str],
        choices: Sequence[Sequence[str]],
        mean: bool = False,
    ) -> list[np.ndarray]:
        """Tells how likely each given answer is; see `Answerer.rank`."""
        _check_counts(pictures, prompts)
        if len(choices) != len(prompts):
            raise InputError(f"choices: expected some for each of {len(prompts)} prompts, found {len(choices)}")
        if not prompts:
            return []
        seen = [self.tokens(shown) for shown in pictures]
        rows: list[np.ndarray] = []
        answers: list[list[np.ndarray]] = []
        for prompt, shown, told, tokens in zip(prompts, pictures, choices, seen, strict=True):
            before, after = self.divided(prompt, len(shown), told)
            rows.append(self.placed(before, tokens))
            answers.append(after)
        most, longest = max(map(len, answers)), max(len(one) for row in answers for one in row)
        self._check_length(rows, longest)
        ids = np.full((len(rows), most, longest), self.tokenizer.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        mask[..., 0] = True  # places of prompts that have fewer choices
        for row, told_ids in enumerate(answers):
            for place, one in enumerate(told_ids):
                ids[row, place, : len(one)], mask[row, place, : len(one)] = one, True
        found = rank(
            self.model.decoder,
            self.params["model"],
            ids,
            mask,
            **self._inputs(rows, seen),
            lora=self.params.get("lora"),
            mean=mean,
            chunk=_RANKED,
        )
        return [np.asarray(row[: len(told)]) for row, told in zip(np.asarray(found), answers, strict=True)]

    def divided(self, prompt: str, images: int, choices: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns a prompt's ids and those of each choice with its end, tokenised together as in training."""
        if not choices:
            raise InputError(f"choices: expected at least one for the prompt {prompt!r:.60}, found none")
        before, answers = None, []
        for choice in choices:
            turns = [*_turns(prompt, images), {"from": "gpt", "value": choice}]
            row = encode(turns, self.template, self.tokenizer, images=images, where=f"choice {choice!r:.60}")
            learned = np.flatnonzero(row.labels != IGNORED)
            if not len(learned):
                raise InputError(f"choice {choice!r:.60}: expected an answer without the template's own marks")
            first, last = int(learned[0]), int(learned[-1]) + 1
            if before is not None and not np.array_equal(before, row.ids[:first]):
                raise InputError(f"choice {choice!r:.60}: the tokenizer joins it with the prompt {prompt!r:.60}")
            before = row.ids[:first]
            answers.append(row.ids[first:last])
        assert before is not None
        return before, answers

    def tokens(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns each picture's tokens as the decoder reads them, (n, W); those of the last pictures are kept."""
        keys = [
            hashlib.blake2b(np.ascontiguousarray(p), digest_size=16).digest() + bytes(str(p.shape), "ascii")
            for p in pictures
        ]
        fresh = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in self._kept}
        if fresh:
            for key, tokens in zip(fresh, self.see(list(fresh.values())), strict=True):
                self._kept[key] = np.asarray(tokens)
        found = []
        for key in keys:
            self._kept.move_to_end(key)
            found.append(self._kept[key])
        while len(self._kept) > max(_KEPT, len(keys)):
            self._kept.popitem(last=False)
        return found

    def placed(self, ids: np.ndarray, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Repeats each placeholder as often as its picture has tokens, or drops it where the decoder looks across."""
        if self.model.projector is None:
            return ids[ids != IMAGE_ID]
        times = np.ones(len(ids), np.int64)
        times[ids == IMAGE_ID] = [len(one) for one in tokens]
        return np.repeat(ids, times)

    def _check_length(self, rows: Sequence[np.ndarray], more: int) -> None:
        longest = max(map(len, rows))
        if longest + more > self.limit:
            raise InputError(
                f"prompts: expected at most {self.limit} tokens with the answer, found {longest} and {more} for it"
            )

    def _inputs(self, rows: Sequence[np.ndarray], seen: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
        ids, mask = pad_rows(rows, pad=self.tokenizer.pad, multiple=_MULTIPLE)
        width = next((one.shape[-1] for row in seen for one in row), 0)
        if self.model.projector is None and not width:
            raise InputError("prompts: expected a picture with each, this language model reads no text alone")
        most = max(sum(map(len, row)) for row in seen)
        tokens = np.zeros((len(rows), most, width or self.model.decoder.width), np.float32)
        there = np.zeros((len(rows), most), bool)
        for place, row in enumerate(seen):
            if row:
                joined = np.concatenate(row)
                tokens[place, : len(joined)], there[place, : len(joined)] = joined, True
        if self.model.projector is None:
            return {"tokens": np.maximum(ids, 0), "mask": mask, "pictures": tokens, "pictures_mask": there}
        merged = _merged(self.model, self.params["model"], ids, tokens) if most else None
        if merged is None:
            return {"tokens": ids, "mask": mask}
        return {"embeddings": merged, "mask": mask}


@functools.partial(jax.jit, static_argnums=0)
def _merged(model: LanguageModel, params: Any, ids: jax.Array, tokens: jax.Array) -> jax.Array:
    return place_pictures(model.embed({"model": params}, ids), ids, jnp.asarray(tokens))


def _turns(prompt: str, images: int) -> list[dict[str, str]]:
    if IMAGE not in prompt:
        prompt = f"{IMAGE}\n" * images + prompt
    return [{"from": "human", "value": prompt if prompt.strip() else "?"}]


def _check_counts(pictures: Sequence[Any], prompts: Sequence[str]) -> None:
    if len(pictures) != len(prompts):
        raise InputError(f"prompts: expected pictures for each of {len(prompts)}, found {len(pictures)}")
