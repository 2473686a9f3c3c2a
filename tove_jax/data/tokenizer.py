"""Text as token ids, through a tokenizer of `transformers`, from a local folder or the hub."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_folder

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
"""Special tokens of a tokenizer that `train_tokenizer` makes: the Llama family's, then ChatML's."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that knows which characters each token covers.

    Attributes:
      inner: the fast tokenizer of `transformers`.
      name: folder or hub id, for messages.
      begin: id that every text starts with, or None. That of the tokenizer's own ``bos_token``; none for
        tokenizers without one or with the same token for beginning and end (GPT-2, MPT). Files differ in
        whether they say that it is to be added, so what they say is not asked.
      end: id of the end of a text.
      pad: id of the padding: the tokenizer's own, else its unknown token (LLaVA's choice), else its end.
      space_first: a text that begins with a space gets another in front, as SentencePiece adds one to every
        text; the fast tokenizers' own option adds it only where there is none.
    """

    inner: Any
    name: str
    begin: int | None
    end: int
    pad: int
    space_first: bool = False

    def __len__(self) -> int:
        return len(self.inner)

    def split(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids int32 (T,) of a text, nothing added, and the characters [first, last) of each, (T, 2)."""
        shift = int(self.space_first and text.startswith(" "))
        found = self.inner(" " * shift + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(found["input_ids"], np.int32)
        spans = np.asarray(found["offset_mapping"], np.int32).reshape(len(ids), 2)
        return ids, np.maximum(spans - shift, 0)

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """Returns how many ids `split` gives each text, int32 (n,); all texts at once, in the tokenizer's threads."""
        if not len(texts):
            return np.zeros(0, np.int32)
        texts = [" " + text if self.space_first and text.startswith(" ") else text for text in texts]
        found = self.inner(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return np.fromiter(map(len, found), np.int32, len(texts))

    def token(self, text: str) -> int:
        """Returns the id of a text that must be one token.

        Raises:
          InputError: it is none, or several.
        """
        ids, _ = self.split(text)
        if len(ids) != 1 or ids[0] == self.inner.unk_token_id != self.inner.convert_tokens_to_ids(text):
            raise InputError(f"{self.name}: expected a tokenizer with the token {text!r}, found {len(ids)} ids for it")
        return int(ids[0])

    def text(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, special tokens and negative ids (placeholders) left out."""
        return self.inner.decode([int(id) for id in ids if id >= 0], skip_special_tokens=True)


def wrap_tokenizer(inner: Any, name: str, *, space_first: bool = False) -> Tokenizer:
    """Wraps a tokenizer of `transformers`; `space_first` as in `Tokenizer`.

    Raises:
      InputError: it is not a fast one, which alone tells what each token covers, or has no end token.
    """
    if not getattr(inner, "is_fast", False):
        raise InputError(f"{name}: expected a fast tokenizer (tokenizer.json), found {type(inner).__name__}")
    begin, end = inner.bos_token_id, inner.eos_token_id
    if end is None:
        raise InputError(f"{name}: expected a tokenizer with an end token (eos_token), found none")
    own = (inner.pad_token_id, inner.unk_token_id, end)
    pad = next(id for id in own if id is not None)
    return Tokenizer(inner, name, None if begin == end else begin, end, pad, space_first)


def _folder_of(source: Path | str) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    files = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "config.json"]
    return Path(snapshot_download(str(source), allow_patterns=files))


def load_tokenizer(source: Path | str) -> Tokenizer:
    """Opens a tokenizer; code in its folder is never run.

    A folder with a SentencePiece model alone, such as Vicuna's, is read by `read_sentencepiece`: what
    transformers 5 makes of such a folder numbers the merges by the pieces' ids, where SentencePiece goes by their
    scores, and cuts runs of spaces differently.

    Args:
      source: folder, or id on the hub.

    Raises:
      InputError: naming the source: not a tokenizer, not a fast one, no end token.
    """
    from transformers import AutoTokenizer

    try:
        folder = _folder_of(source)
        model = folder / "tokenizer.model"
        if model.is_file() and not (folder / "tokenizer.json").is_file():
            inner = read_sentencepiece(model)
        else:
            inner = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # the libraries raise whatever their readers of files raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{source}: expected a tokenizer (a folder or a hub id): {reason[0]}") from error
    return wrap_tokenizer(inner, str(source), space_first=_adds_space_once(inner))


def _adds_space_once(inner: Any) -> bool:
    """Whether spaces stand for themselves as ▁ and one is put before the text but not after special tokens."""
    before = getattr(getattr(inner, "backend_tokenizer", None), "pre_tokenizer", None)
    return getattr(before, "replacement", None) == "▁" and getattr(before, "prepend_scheme", None) == "first"


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number is too long")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields number and value of each field of a protocol buffer's message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(data):
            raise ValueError("the file ends within a field")
        yield key >> 3, data[at : at + size]
        at += size


def read_sentencepiece(path: Path | str) -> Any:
    """Reads a SentencePiece model of byte-pair encoding, as a fast tokenizer of `transformers`.

    ``tokenizer_config.json`` beside it names the special tokens and says with ``legacy`` whether a text after a
    special token gets a space in front (the Llama family's older behaviour, and the default).

    Raises:
      InputError: not a SentencePiece model, or not one of byte-pair encoding.
    """
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    pieces: list[tuple[str, float, int]] = []
    kind = 1
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece: dict[int, Any] = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append((piece[1].decode(), score, piece.get(3, 1)))
            elif number == 2:
                kind = dict(_fields(value)).get(3, 1)
        config = path.with_name("tokenizer_config.json")
        settings = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path}: expected a SentencePiece model, cannot read it: {error}") from error
    if not pieces or kind != 2:
        raise InputError(f"{path}: expected a SentencePiece model of byte-pair encoding, found kind {kind}")
    scores = {piece: score for piece, score, type in pieces if type in (1, 4)}
    # The best score first, and of equal ones the longest left half: runs of spaces then grow from the left, as there.
    merges = sorted(
        (-score, -cut, (piece[:cut], piece[cut:]))
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    unknown = next((piece for piece, _, type in pieces if type == 2), "<unk>")
    fast = Fast(
        models.BPE(
            vocab={piece: id for id, (piece, _, _) in enumerate(pieces)},
            merges=[pair for *_, pair in merges],
            unk_token=unknown,
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if settings.get("legacy", True):
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast.decoder = _spaces_and_bytes(decoders)
    fast.add_special_tokens([AddedToken(piece, normalized=False) for piece, _, type in pieces if type in (2, 3)])
    named: dict[str, str | None] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": unknown}
    for role in (*list(named), "pad_token"):
        token = settings.get(role, named.get(role))
        named[role] = token.get("content") if isinstance(token, dict) else token
    named = {role: token for role, token in named.items() if token}
    return PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **named)


def _spaces_and_bytes(decoders: Any) -> Any:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def train_tokenizer(texts: Iterable[str], folder: Path | str, *, size: int = 1024) -> Tokenizer:
    """Trains a small tokenizer of the Llama kind: byte-pair encoding, spaces as part of the word, bytes for the rest.

    The same texts give the same file. Every text can be encoded and comes back as it was.

    Args:
      texts: to learn the pieces from.
      folder: new folder, in the layout that `transformers` reads.
      size: pieces at most, of which `SPECIAL` and 256 bytes take 261.

    Raises:
      InputError: no text, or a size without room for pieces; the folder exists.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast

    folder = Path(folder)
    first = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = [text for text in texts if text]
    if not texts or size <= len(first):
        raise InputError(
            f"tokenizer: expected texts and a size above {len(first)}, found {len(texts)} texts and size {size}"
        )
    if folder.exists():
        raise InputError(f"{folder}: expected a new folder for the tokenizer, it exists")
    fast = Fast(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fast.decoder = _spaces_and_bytes(decoders)
    fast.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=first, show_progress=False, min_frequency=2)
    )
    # The bytes were given as special tokens so that the trainer keeps them; they are not special in texts.
    content = json.loads(fast.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    fast = Fast.from_str(json.dumps(content))
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    with atomic_folder(folder) as made:
        (made / "tokenizer.json").write_text(fast.to_str(), encoding="utf-8")
        (made / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return load_tokenizer(folder)
