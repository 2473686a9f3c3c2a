"""What `LlavaProcessor.from_pretrained` reads: the pictures' settings, the tokenizer, the conversation template."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from tove_jax.data.anyres import Anyres
from tove_jax.data.conversation import IMAGE, IMAGE_ID, Template, check_tokenizer, encode_prompt
from tove_jax.data.tokenizer import Tokenizer
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_write_bytes, atomic_write_json

FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""The files that belong to a processor, of every release."""
_PAD_TO = 64  # rows of a token embedding that has grown, as LLaVA's published conversions have it
_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def preprocessor(view: View | Anyres) -> dict[str, Any]:
    """Returns preprocessor_config.json of pictures as the view cuts them.

    ``letterbox`` has no counterpart: it is given as squeezing to a square, right for pictures brought to a square
    beforehand, and ``tove_fit`` says so.

    Raises:
      InputError: a view that transformers' processors do not know.
    """
    tiles = view if isinstance(view, Anyres) else None
    view = view.view if isinstance(view, Anyres) else view
    if view.channels != "rgb" or view.scale != 1.0 or view.flip:
        raise InputError(f"view: expected RGB, unmirrored, on a scale of one, found {view}")
    square = {"height": view.size, "width": view.size}
    cropped = tiles is not None or view.fit == "crop"
    kind = "LlavaNextImageProcessor" if tiles else "LlavaImageProcessor" if view.fit == "pad" else "CLIPImageProcessor"
    fields: dict[str, Any] = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": view.resize or view.size} if cropped else square,
        "resample": _FILTERS[view.interpolation],
        "do_center_crop": cropped,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(view.mean),
        "image_std": list(view.std),
    }
    if tiles:
        fields |= {"do_pad": True, "image_grid_pinpoints": [list(pair) for pair in tiles.resolutions]}
    elif view.fit == "pad":
        fields["do_pad"] = True
    elif view.fit == "letterbox":
        fields["tove_fit"] = view.fit
    return fields


