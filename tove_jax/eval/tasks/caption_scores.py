"""CIDEr, BLEU and ROUGE-L over words, with the numbers of the COCO caption evaluation.

Captions come as lists of words (`caption_words.split_words`); each candidate has one or more references.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

import numpy as np

Words = Sequence[str]
ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0
_BETA = 1.2
# The evaluation's guards against division by zero; they keep BLEU-4 of short corpora above zero.
_TINY, _SMALL = 1e-15, 1e-9


def ngrams(words: Words) -> collections.Counter[tuple[str, ...]]:
    """Counts of all runs of 1 to 4 words."""
    return collections.Counter(
        tuple(words[start : start + order]) for order in ORDERS for start in range(len(words) - order + 1)
    )


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[np.ndarray, np.ndarray]:
    """BLEU (Papineni et al., ACL 2002), with the reference length that is closest, the shorter one of equally close.

    Args:
      candidates: n captions.
      references: of each, at least one.

    Returns:
      float64 (4,): BLEU-1 to BLEU-4 of the corpus, counts summed before dividing; and (n, 4), of each caption alone.
    """
    right, guessed = np.zeros((len(candidates), 4)), np.zeros((len(candidates), 4))
    lengths = np.zeros((len(candidates), 2))
    for row, (candidate, given) in enumerate(zip(candidates, references, strict=True)):
        most: collections.Counter[tuple[str, ...]] = collections.Counter()
        for reference in given:
            most |= ngrams(reference)
        for gram, count in (ngrams(candidate) & most).items():
            right[row, len(gram) - 1] += count
        guessed[row] = [max(0, len(candidate) - order + 1) for order in ORDERS]
        closest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in given)[1]
        lengths[row] = len(candidate), closest

    def scores(right: np.ndarray, guessed: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        precisions = (right + _TINY) / (guessed + _SMALL)
        means = np.cumprod(precisions, axis=-1) ** (1 / np.array(ORDERS))
        ratio = (lengths[..., 0] + _TINY) / (lengths[..., 1] + _SMALL)
        return means * np.exp(np.minimum(0.0, 1 - 1 / ratio))[..., None]

    return scores(right.sum(0), guessed.sum(0), lengths.sum(0)), scores(right, guessed, lengths)


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """ROUGE-L (Lin, 2004) as COCO's: F with beta 1.2 of the best precision and best recall over the references.

    Args:
      candidates: n captions.
      references: of each, at least one.

    Returns:
      float64 (n,).
    """
    found = np.zeros(len(candidates))
    for row, (candidate, given) in enumerate(zip(candidates, references, strict=True)):
        shared = [_longest_common(candidate, reference) for reference in given]
        precision = max(shared) / max(len(candidate), 1)
        recall = max(count / max(len(reference), 1) for count, reference in zip(shared, given, strict=True))
        if precision and recall:
            found[row] = (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    return found


def _longest_common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        corner = 0
        for place, other in enumerate(second, 1):
            corner, row[place] = row[place], corner + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """CIDEr-D (Vedantam et al., arXiv:1411.5726), which the COCO evaluation calls CIDEr.

    Weights of words are counted over the references given here, so a score depends on the whole set.

    Args:
      candidates: n captions.
      references: of each, at least one.

    Returns:
      float64 (n,), from 0 to 10; the corpus' score is their mean.
    """
    counted = [[ngrams(reference) for reference in given] for given in references]
    documents: collections.Counter[tuple[str, ...]] = collections.Counter()
    for given in counted:
        documents.update(set().union(*given))
    everything = math.log(len(candidates))

    def weigh(counts: collections.Counter[tuple[str, ...]]) -> tuple[dict[tuple[str, ...], float], np.ndarray, int]:
        weights = {gram: count * (everything - math.log(max(1, documents[gram]))) for gram, count in counts.items()}
        squares = np.zeros(4)
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
        # The evaluation takes the number of pairs of words as the length.
        return weights, np.sqrt(squares), sum(count for gram, count in counts.items() if len(gram) == 2)

    found = np.zeros(len(candidates))
    for row, (candidate, given) in enumerate(zip(candidates, counted, strict=True)):
        ours, norm, length = weigh(ngrams(candidate))
        for reference in given:
            theirs, other_norm, other_length = weigh(reference)
            shared = np.zeros(4)
            for gram, weight in ours.items():
                if other := theirs.get(gram, 0.0):
                    shared[len(gram) - 1] += min(weight, other) * other
            norms = norm * other_norm
            cosines = np.divide(shared, norms, out=np.zeros(4), where=norms > 0)
            found[row] += cosines.mean() * math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
        found[row] *= 10 / len(given)
    return found
