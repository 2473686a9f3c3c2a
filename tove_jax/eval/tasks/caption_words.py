"""Captions as words, as the COCO caption evaluation counts them: Penn Treebank tokens, lower case, without punctuation.

The evaluation runs Stanford's tokenizer, a Java program. These rules give the same words on captions; what is known to
differ stands in `docs/evaluation.md`, and `tests/goldens/captions.json` holds what the program said.
"""

from __future__ import annotations

import re

DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""What the evaluation leaves out. Brackets stay, as ``-lrb-`` and the like: its list has them in capitals."""

_SIGNS = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...", "\u2013": "--", "\u2014": "--",
        "\u00a0": " ", "\u20ac": "$", "\u00a3": "#", "\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4",
    }
)  # fmt: skip
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "\u00a2": "cents"}
_SPLIT = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "gimme": ("gim", "me"), "lemme": ("lem", "me"), "'tis": ("'t", "is"), "'twas": ("'t", "was"),
}  # fmt: skip
_ABBREVIATIONS = (
    "mr mrs ms dr prof st ave blvd rd mt jr sr gen lt capt sgt rev gov sen rep pres vs etc inc ltd co corp bros dept "
    "est jan feb mar apr jun jul aug sep sept oct nov dec mon tues wed thurs fri ph.d cf al univ esq mlle "
    "mme messrs assn intl"
).split()

_CLITIC = r"(?:'(?:s|re|ve|ll|d|m)(?![^\W_]))"
_LETTERS = r"[^\W\d_]"
_PATTERN = re.compile(
    rf"""
    (?:https?://|www\.)[^\s()]+ | \S+@\S+\.\w+ | [a-z][\w-]*\.(?:com|org|net|edu|gov)\b   # addresses
    | </?[a-z][^<>\s]*>                                                              # tags
    | (?:{"|".join(_ABBREVIATIONS)})\.(?!\w)
    | no\.(?=\s*\d)
    | {_LETTERS}(?:\.{_LETTERS})+(?:\.(?!\d)-?)?(?:(?<=[.-])\w+)?                   # u.s., t.v, p.m.
    | (?-i:(?<![^\W_])(?:[A-Z]\.(?=\s*[^\w\s]|\s+\w)|[a-z]\.(?!\s*[A-Z.\w])|[a-z]\.(?=\s+[a-z])))  # an initial
    | (?<![\w/])\d+[ ]\d/\d(?![\w/]) | \d{{1,2}}:\d\d(?=[ap]m\b) | \d+\.\d+(?={_LETTERS})
    | [+-]?(?<![^\W_][+-])\d*[.,:/-]?\d+(?:[.,:/-]\d+)*(?=\s|$|{_CLITIC}|[^\w/-])   # numbers
    | '\d\ds(?![^\W_])
    | '(?:tis|twas)(?![^\W_])
    | '(?:em|n'|n|til|cause)(?![^\W_])
    | y'(?=[^\W_]) | ol'
    | (?:o|d|l|ma)'(?=[^\W_]{{2}})[^\W_]+(?:-[^\W_]+)*                             # o'clock
    | [@\#]{_LETTERS}\w+
    | \w+?(?=n't(?![^\W_])) | n't(?![^\W_])
    | (?-i:[A-Z]+(?:&[A-Z]+)+)(?![^\W_])
    | [^\W_]+(?:(?:[-/_+]|\.(?=[a-z]))[^\W_]+)*(?:\+\+|\#)? | _+ | {_CLITIC}
    | [?!]+ | \#+(?!\d) | \.\.\. | -- | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def split_words(caption: str) -> list[str]:
    """Returns a caption's words.

    Args:
      caption: as written.

    Returns:
      Lower case, contractions divided (``is n't``), without the signs of `DROPPED`.
    """
    found: list[str] = []
    for match in _PATTERN.finditer(caption.translate(_SIGNS)):
        # A number and its fraction are one word, with a space that does not divide it.
        token = match[0].lower().replace(" ", "\u00a0")
        if token in DROPPED or token == '"' or token > "\uffff":
            continue
        found.extend(_SPLIT.get(token, (_BRACKETS.get(token, token),)))
    return found
