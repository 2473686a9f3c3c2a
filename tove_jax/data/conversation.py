"""Conversations as token ids and labels: templates as data, masks equal to LLaVA's.

A conversation is LLaVA's list of turns, ``{"from": "human" or "gpt", "value": text}``, with ``<image>`` where a
picture stands. The text of the whole conversation is tokenised at once, cut only at the pictures, as LLaVA does;
which tokens are learned follows from the characters that each token covers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tove_jax.data.tokenizer import Tokenizer
from tove_jax.errors import InputError, nearest

IMAGE = "<image>"
IMAGE_ID = -200
"""Placeholder of a picture in the ids, LLaVA's."""
IGNORED = -100
"""Label of a token that is not learned, LLaVA's and that of most losses."""

_ROLES = ("human", "gpt")


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are joined. A round is ``question, text, reply, lead, text, end, trail``; `lead` to `end` is learned.

    Attributes:
      name: of the template.
      system: system prompt; another one by `dataclasses.replace`.
      opening: stands for the first round's `question` when there is a system prompt, which it names.
      bare: stands for the first round's `question` when there is none.
      question: before a question.
      reply: after it. A prompt for an answer ends here.
      lead: between `reply` and the answer.
      end: after the answer.
      trail: after the round, not learned.
      markers: texts that divide rounds. Where a turn's own text holds one, LLaVA finds no mask that fits
        and learns nothing of the conversation; so do we.
      tokens: texts that must be one token each.
      pictures_only: of the question only the pictures are kept, and there is one round.
      apart: for models that see pictures beside the text: a picture's line break goes with it.
    """

    name: str
    system: str = ""
    opening: str = ""
    bare: str = ""
    question: str = ""
    reply: str = ""
    lead: str = ""
    end: str = ""
    trail: str = ""
    markers: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    pictures_only: bool = False
    apart: bool = False

    def before(self, round: int) -> str:
        """Returns what stands before the question of a round."""
        if round:
            return self.question
        return self.opening.format(system=self.system) if self.system else self.bare


_LLAMA_2 = Template(
    name="llava_llama_2",
    system=(
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language."
    ),
    opening="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
    bare="[INST] ",
    question="<s>[INST] ",
    reply=" [/INST]",
    lead=" ",
    end=" </s>",
    markers=("[/INST] ", "</s>"),
    tokens=("<s>", "</s>"),
)

_CHATML = Template(
    name="chatml",
    system="You are a helpful assistant.",
    opening="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n",
    bare="<|im_start|>user\n",
    question="<|im_start|>user\n",
    reply="<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    trail="\n",
    markers=("<|im_start|>", "<|im_end|>"),
    tokens=("<|im_start|>", "<|im_end|>"),
)

_MPT = dataclasses.replace(
    _CHATML,
    name="mpt",
    system=(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    opening="<|im_start|>system\n{system}<|im_end|><|im_start|>user\n",
    reply="<|im_end|><|im_start|>assistant\n",
    trail="",
)

TEMPLATES: Mapping[str, Template] = {
    template.name: template
    for template in (
        Template(name="plain", end="\n", pictures_only=True),
        Template(
            name="v1",
            system=(
                "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
                "detailed, and polite answers to the user's questions."
            ),
            opening="{system} USER: ",
            bare="USER: ",
            question="USER: ",
            reply=" ASSISTANT:",
            lead=" ",
            end="</s>",
            markers=(" ASSISTANT: ", "</s>"),
            tokens=("</s>",),
        ),
        _LLAMA_2,
        dataclasses.replace(_LLAMA_2, name="llama_2"),
        dataclasses.replace(_LLAMA_2, name="mistral_instruct", system="", question="[INST] ", tokens=("</s>",)),
        _CHATML,
        _MPT,
        dataclasses.replace(_MPT, name="chatml_direct", system="Answer the questions."),
        Template(
            name="caption",
            reply="A picture of",
            lead=" ",
            end="</s>",
            markers=("</s>",),
            tokens=("</s>",),
            pictures_only=True,
            apart=True,
        ),
        Template(name="vqa", lead=" ", end="</s>", markers=("</s>",), tokens=("</s>",), apart=True),
    )
}
"""By name: LLaVA's ``plain`` (stage 1), ``v1`` (Vicuna), ``llava_llama_2`` (also ``llama_2``), ``mistral_instruct``,
``mpt`` and ``chatml_direct``; ``chatml`` as Qwen has it, with a line break after every turn. Ours, for ToVE's decoder,
which sees pictures beside the text (see `without_pictures`): ``caption``, after a prefix that is not learned, and
``vqa``, a question, a space and its answer."""


def get_template(name: str) -> Template:
    """Returns a template by name; raises InputError with the nearest name."""
    if name not in TEMPLATES:
        raise InputError(f"template: expected one of {', '.join(TEMPLATES)}, found {name!r}{nearest(name, TEMPLATES)}")
    return TEMPLATES[name]


def check_tokenizer(template: Template, tokenizer: Tokenizer) -> None:
    """Raises InputError when the tokenizer lacks a token that the template needs."""
    for token in template.tokens:
        try:
            tokenizer.token(token)
        except InputError as error:
            raise InputError(f"template {template.name!r}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One conversation.

    Attributes:
      ids: int32 (T,), `IMAGE_ID` where a picture stands.
      labels: int32 (T,), the id where the token is learned, else `IGNORED`.
      starts: int32 (i,), where the first token of each picture stands.
      truncated: tokens that the limit cut off.
      ignored: nothing is learned, because a turn holds one of the template's markers or no answer follows the
        last question.
    """

    ids: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    truncated: int = 0
    ignored: bool = False

    def __len__(self) -> int:
        return len(self.ids)


