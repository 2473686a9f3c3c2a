"""The student's start: one CLIP folder that the student, the `clip` expert and the evaluation share."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from tove_jax.config.schema import AdapterConfig, Config
from tove_jax.files import mirror
from tove_jax.files.atomic import atomic_folder
from tove_jax.models import vit


def start_folder(config: Config, workdir: Path) -> Path | str:
    """Returns where the student starts, making it when it starts from nothing.

    Args:
      config: ``student.initialize`` names a CLIP folder or hub id; empty starts from random weights,
        drawn from ``train.seed``.
      workdir: the run's folder; a random start is kept in its ``start``, so that every command of
        the run sees the same one. A run that goes on from another (``train.start_from``) has that one's.

    Returns:
      A folder, or the hub id as it is.
    """
    if config.student.initialize:
        return config.student.initialize
    folder = Path(workdir) / "start"
    handed = Path(mirror.located(config.train.start_from)) / "start"
    if not folder.exists() and config.train.start_from and handed.is_dir():
        with atomic_folder(folder) as temporary:
            shutil.copytree(handed, temporary, dirs_exist_ok=True)
    if not folder.exists():
        from tove_jax.hf.export import save_start

        plain = vit.from_config(dataclasses.replace(config.student, adapter=AdapterConfig(kind="none")))
        size = config.student.image_size
        params = plain.init(jax.random.key(config.train.seed), jnp.zeros((1, size, size, 3)))["params"]
        save_start(config, jax.device_get(params), folder)
    return folder
