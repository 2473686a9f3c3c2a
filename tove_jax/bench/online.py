"""What an expert costs inside the training step, against reading its store: ``python -m tove_jax.bench.online``.

Times the same run's step with all features read and decoded, and with one expert after the other computed in the
step. Runs take turns, so that a change of the machine's load meets all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tove_jax import methods
from tove_jax.config import from_file
from tove_jax.config.schema import Config
from tove_jax.data import make_source
from tove_jax.data.loader import make_loader
from tove_jax.data.split import split
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts.online import load_online, online_experts, parameter_bytes
from tove_jax.experts.run import expert_cards, open_stores
from tove_jax.parallel import make_mesh, shard_batch
from tove_jax.parallel.sharding import batch_sharding, replicated
from tove_jax.train.initial import initial_parameters, initial_state
from tove_jax.train.objective import make_loss
from tove_jax.train.optimizer import make_optimizer
from tove_jax.train.step import make_step


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to have the features.

    Attributes:
      online: experts that run in the step.
      step: milliseconds of a step on a batch that is on the devices, the median.
      input: milliseconds a batch in which ``data.threads`` read, cut and copy, without a step beside them.
      batch_mb: megabytes of a batch on the host.
      weights_mb: megabytes of these experts' weights.
    """

    online: tuple[str, ...]
    step: float
    input: float
    batch_mb: float
    weights_mb: float


def measure(config: Config, workdir: Path, *, steps: int = 10) -> list[Row]:
    """Times all experts from stores, each in the step, and all in the step.

    Args:
      config: of a run whose features are extracted, ``features.online`` is not read.
      workdir: its folder; nothing is written there.
      steps: timed, of each way.

    Raises:
      InputError: no features, or no expert that can run in the step.
    """
    every = dataclasses.replace(config, features=dataclasses.replace(config.features, online=("all",)))
    read = methods.get(config.method.name).training_experts(config)
    names = online_experts(every, read)
    if not names:
        raise InputError(f"config.features.experts: expected one that runs in JAX, found {', '.join(read)}")
    ways = [(), *((name,) for name in names), *([names] if len(names) > 1 else [])]
    params, _ = initial_parameters(config, workdir, expert_cards(config, workdir))
    runs = [_Run(config, workdir, way, read, params) for way in ways]
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(steps + 1):
        for seen, run in zip(times, runs, strict=True):
            took = run.step()
            if turn:  # the first one compiles
                seen.append(took)
    return [
        Row(
            way,
            1e3 * float(np.median(seen)),
            1e3 * run.input(steps),
            run.loader.batch_bytes / 1e6,
            parameter_bytes(run.online) / 1e6,
        )
        for way, run, seen in zip(ways, runs, times, strict=True)
    ]


class _Run:
    """One way's step, compiled, and its loader."""

    def __init__(self, config: Config, workdir: Path, way: tuple[str, ...], read: Sequence[str], params: Any) -> None:
        config = dataclasses.replace(config, features=dataclasses.replace(config.features, online=way))
        self.online = load_online(config, workdir, read)
        stores = open_stores(config, workdir, only=[name for name in read if name not in way])
        manifests = {name: store.manifest for name, store in stores.items()} | dict(self.online.manifests)
        source = make_source(config.data)
        sides = split(source.ids, config.data.held_out, salt=config.data.split_salt, limit=config.data.limit)
        words = methods.get(config.method.name).vocabulary(config, [source.captions[int(i)] for i in sides.train])
        self.loader = make_loader(
            source,
            sides.train,
            View.of_student(config.student),
            stores,
            batch=config.train.batch,
            views=self.online.views,
            captions=None if words is None else words.encode(source.captions),
            threads=config.data.threads,
            prefetch=config.data.threads,  # fewer would leave threads idle
            cache_pixels=False,
        )
        self.mesh = make_mesh(config.mesh)
        with jax.set_mesh(self.mesh):
            self._state, shardings, optimizer = initial_state(config, params, make_optimizer, self.mesh)
            self._step = jax.jit(
                make_step(config, make_loss(config, manifests), optimizer, self.online.prepare),
                in_shardings=(shardings, batch_sharding(self.mesh), self.online.shardings(self.mesh)),
                out_shardings=(shardings, replicated(self.mesh)),
            )
            self._experts = self.online.on(self.mesh)
            batches = iter(self.loader)
            self._batch = shard_batch(next(batches), self.mesh)
            batches.close()

    def step(self) -> float:
        """Returns the seconds of one step, always from the start."""
        with jax.set_mesh(self.mesh):
            began = time.perf_counter()
            jax.block_until_ready(self._step(self._state, self._batch, self._experts))
            return time.perf_counter() - began

    def input(self, count: int) -> float:
        """Returns the seconds a batch takes to be made."""
        batches = iter(self.loader)
        for _ in range(2):  # what is made while nobody looks
            next(batches)
        began = time.perf_counter()
        for _ in range(count):
            next(batches)
        took = time.perf_counter() - began
        batches.close()
        return took / count


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown, each step also as a multiple of the first one's."""
    lines = [
        "| in the step | step, ms | against stores | input, ms | batch, MB | weights, MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {', '.join(row.online) or 'none'} | {row.step:.1f} | {row.step / rows[0].step:.2f} | {row.input:.1f} | "
            f"{row.batch_mb:.2f} | {row.weights_mb:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Prints the table of a run's folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="settings file, as `tove train` takes it")
    parser.add_argument("--workdir", required=True, type=Path, help="folder with the run's features")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    args, overrides = parser.parse_known_args(argv)
    print(table(measure(from_file(args.config, overrides), args.workdir, steps=args.steps)), end="")


if __name__ == "__main__":
    main()
