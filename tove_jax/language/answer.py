"""What evaluation and the command line know of a vision-language model: it answers, and ranks given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from tove_jax.language.decode import Decoding


@runtime_checkable
class Answerer(Protocol):
    """A model with its tokenizer, picture view and conversation template; all calls take lists of one length.

    A prompt is the user's turn as plain text. The answerer lays the template around it and puts ``<image>`` in front
    of it, once a picture, when the text has none. An answer does not depend on what else is in the list, but for
    rounding.
    """

    def answer(self, pictures: Sequence[Sequence[np.ndarray]], prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """Answers questions about pictures.

        Args:
          pictures: of each prompt, uint8 (H, W, 3), RGB, any size, in the order of the ``<image>``; empty: text alone.
          prompts: the user's turns.
          decoding: the settings; without `Decoding.ends` the template's own ends are used, and their padding.

        Returns:
          An answer for each prompt, special tokens and outer white space removed; it may be empty.

        Raises:
          InputError: more or fewer pictures than ``<image>``, a prompt longer than the model reads.
        """
        ...

    def rank(
        self,
        pictures: Sequence[Sequence[np.ndarray]],
        prompts: Sequence[str],
        choices: Sequence[Sequence[str]],
        mean: bool = False,
    ) -> list[np.ndarray]:
        """Tells how likely each given answer is.

        Args:
          pictures: as in `answer`.
          prompts: as in `answer`; an empty one where nothing is asked.
          choices: of each prompt, at least one; their numbers may differ.
          mean: per token, so that long answers are not at a disadvantage.

        Returns:
          For each prompt float32 (choices,), log-likelihoods, natural logarithm, the end of the answer included.

        Raises:
          InputError: as `answer`, an empty choice.
        """
        ...
