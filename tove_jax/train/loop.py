"""The one training loop.

The order within an iteration is a contract: dispatch the step, fetch the next batch while the
device works, look at the step before, write metrics, save (with the iterator's state *after* the
saved step's batch), and only then go on.
"""

from __future__ import annotations

import collections
import hashlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import tove_jax
from tove_jax import methods
from tove_jax.config.schema import Config
from tove_jax.data import make_source
from tove_jax.data.dialogue import dialogues_of
from tove_jax.data.loader import Loader, make_loader
from tove_jax.data.picture import PictureSource
from tove_jax.data.split import Split, split
from tove_jax.data.view import View
from tove_jax.data.vocabulary import Vocabulary
from tove_jax.errors import InputError, NonFiniteError
from tove_jax.experts.manifest import Manifest
from tove_jax.experts.online import Online, load_online
from tove_jax.experts.run import expert_cards, open_stores, store_path
from tove_jax.experts.store import FeatureStore
from tove_jax.files import mirror
from tove_jax.files.weights import hash_arrays
from tove_jax.hf.start import start_folder
from tove_jax.parallel import check_replication, run_mesh, shard_batch, together
from tove_jax.parallel.sharding import batch_share
from tove_jax.train import started
from tove_jax.train.checked import PLACES, settings_of
from tove_jax.train.checkpoint import Checkpoints, open_checkpoints
from tove_jax.train.handover import handed_language, handed_vocabulary
from tove_jax.train.initial import initial_parameters, initial_state
from tove_jax.train.language import LanguageSide, initial_language, open_language
from tove_jax.train.metrics import MetricWriter, progress_bar, update_summary
from tove_jax.train.objective import check_attention, count, training_step
from tove_jax.train.optimizer import make_optimizer
from tove_jax.train.state import TrainState
from tove_jax.train.step import jit_step
from tove_jax.train.stored import StoredCheckpoints


def train(config: Config, workdir: Path, *, progress: bool = True, devices: Sequence[jax.Device] | None = None) -> int:
    """Trains, or goes on from the newest checkpoint of the folder.

    Args:
      config: the run's settings.
      workdir: the run's folder; features are read from its ``features`` unless the config says.
      progress: show a bar.
      devices: of the mesh; all when None.

    Returns:
      0 when all steps are done, 143 when a SIGTERM ended the run after saving.

    Raises:
      InputError: settings, features or a checkpoint that do not fit.
      NonFiniteError: after saving the state that met it.
    """
    started.watch()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir: cannot make {workdir}: {error.strerror}") from None
    mesh = run_mesh(config, devices)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.train.batch % (config.train.accumulation * shards):
        raise InputError(
            f"config.train.batch: {config.train.batch} does not divide into accumulation "
            f"{config.train.accumulation} x {shards} shards of the batch"
        )
    with together.first_before_others("start"):
        start_folder(config, workdir)
    read = methods.get(config.method.name).training_experts(config)
    online = load_online(config, workdir, read)
    read = [name for name in read if name not in online.experts]
    stores = open_stores(config, workdir, only=read)
    manifests = {name: store.manifest for name, store in stores.items()}
    flipped = open_stores(config, workdir, flip=True, only=read) if config.data.flip else None
    source, sides = open_source(config)
    words = _words(config, source, sides)
    side = open_language(config, workdir, source, sides, progress=progress)
    loader = _make_loader(config, source, sides, words, side, stores, flipped, online.views, batch_share(mesh))
    together.agree(_facts(config, source, manifests))
    if mirror.mirror_of(workdir) is None:
        together.require_common(workdir)
    check_attention(config)
    params, origins = initial_parameters(config, workdir, expert_cards(config, workdir))
    with jax.set_mesh(mesh):
        if side is not None:
            handed = handed_language(config, side.origins)
            params["language"] = initial_language(config, side.model, mesh, handed)
            origins |= side.origins | ({"source_language": hash_arrays(handed)} if handed else {})
        provenance = _provenance(config, workdir, manifests, origins)
        provenance |= {f"expert/{name}": expert.weights_hash for name, expert in online.experts.items()}
        if words is not None:
            provenance["vocabulary"] = words.hash
        together.agree({f"weights/{name}": str(value) for name, value in provenance.items()})
        state, shardings, optimizer = initial_state(config, params, make_optimizer, mesh)
        check_replication(state, mesh, config.train.replicated_limit_mb)
        experts = online.on(mesh)
        check_replication(experts, mesh, config.train.replicated_limit_mb)
        del params
        checkpoints = open_checkpoints(workdir, config, provenance)
        latest = checkpoints.latest()
        batches = iter(loader)
        if latest is not None:
            state, data_state = checkpoints.restore(latest, state)
            batches.set_state(data_state)
        if words is not None and not jax.process_index():
            words.write(workdir)
        _announce(config, state, mesh, latest, online)
        step = training_step(config, manifests, online, None if side is None else side.model, optimizer)
        step = jit_step(step, shardings, online.shardings(mesh), mesh, overlap=config.mesh.overlap)
        try:
            run = _Run(config, workdir, mesh, batches, source, checkpoints, provenance, progress)
            return run.go(lambda state, batch: step(state, batch, experts), state, latest or 0)
        except Exception as error:
            if together.is_lost(error):
                together.lost(error)  # at once: closing would wait for the other's part of a save
            raise
        finally:
            batches.close()
            checkpoints.close()