def chat_template(template: Template, after_image: str = "") -> str:
    """Returns a conversation template in Jinja, equal to ours; a turn's pictures come before its text.

    Args:
      template: see `tove_jax.data.conversation.TEMPLATES`.
      after_image: put between a picture and its line break, see `add_image_token`.
    """

    def text(content: str) -> str:
        return "{{ " + json.dumps(content, ensure_ascii=False) + " }}" if content else ""

    before, _, after = template.opening.partition("{system}")
    opening = f"{text(before)}{{{{ ns.system }}}}{text(after)}"
    line = json.dumps(f"{IMAGE}{after_image}" + ("" if template.pictures_only else "\n"), ensure_ascii=False)
    words = "" if template.pictures_only else "{{ part['text'] | trim }}"
    told = "" if template.pictures_only else "{{ content }}"
    parts = [
        "{%- macro told(content) -%}{%- if content is string -%}",
        told,
        "{%- else -%}{%- for part in content if part['type'] == 'image' -%}{{ ",
        line,
        " }}{%- endfor -%}{%- for part in content if part['type'] == 'text' -%}",
        words,
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}",
        "{%- set ns = namespace(system=",
        json.dumps(template.system, ensure_ascii=False),
        ", first=true) -%}{%- for message in messages -%}",
        "{%- if message['role'] == 'system' -%}",
        "{%- if message['content'] is string -%}{%- set ns.system = message['content'] -%}{%- else -%}",
        "{%- set ns.system = message['content'][0]['text'] -%}{%- endif -%}",
        "{%- elif message['role'] == 'user' -%}",
        "{%- if not ns.first -%}",
        text(template.question),
        "{%- elif ns.system -%}",
        opening,
        "{%- else -%}",
        text(template.bare),
        "{%- endif -%}{%- set ns.first = false -%}{{ told(message['content']) }}",
        "{%- if not loop.last or add_generation_prompt -%}",
        text(template.reply),
        "{%- endif -%}{%- else -%}",
        text(template.lead),
        "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}",
        "{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}",
        text(template.end + template.trail),
        "{%- endif -%}{%- endfor -%}",
    ]
    return "".join(parts)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with its image token, and the rows of the token embedding that it needs.

    Attributes:
      inner: the fast tokenizer of `transformers`.
      image_token: id of ``<image>``.
      rows: of the token embedding, as many as before where they suffice.
      ends: ids at which an answer ends.
      after_image: what stands after a picture so that transformers finds the ids that LLaVA's rule gives.
      same: whether it then does.
    """

    inner: Any
    image_token: int
    rows: int
    ends: tuple[int, ...]
    after_image: str
    same: bool


def add_image_token(tokenizer: Tokenizer, template: Template, rows: int, expected: int | None = None) -> Vocabulary:
    """Gives a tokenizer the image token that transformers' LLaVA needs; the given one stays as it is.

    A tokenizer without ``<image>`` gets it as its next id. It also begins texts as ours does, pads on the left, and
    has a padding token.

    Args:
      tokenizer: the model's.
      template: of its conversations.
      rows: of the token embedding.
      expected: id of the image token where the model already has one.

    Raises:
      InputError: a tokenizer without the image token or with another one, where the model has one; one that tells
        more tokens apart than the weights have rows; one that lacks a token of the template.
    """
    check_tokenizer(template, tokenizer)
    inner = copy.deepcopy(tokenizer.inner)
    vocabulary = inner.get_vocab()
    if expected is not None and vocabulary.get(IMAGE) != expected:
        found = f"id {vocabulary[IMAGE]}" if IMAGE in vocabulary else "none"
        raise InputError(f"{tokenizer.name}: expected a tokenizer with {IMAGE} as id {expected}, found {found}")
    most = max((id for token, id in vocabulary.items() if token != IMAGE), default=-1)
    if most >= rows:
        raise InputError(
            f"{tokenizer.name}: the vocabulary does not match the weights: token {most} is beyond their {rows} rows"
        )
    if IMAGE not in vocabulary:
        from transformers import AddedToken

        inner.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    image = inner.convert_tokens_to_ids(IMAGE)
    if inner.pad_token is None:
        inner.pad_token = inner.convert_ids_to_tokens(tokenizer.pad)
    inner.padding_side = inner.init_kwargs["padding_side"] = "left"  # the latter is what is saved
    _begin(inner, tokenizer)
    rows = rows if image < rows else -(-(image + 1) // _PAD_TO) * _PAD_TO
    end = template.end.strip()
    ends = {tokenizer.end, tokenizer.token(end)} if end in template.tokens else {tokenizer.end}
    turns = [{"from": "human", "value": f"{IMAGE}\nWhat is this?"}]
    ids = encode_prompt(turns, template, tokenizer, images=1)
    wanted = [image if id == IMAGE_ID else int(id) for id in ids]
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    same, after = False, ""
    for after in (" ", ""):
        told = chat_template(template, after)
        text = inner.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=told, tokenize=False, add_generation_prompt=True
        )
        if same := inner(text)["input_ids"] == wanted:
            break
    return Vocabulary(inner, image, rows, tuple(sorted(ends)), after, same)


def _begin(inner: Any, tokenizer: Tokenizer) -> None:
    """Makes the tokenizer put the beginning before every text, where the file does not say so."""
    if tokenizer.begin is None or inner("a")["input_ids"][:1] == [tokenizer.begin]:
        return
    from tokenizers import processors

    token = inner.convert_ids_to_tokens(tokenizer.begin)
    begin = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, tokenizer.begin)]
    )
    before = inner.backend_tokenizer.post_processor
    inner.backend_tokenizer.post_processor = begin if before is None else processors.Sequence([before, begin])


def write_processor(
    folder: Path, vocabulary: Vocabulary, template: Template, view: View | Anyres, *, patch_size: int, keep_class: bool
) -> None:
    """Writes tokenizer, processor settings and conversation template into a folder."""
    kind = "LlavaNextProcessor" if isinstance(view, Anyres) else "LlavaProcessor"
    vocabulary.inner.save_pretrained(str(folder))
    atomic_write_json(folder / "preprocessor_config.json", {**preprocessor(view), "processor_class": kind})
    settings = {
        "processor_class": kind,
        "patch_size": patch_size,
        "vision_feature_select_strategy": "full" if keep_class else "default",
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,  # CLS
    }
    atomic_write_json(folder / "processor_config.json", settings)
    jinja = chat_template(template, vocabulary.after_image)
    atomic_write_bytes(folder / "chat_template.jinja", jinja.encode())


def copy_processor(source: Path, folder: Path) -> None:
    """Copies a processor's files as they are."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
