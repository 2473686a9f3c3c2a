"""Settings that follow from those of another run: fewer experts attached, or the run merged into a plain tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tove_jax.config.schema import AdapterConfig, Config, MergeConfig, ToVEConfig
from tove_jax.errors import InputError, nearest

#: Groups of a merge: a tenth of the learning rate, for the tower begins close to where it shall end. [choice of ours]
MERGE_GROUPS: tuple[tuple[str, float | None], ...] = (
    ("student/.*", 0.1),
    ("teacher/.*", None),
    ("language/.*", None),
)
#: Fields of `MergeConfig` that the source decides.
MERGE_SOURCE_FIELDS = ("name", "source", "source_step", "source_method", "source_adapter")


def attached_experts(config: Config) -> tuple[str, ...]:
    """Returns the names of the experts that a run's deployed encoder needs beside it, by its settings alone."""
    method, hub = config.method, config.features.names
    if not isinstance(method, ToVEConfig):
        return ()
    return hub if method.attach_all else tuple(name for name in hub if name in method.attached)


def detach(config: Config, names: Sequence[str]) -> Config:
    """Returns a ToVE run's settings with some of its attached experts taken off.

    Args:
      config: the run's settings.
      names: experts to detach.

    Raises:
      InputError: another method's run, or an expert that is not attached.
    """
    method = config.method
    if not isinstance(method, ToVEConfig):
        raise InputError(f"detached: expected a run of ToVE, found config.method.name '{method.name}'")
    attached = attached_experts(config)
    for name in names:
        if name not in attached:
            known = f"{nearest(str(name), attached)}; attached: {', '.join(attached) or 'none'}"
            raise InputError(f"detached: {name!r} is not attached{known}")
    kept = tuple(name for name in attached if name not in names)
    return dataclasses.replace(config, method=dataclasses.replace(method, attach_all=False, attached=kept))


def merged(config: Config, *, source: str = "", step: int = 0) -> Config:
    """Returns the settings that merge a run into a plain tower.

    Pictures, features, optimiser and loop are those of the run; the tower trains with a tenth of the learning
    rate (`MERGE_GROUPS`), and a text loss stays, by the run's own
    caption head or language model, which are frozen.

    Args:
      config: the run's settings.
      source: the run's folder.
      step: a saved step of it; 0: its last.

    Raises:
      InputError: a run that is itself merged.
    """
    if isinstance(config.method, MergeConfig):
        raise InputError("merge: expected a run with experts or adapters to merge, found one that is merged already")
    method = MergeConfig(
        source=source,
        source_step=step,
        source_method=config.method,
        source_adapter=config.student.adapter,
        text_weight=config.method.text_weight if isinstance(config.method, ToVEConfig) else 0.0,
    )
    return dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, adapter=AdapterConfig(kind="none")),
        method=method,
        optim=dataclasses.replace(config.optim, groups=MERGE_GROUPS),
    )