def open_source(config: Config) -> tuple[PictureSource, Split]:
    """Opens the pictures of a run, and says which train."""
    source = make_source(config.data)
    return source, split(source.ids, config.data.held_out, salt=config.data.split_salt, limit=config.data.limit)


def _words(config: Config, source: PictureSource, sides: Split) -> Vocabulary | None:
    told = [source.captions[int(index)] for index in sides.train]
    words = methods.get(config.method.name).vocabulary(config, told)
    # A caption head that is handed over keeps its words.
    return words if words is None else handed_vocabulary(config) or words


def _make_loader(
    config: Config,
    source: PictureSource,
    sides: Split,
    words: Vocabulary | None,
    side: LanguageSide | None,
    stores: dict[str, FeatureStore],
    flipped: dict[str, FeatureStore] | None,
    views: Mapping[str, View],
    share: tuple[int, int],
) -> Loader:
    return make_loader(
        source,
        sides.train,
        View.of_student(config.student),
        stores,
        batch=config.train.batch,
        seed=config.train.seed,
        flip_readers=flipped,
        views=views,
        captions=None if words is None else words.encode(source.captions),
        texts=None if side is None else side.texts,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        process_index=share[0],
        process_count=share[1],
    )


def _provenance(
    config: Config, workdir: Path, manifests: dict[str, Manifest], origins: dict[str, str]
) -> dict[str, Any]:
    """Returns the hash of every frozen weight behind the run, after checking the stores against those known."""
    known = {"expert/clip": origins["start"], **origins}
    for name, manifest in manifests.items():
        if f"expert/{name}" in known:
            manifest.require(store_path(config, workdir, name), weights_hash=known[f"expert/{name}"])
    return {**origins, **{f"expert/{name}": manifest.weights_hash for name, manifest in manifests.items()}}


