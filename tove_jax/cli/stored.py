"""Settings from a run's own folder, for commands that may be called without a config file."""

from __future__ import annotations

import argparse

from tove_jax.config.schema import Config
from tove_jax.errors import InputError


def of_run(args: argparse.Namespace) -> Config:
    """Returns the settings that the newest checkpoint of ``--workdir`` was trained with.

    Raises:
      InputError: no ``--workdir``, or no checkpoint there.
    """
    from tove_jax.train.checkpoint import load_settings

    if args.workdir is None:
        raise InputError("expected --config, or --workdir with a trained run")
    return load_settings(args.workdir)[0]
