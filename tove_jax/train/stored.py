"""Checkpoints of a run whose folder lies in an object store; what `tove_jax.train.checkpoint` keeps on a disk.

Layout below the run's folder::

    checkpoints/<step>/<attempt>-<process>-<number>.part   arrays (`tove_jax.train.pieces`)
    checkpoints/<step>/<attempt>-<process>.json            what a process has sent
    checkpoints/<step>.json                                all of it: written last, so what has it is whole
    frozen/..., frozen.json                                frozen weights, once a run
    nonfinite/...                                          the state that met a NaN or Inf

What has no such last object is never read, and is removed when the run goes on. The names of an attempt (from the
start of the processes to their end) are its own, so that a process that outlives its attempt spoils nothing.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from tove_jax.config import Config, from_json
from tove_jax.errors import InputError
from tove_jax.files.bucket import Bucket
from tove_jax.files.mirror import Mirror
from tove_jax.parallel import together
from tove_jax.train import checked
from tove_jax.train.pieces import Piece, Pieces, describe, named_leaves, own_pieces, write_pieces
from tove_jax.train.state import TrainState

FORMAT = "tove_jax-stored-1"
_POLL_SECONDS = 0.5
_WAIT_SECONDS = 1800.0


class StoredCheckpoints:
    """The checkpoints of one run's folder in an object store; see `tove_jax.train.checkpoint.Checkpoints`.

    A save copies this process's shards to the host and returns; a thread sends them. One save is on its way at a time:
    the next one waits for it.

    Args:
      mirror: the run's folder; its small files are sent with every checkpoint.
      config: the settings of this run.
      provenance: hashes and origins of what the weights came from, JSON-ready.
      name: of the folder of checkpoints.
    """

    def __init__(self, mirror: Mirror, config: Config, provenance: dict[str, Any], name: str = "checkpoints") -> None:
        self._mirror, self._bucket, self._name = mirror, mirror.bucket, name
        self.path = f"{mirror.bucket.url}/{name}"
        self._config, self._provenance = config, provenance
        self._first = together.is_first()
        self._count = jax.process_count() if together.several() else 1
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        if self._first:
            self._clean()
        begun = json.dumps([uuid.uuid4().hex[:8], max(saved_steps(self._bucket, name), default=None)])
        self._attempt, self._latest = json.loads(together.tell("checkpoints", begun))

    def latest(self) -> int | None:
        """Returns the newest whole step, or None."""
        return self._latest

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts saving; the arrays are copied before this returns, so the state may be donated.

        Raises:
          InputError: the save before this one failed.
        """
        self.wait()
        leaves = named_leaves({"trainable": state.trainable, "optimizer": _optimizer(state)})
        record = {"data": data_state, "meta": checked.meta(self._config, self._provenance)}
        self._start(f"{self._name}/{step}", own_pieces(leaves), describe(leaves), record, self._prune)
        self._latest = step

    def save_frozen(self, frozen: dict[str, Any]) -> None:
        """Stores the frozen weights once a run, so that a checkpoint is whole without its origin.

        A language model that was read from ``language.initialize`` stays there; its hash is in the provenance.
        """
        kept = checked.kept_frozen(self._config, frozen)
        there = together.tell("frozen", json.dumps(self._first and self._bucket.read("frozen.json", 0, 1) is not None))
        if kept and not json.loads(there):
            leaves = named_leaves({"trainable": kept})
            self._start("frozen", own_pieces(leaves), describe(leaves), {}, lambda: None)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores onto the shardings of ``like``, whatever mesh or process count saved it.

        Each process reads what its own devices hold.

        Args:
          step: a saved step.
          like: a state of the shapes, types and shardings wanted; its frozen part is kept.

        Returns:
          The state and the data iterator's state.

        Raises:
          InputError: not whole, damaged, of other settings or other shapes.
        """
        where = f"{self.path}/{step}"
        record = _read(self._bucket, f"{self._name}/{step}")
        checked.require_resumable(record["meta"], self._config, self._provenance, where)
        pieces = _pieces(self._bucket, record, where)
        tree = {"trainable": like.trainable, "optimizer": _optimizer(like)}
        leaves = named_leaves(tree)
        checked.require_shapes({name: shape for name, (_, shape) in pieces.arrays.items()}, leaves, where)
        found = pieces.onto(leaves)
        tree = jax.tree.unflatten(jax.tree.structure(tree), [found[name] for name in leaves])
        rest = tree["optimizer"]
        state = TrainState(rest["step"], tree["trainable"], like.frozen, rest["opt_state"], rest["bad_step"])
        return state, record["data"]

    def wait(self) -> None:
        """Blocks until a save in flight is whole in the store.

        Raises:
          InputError: the save failed.
        """
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def close(self) -> None:
        """Waits for a save in flight and closes."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _start(
        self,
        place: str,
        pieces: list[Piece],
        arrays: dict[str, Any],
        record: dict[str, Any],
        after: Callable[[], None],
    ) -> None:
        def send() -> None:
            index = jax.process_index() if together.several() else 0
            sent = write_pieces(self._bucket, f"{place}/{self._attempt}-{index:05d}", pieces)
            pieces.clear()
            if not self._first:
                self._bucket.write(f"{place}/{self._attempt}-{index:05d}.json", json.dumps(sent).encode())
                self._until(f"{place}.json", lambda text: self._attempt.encode() in text, 200)
                return
            self._mirror.push()  # first: metrics as far as this step, at least
            for other in range(1, self._count):
                text = self._until(f"{place}/{self._attempt}-{other:05d}.json", lambda text: True)
                theirs = json.loads(text)
                sent["objects"].update(theirs["objects"])
                sent["pieces"] += theirs["pieces"]
            whole = {"format": FORMAT, "attempt": self._attempt, **record, "arrays": arrays, **sent}
            self._bucket.write(f"{place}.json", json.dumps(whole).encode())
            after()

        self._pending.append(self._pool.submit(send))

    def _until(self, name: str, found: Callable[[bytes], bool], end: int | None = None) -> bytes:
        """Reads an object that another process writes, as soon as it is there."""
        until = time.monotonic() + _WAIT_SECONDS
        while True:
            text = self._bucket.read(name, *((0, end) if end else ()))
            if text is not None and found(text):
                return text
            if time.monotonic() > until:
                raise InputError(f"{self._bucket.url}/{name}: another process has not sent it in {_WAIT_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)

    def _prune(self) -> None:
        for step in saved_steps(self._bucket, self._name)[: -self._config.train.keep]:
            self._bucket.remove([f"{self._name}/{step}.json"])
            self._bucket.remove(self._bucket.sizes(f"{self._name}/{step}"))

    def _clean(self) -> None:
        """Removes what no whole save names: of attempts that were killed, or of saves whose removal was."""
        kept = {str(step) for step in saved_steps(self._bucket, self._name)}
        for name in self._bucket.sizes(self._name):
            folder, slash, _ = name.removeprefix(f"{self._name}/").partition("/")
            if slash and folder not in kept:
                self._bucket.remove([name])
        # Not while a run that met a NaN may still be sending them.
        if self._name == "checkpoints" and self._bucket.read("frozen.json", 0, 1) is None:
            self._bucket.remove(self._bucket.sizes("frozen"))


def saved_steps(bucket: Bucket, name: str = "checkpoints") -> list[int]:
    """Returns the steps that are whole in the store, the newest last."""
    pattern = re.compile(rf"{re.escape(name)}/(\d+)\.json")
    found = [pattern.fullmatch(one) for one in bucket.sizes(name)]
    return sorted(int(match[1]) for match in found if match)


def load_settings(bucket: Bucket, step: int | None) -> tuple[Config, dict[str, Any]]:
    """Reads a run's settings, and its provenance with ``step`` added; see `tove_jax.train.checkpoint.load_settings`."""
    place, step = _place(bucket, step)
    return _settings(_read(bucket, place), f"{bucket.url}/{place}", step)


def load(
    bucket: Bucket, step: int | None, wanted: Callable[[str], bool], device: jax.Device
) -> tuple[Config, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns settings, the trainable and the frozen leaves that are wanted, on a device, and the provenance."""
    place, step = _place(bucket, step)
    record = _read(bucket, place)
    config, provenance = _settings(record, f"{bucket.url}/{place}", step)
    trainable = _leaves(bucket, record, f"{bucket.url}/{place}", wanted, device)
    frozen = {}
    if bucket.read("frozen.json", 0, 1) is not None:
        frozen = _leaves(bucket, _read(bucket, "frozen"), f"{bucket.url}/frozen", wanted, device)
    return config, trainable, frozen, provenance


def _place(bucket: Bucket, step: int | None) -> tuple[str, int]:
    steps = saved_steps(bucket)
    if not steps:
        raise InputError(f"{bucket.url}/checkpoints: no whole checkpoint here; run `tove train` first")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise InputError(f"{bucket.url}/checkpoints/{step}: no such checkpoint; present: {steps}")
    return f"checkpoints/{step}", step


def _settings(record: dict[str, Any], where: str, step: int) -> tuple[Config, dict[str, Any]]:
    checked.require_format(record["meta"], where)
    return from_json(record["meta"]["config"], f"{where}/meta"), {**record["meta"]["provenance"], "step": step}


def _leaves(
    bucket: Bucket, record: dict[str, Any], where: str, wanted: Callable[[str], bool], device: jax.Device
) -> dict[str, Any]:
    pieces = _pieces(bucket, record, where)
    own = {array: path for array in pieces.arrays if (path := _leaf_path(array)) is not None}
    found = pieces.whole(lambda array: array in own and wanted(own[array]))
    return {own[array]: jax.device_put(values, device) for array, values in found.items()}


def _leaf_path(name: str) -> str | None:
    """Returns the path of a parameter from that of its array; None for the optimiser's."""
    match = re.fullmatch(r"\['trainable'\]\['(.*)'\]", name)
    return match[1] if match else None


def _read(bucket: Bucket, place: str) -> dict[str, Any]:
    text = bucket.read(f"{place}.json")
    if text is None:
        raise InputError(f"{bucket.url}/{place}: no such checkpoint, or one that is not whole")
    try:
        record = json.loads(text)
        found = record["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{bucket.url}/{place}.json: not a checkpoint of ours: {error}") from error
    if found != FORMAT:
        raise InputError(
            f"{bucket.url}/{place}.json: not a checkpoint of ours: expected format {FORMAT}, found {found}"
        )
    return record


def _pieces(bucket: Bucket, record: dict[str, Any], where: str) -> Pieces:
    try:
        return Pieces(bucket, record["arrays"], record["pieces"], where)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{where}.json: damaged: {type(error).__name__} {error}") from error


def _optimizer(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step, "bad_step": state.bad_step}