def _facts(config: Config, source: PictureSource, manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """Returns what all processes of a run must have alike; where things lie may differ from machine to machine."""
    ids = hashlib.sha256("\0".join(source.ids).encode()).hexdigest()
    return {
        "version": f"tove_jax {tove_jax.__version__}, jax {jax.__version__}",
        **{f"config.{name}": repr(value) for name, value in settings_of(config).items() if name not in PLACES},
        "data": f"{len(source.ids)} pictures, ids {ids[:16]}",
        **{f"features/{name}": manifest.identity() for name, manifest in manifests.items()},
    }


def _announce(config: Config, state: TrainState, mesh: Any, latest: int | None, online: Online) -> None:
    if jax.process_index():
        return
    where = "from the start" if latest is None else f"resumed at step {latest}"
    print(
        f"train: {count(state.trainable):,} trainable and {count(state.frozen):,} frozen parameters, "
        f"batch {config.train.batch}, {config.train.steps} steps, mesh {dict(mesh.shape)} on "
        f"{jax.devices()[0].device_kind}, {where}"
        + (f"; in the step: {', '.join(online.experts)}" if online.experts else ""),
        file=sys.stderr,
    )


@contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields a function that says after every step whether to save and stop, since a SIGTERM came.

    Of several processes, all stop after the same step, whichever of them got the signal: JAX listens for it and settles
    on a step that none has passed.
    """
    if together.several():
        yield multihost_utils.reached_preemption_sync_point
        return
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield lambda step: event.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


class _Run:
    """The loop's own bookkeeping; everything numeric is in the step."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        mesh: Any,
        batches: Any,
        source: PictureSource,
        checkpoints: Checkpoints | StoredCheckpoints,
        provenance: dict[str, Any],
        progress: bool,
    ) -> None:
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.batches, self.source = batches, source
        self.checkpoints, self.provenance = checkpoints, provenance
        self.main, self.shares = jax.process_index() == 0, batch_share(mesh)[1]
        self.progress = progress and self.main
        self.waited = 0.0
        self.records: collections.deque[tuple[int, dict[str, np.ndarray]]] = collections.deque(maxlen=3)

    def fetch(self) -> tuple[Any, dict[str, np.ndarray], dict[str, Any]]:
        """Takes the next batch; returns it on the devices, what it holds, and the iterator's state after it."""
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - began
        held = {"records": batch["record"]}
        if "text" in batch:
            held["conversations"] = batch["text"]["dialogue"]
        return shard_batch(batch, self.mesh), held, self.batches.get_state()

    def go(self, step: Any, state: TrainState, done: int) -> int:
        config, total = self.config, self.config.train.steps
        if done >= total:
            if self.main:
                print(f"train: all {total} steps are done already", file=sys.stderr)
            return 0
        self.checkpoints.save_frozen(state.frozen)
        writer = MetricWriter(self.workdir, done, self.main)
        bar = progress_bar(total, done, self.progress)
        following = self.fetch()
        self.waited, began, logged = 0.0, None, done
        previous: tuple[int, dict[str, Any]] | None = None
        first, last, pictures = None, None, 0
        rates: list[tuple[float, float]] = []
        with _sigterm() as stop:
            for number in range(done + 1, total + 1):
                batch, records, data_state = following
                self.records.append((number, records))
                state, metrics = step(state, batch)
                if number < total:
                    following = self.fetch()
                ending = stop(number) or number == total
                saving = ending or number % config.train.checkpoint_every == 0
                # One step is always in flight; the one before it is looked at, so the device never waits.
                for at, values in ([previous] if previous else []) + ([(number, metrics)] if saving else []):
                    self._check(state, values)
                    if began is None:  # The first step compiles.
                        if self.main:
                            started.tell()
                        began, self.waited, logged = time.perf_counter(), 0.0, at
                    pictures += self._pictures(at) if at > logged else 0
                    bar.update(1)
                    if at == 1 or at % config.train.log_every == 0 or at == total:
                        row = dict(values)
                        if at > logged:
                            seconds = time.perf_counter() - began
                            row["perf/images_per_s"] = pictures / seconds
                            row["perf/tokens_per_s"] = row["perf/images_per_s"] * self._tokens()
                            row["perf/data_wait"] = self.waited / seconds
                            rates.append((row["perf/images_per_s"], row["perf/data_wait"]))
                            began, self.waited, logged, pictures = time.perf_counter(), 0.0, at, 0
                        writer.write(at, row)
                        last = float(values["loss/total"])
                        first = last if at == 1 else first
                        bar.set_postfix_str(f"loss {last:.4f}, data wait {rates[-1][1] if rates else 0:.1%}")
                previous = None if saving else (number, metrics)
                if saving:
                    self.checkpoints.save(number, state, data_state)
                if ending:
                    break
            bar.close()
            writer.close()
            self.checkpoints.wait()  # still deaf to a second SIGTERM
        if self.main:
            self._summarise(first, last, rates)
        if number < total:
            if self.main:
                print(f"train: SIGTERM: saved step {number}, stopped", file=sys.stderr)
            return 143
        return 0

    def _held(self, step: int) -> dict[str, np.ndarray]:
        """Returns what this process's share of a late step's batch held."""
        return next((held for number, held in self.records if number == step), {})

    def _pictures(self, step: int) -> int:
        """Returns the pictures of a late step's batch, of all processes; a row of text may have several, or share one."""
        return self.shares * int((self._held(step)["records"] >= 0).sum())

    def _tokens(self) -> int:
        return (self.config.student.image_size // self.config.student.patch_size) ** 2 + 1

    def _check(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Stops on a non-finite step; reads only a step that has ended, or the one being saved."""
        if np.isfinite(float(metrics["loss/total"])) and np.isfinite(float(metrics["optim/gradient_norm"])):
            return
        bad = int(state.bad_step) + 1
        here = self._held(bad)
        named: dict[str, list[str]] = {}
        for what in sorted(here):
            rows = np.concatenate(together.gather_rows(here[what][here[what] >= 0].astype(np.int32)))
            places = dict.fromkeys(rows.tolist())
            dialogues = dialogues_of(self.source) if what == "conversations" else ()
            named[what] = [dialogues[row].id if dialogues else self.source.ids[row] for row in places]
        kept = open_checkpoints(self.workdir, self.config, self.provenance, name="nonfinite")
        kept.save(bad, state, named)
        kept.close()
        raise NonFiniteError(
            f"step {bad}: loss {float(metrics['loss/total'])}, gradient norm "
            f"{float(metrics['optim/gradient_norm'])}; "
            + "".join(f"{what} of its batch: {', '.join(ids)}; " for what, ids in sorted(named.items(), reverse=True))
            + f"the state that met it is in {kept.path}/{bad}"
        )

    def _summarise(self, first: float | None, last: float | None, rates: list[tuple[float, float]]) -> None:
        summary: dict[str, float] = {}
        if first is not None:
            summary["train/loss/first"] = first
        if last is not None:
            summary["train/loss/last"] = last
        if rates:
            summary["perf/images_per_s"] = float(np.median([rate for rate, _ in rates]))
            summary["perf/data_wait"] = float(np.mean([wait for _, wait in rates]))
        update_summary(self.workdir, summary)