def _texts(conversation: Sequence[Mapping[str, Any]], images: int, where: str, open_end: bool) -> list[str]:
    """Returns the turns' texts, a question first, pictures where LLaVA puts them."""
    turns = list(conversation)
    for number, turn in enumerate(turns):
        role, value = turn.get("from"), turn.get("value")
        if role not in _ROLES:
            raise InputError(f"{where}: turn {number}: unknown role: expected 'human' or 'gpt', found {role!r}")
        if not isinstance(value, str) or not value.strip():
            kind = "answer" if role == "gpt" else "question"
            raise InputError(f"{where}: turn {number}: empty {kind}: expected text, found {value!r}")
        if role == "gpt" and IMAGE in value:
            raise InputError(f"{where}: turn {number}: expected {IMAGE} in questions alone, found it in an answer")
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    for number, turn in enumerate(turns):
        if turn["from"] != _ROLES[number % 2]:
            raise InputError(f"{where}: expected questions and answers in turn, found two of {turn['from']!r} in a row")
    if not turns or (len(turns) == 1 and not open_end):
        raise InputError(f"{where}: expected a question and its answer, found {len(turns)} turns")
    texts = [turn["value"] for turn in turns]
    found = sum(text.count(IMAGE) for text in texts)
    if found != images:
        kind = "image token without image" if found > images else "image without image token"
        raise InputError(f"{where}: {kind}: expected {images} {IMAGE} for {images} pictures, found {found}")
    return [f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip() if text.count(IMAGE) == 1 else text for text in texts]


