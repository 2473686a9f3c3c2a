"""How VQA answers are brought to one spelling before they are compared.

The rules are those of the VQA evaluation (Antol et al., arXiv:1505.00468; visualqa.org), whose odd corners are kept
since published numbers depend on them; `tests/eval/tasks/test_words.py` holds cases of each.
"""

from __future__ import annotations

import re

_SPELLED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_SPELLED)}}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Taken out; colon, apostrophe and full stop are treated otherwise."""

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspellings() -> dict[str, str]:
    """Every contraction with one of its apostrophes left out."""
    found = {"somebody'd": "somebodyd"}  # the one entry of the published table that goes the other way
    for word in _CONTRACTED.split():
        for place, sign in enumerate(word):
            if sign == "'":
                found[word[:place] + word[place + 1 :]] = word
    return found


CONTRACTIONS = _misspellings()

# Written in the reference as a look-behind with a slip, so it is a look-ahead that never matters: a full stop goes
# unless a digit follows it. Only the first 32 go, since flags stand where the count belongs.
_FULL_STOP = re.compile(r"\.(?!\d)")
_STOPS = 32
_VQA_COMMA = re.compile(r"\d,\d")


def strip_punctuation(text: str) -> str:
    """Removes `PUNCTUATION` and full stops.

    A sign with a space on either side somewhere in the text, or any sign where the text has a comma between digits, is
    removed everywhere; another one becomes a space.
    """
    joined = _VQA_COMMA.search(text) is not None
    result = text
    for sign in PUNCTUATION:
        apart = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if joined or apart else " ")
    return _FULL_STOP.sub("", result, count=_STOPS)


def plain_words(text: str) -> str:
    """Lower case; number words up to ten as digits, articles left out, apostrophes of contractions put back."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    """Line ends and tabs as spaces, none outside."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize(text: str) -> str:
    """The VQA evaluation's normalisation of a predicted answer."""
    return plain_words(strip_punctuation(one_line(text)))


def normalize_challenge(text: str) -> str:
    """TextVQA's normalisation, of its evaluation server and of M4C: the same after commas and ``?`` are dropped and a
    possessive ``'s`` is set apart.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize(text)
