"""What a method is: the functions that training, evaluation and merging call, said once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from tove_jax.config.schema import Config
from tove_jax.data.vocabulary import Vocabulary
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.models.vit import VisionTransformer


class Method(Protocol):
    """A module of pure functions and one table; its file adds what is its own to what stands here.

    B rows, N patch tokens of the student, D its width. ``config`` is always a whole run's settings.

    Attributes:
      LOGICAL_AXES: first-match rules from paths of the parameters that `init_extra` makes to logical axes.
    """

    LOGICAL_AXES: Any

    def init_extra(
        self, config: Config, contracts: dict[str, ExpertCard], student_tokens: int, rng: jax.Array
    ) -> dict[str, Any]:
        """Draws the parameters that train beside the student, float32.

        Args:
          config: the settings.
          contracts: card of every expert.
          student_tokens: N; CLS is not counted.
          rng: key.

        Raises:
          InputError: settings, experts and student that do not fit each other.
        """
        ...

    def forward(
        self,
        student: VisionTransformer,
        params: dict[str, Any],
        pixels: jax.Array,
        features: dict[str, ExpertFeatures],
        config: Config,
        key: jax.Array,
    ) -> dict[str, jax.Array]:
        """Runs the student as training needs it.

        Args:
          student: the module, with its adapters.
          params: ``{"student", "method"}``; of a merge ``{"student", "teacher"}``.
          pixels: (B, size, size, 3), normalised.
          features: decoded, of `training_experts`; those of others are not looked at.
          config: the settings.
          key: of whatever is drawn while training.

        Returns:
          What `objective` reads.
        """
        ...

    def objective(
        self,
        params: dict[str, Any],
        outputs: dict[str, jax.Array],
        features: dict[str, ExpertFeatures],
        batch: dict[str, Any],
        config: Config,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the loss of a batch; losses are float32 at the least.

        Args:
          params: what `init_extra` returned.
          outputs: what `forward` returned.
          features: as for `forward`.
          batch: ``mask`` bool (B,), False for padded rows, and what the method says.
          config: the settings.

        Returns:
          The scalar loss, and scalars, ``loss/total`` among them.
        """
        ...

    def tokens(
        self,
        student: VisionTransformer,
        params: dict[str, Any],
        pixels: jax.Array,
        features: dict[str, ExpertFeatures],
        config: Config,
    ) -> jax.Array:
        """Returns the patch tokens (B, N, D) of the encoder as it is deployed.

        Args:
          student: the module, with its adapters.
          params: as for `forward`.
          pixels: (B, size, size, 3), normalised.
          features: decoded, of `deployed_experts`.
          config: the settings.
        """
        ...

    def visible_tokens(self, outputs: dict[str, jax.Array], config: Config) -> jax.Array:
        """Returns the patch tokens (B, N, D) that a language model reads while training.

        Args:
          outputs: what `forward` returned.
          config: the settings.
        """
        ...

    def training_experts(self, config: Config) -> tuple[str, ...]:
        """Returns the names of the experts whose features training reads."""
        ...

    def deployed_experts(self, config: Config) -> tuple[str, ...]:
        """Returns the names of the experts that must run beside the encoder when it is deployed."""
        ...

    def vocabulary(self, config: Config, captions: Sequence[str | None]) -> Vocabulary | None:
        """Returns the words of captions that `objective` reads, from the training captions; None: it reads none."""
        ...