def _tokens(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids (T,) and the characters (T, 2) of each; a piece's first token begins where the piece does."""
    ids: list[Any] = []
    spans: list[Any] = []
    place = 0
    if tokenizer.begin is not None:
        ids.append([tokenizer.begin])
        spans.append([[0, 0]])
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            ids.append([IMAGE_ID])
            spans.append([[place, place + len(IMAGE)]])
            place += len(IMAGE)
        if piece:
            found, covered = tokenizer.split(piece)
            covered = covered + place
            # A space put before the piece covers none of its characters, and belongs to the first of them.
            empty = covered[:, 0] == covered[:, 1]
            covered[empty, 1] += 1
            ids.append(found)
            spans.append(covered)
        place += len(piece)
    if not ids:
        return np.zeros(0, np.int32), np.zeros((0, 2), np.int32)
    return np.concatenate(ids).astype(np.int32), np.concatenate(spans).astype(np.int32)


def _joined(texts: Sequence[str], template: Template) -> tuple[str, list[tuple[int, int]], int | None]:
    """Returns the whole text, the learned characters, and where the first round begins that LLaVA cannot divide."""
    whole, learned, broken = "", [], None
    if template.apart:
        texts = [text.replace(f"{IMAGE}\n", IMAGE) for text in texts]
    for number in range(0, len(texts), 2):
        begin = len(whole)
        question, answer = texts[number], texts[number + 1] if number + 1 < len(texts) else None
        before, after = template.before(number // 2), template.reply
        if answer is None:
            # LLaVA closes an unanswered question as it does an answered one; nothing of it is learned.
            whole += before + question + after
            broken = begin if broken is None else broken
            break
        whole += before + question + after
        first = len(whole)
        whole += template.lead + answer + template.end
        learned.append((first, len(whole)))
        whole += template.trail
        frame = before + after + template.lead + template.end + template.trail
        if broken is None and any(whole[begin:].count(mark) != frame.count(mark) for mark in template.markers):
            broken = begin
    return whole, learned, broken


def _asked_and_answered(
    conversation: Sequence[Mapping[str, Any]], template: Template, images: int, where: str
) -> list[str]:
    texts = _texts(conversation, images, where, open_end=False)
    if template.pictures_only:
        if len(texts) != 2 or not images:
            raise InputError(
                f"{where}: template {template.name!r}: expected a picture and its caption, found {images} pictures "
                f"and {len(texts)} turns"
            )
        texts[0] = IMAGE * images
    return texts


def count_tokens(
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    template: Template,
    tokenizer: Tokenizer,
    *,
    images: Sequence[int],
    where: Sequence[str],
) -> np.ndarray:
    """Returns how many ids `encode` gives each conversation, int32 (n,), pictures left out; faster than that.

    Args:
      conversations, template, tokenizer: as `encode` takes them.
      images: pictures of each conversation.
      where: names each in errors.

    Raises:
      InputError: as `encode`.
    """
    owners: list[int] = []
    pieces: list[str] = []
    for number, conversation in enumerate(conversations):
        texts = _asked_and_answered(conversation, template, images[number], where[number])
        parts = [piece for piece in _joined(texts, template)[0].split(IMAGE) if piece]
        pieces += parts
        owners += [number] * len(parts)
    counts = np.full(len(conversations), int(tokenizer.begin is not None), np.int32)
    np.add.at(counts, owners, tokenizer.count(pieces))
    return counts


def encode(
    conversation: Sequence[Mapping[str, Any]],
    template: Template,
    tokenizer: Tokenizer,
    *,
    images: int = 0,
    limit: int | None = None,
    where: str = "conversation",
) -> Encoded:
    """Turns a conversation into ids and labels, equal to those of LLaVA's preprocessing.

    A first turn of the assistant is dropped. The one ``<image>`` of a turn is moved to its front, on a line of its
    own; several in one turn stay where they are. Truncation keeps the first `limit` tokens.

    Args:
      conversation: turns with ``from`` and ``value``.
      template: see `TEMPLATES`; check it against the tokenizer with `check_tokenizer`, once.
      tokenizer: see `load_tokenizer`.
      images: pictures of the record.
      limit: tokens at most, a picture counted as one; `expand_images` cuts after pictures have their tokens.
      where: names the record in errors.

    Raises:
      InputError: unknown role, empty question or answer, turns that do not alternate, no answer at all,
        more or fewer ``<image>`` than pictures or one in an answer; for ``plain`` more than a round or no picture.
    """
    texts = _asked_and_answered(conversation, template, images, where)
    text, learned, broken = _joined(texts, template)
    ids, spans = _tokens(text, tokenizer)
    keep = np.zeros(len(ids), bool)
    for first, last in learned:
        keep |= (spans[:, 1] > first) & (spans[:, 0] < last)
    # LLaVA compares lengths only where its own count has not passed the limit.
    bound = len(ids) + 1 if limit is None else limit
    ignored = broken is not None and int((spans[:, 1] <= broken).sum()) < bound
    padding = tokenizer.inner.pad_token
    if template.markers and padding and padding in text:
        ignored |= len(ids) < bound
    labels = np.where(keep & (not ignored), ids, IGNORED).astype(np.int32)
    starts = np.flatnonzero(ids == IMAGE_ID).astype(np.int32)
    return truncate(Encoded(ids, labels, starts, 0, ignored), limit)


def encode_prompt(
    conversation: Sequence[Mapping[str, Any]],
    template: Template,
    tokenizer: Tokenizer,
    *,
    images: int = 0,
    where: str = "prompt",
) -> np.ndarray:
    """Returns the ids int32 (T,) of a conversation up to where the next answer begins; its last turn is a question.

    Raises:
      InputError: as `encode`, or the last turn is an answer.
    """
    texts = _texts(conversation, images, where, open_end=True)
    if len(texts) % 2 == 0:
        raise InputError(f"{where}: expected a question as the last turn, found an answer")
    if template.pictures_only:
        texts = [IMAGE * images]
    text, _, _ = _joined(texts, template)
    return _tokens(text, tokenizer)[0]


def truncate(row: Encoded, limit: int | None) -> Encoded:
    """Keeps the first `limit` tokens."""
    if limit is None or len(row) <= limit:
        return row
    return dataclasses.replace(
        row,
        ids=row.ids[:limit],
        labels=row.labels[:limit],
        starts=row.starts[row.starts < limit],
        truncated=row.truncated + len(row) - limit,
    )


def without_pictures(row: Encoded) -> Encoded:
    """Leaves the pictures' placeholders out, for models that see pictures beside the text and not in it."""
    text = row.ids != IMAGE_ID
    return dataclasses.replace(row, ids=row.ids[text], labels=row.labels[text], starts=row.starts[:0])


def expand_images(row: Encoded, tokens: Sequence[int], limit: int | None = None) -> Encoded:
    """Repeats each picture's placeholder as often as the picture has tokens, then truncates, as LLaVA does.

    Args:
      row: with one placeholder a picture.
      tokens: of each picture of the record, 576 for a 336-pixel tower with patches of 14.
      limit: tokens at most; a picture may be cut within.

    Returns:
      The row; `Encoded.starts` tells of the pictures of which at least one token is left.

    Raises:
      InputError: not a positive number of tokens for each placeholder.
    """
    counts = np.asarray(tokens, np.int64)
    if len(counts) < len(row.starts) or (len(counts) and counts.min() < 1):
        raise InputError(
            f"expected a positive number of tokens for each of {len(row.starts)} pictures, found {counts.tolist()}"
        )
    times = np.ones(len(row), np.int64)
    times[row.starts] = counts[: len(row.starts)]
    starts = (np.cumsum(times) - times)[row.starts].astype(np.int32)
    whole = dataclasses.replace(row, ids=np.repeat(row.ids, times), labels=np.repeat(row.labels, times), starts=starts)
    return truncate(whole, limit)
