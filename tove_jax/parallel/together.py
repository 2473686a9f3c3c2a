"""What several processes tell each other beside their arrays: that they agree, and why one of them stops.

All of it goes through the key-value store of JAX's coordinator and nothing through the devices, so that a process
that cannot go on never leaves the others in a collective. Every function does nothing for one process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tove_jax.errors import InputError

LOST = 75
"""Exit status of a process that ends because another one did: the same command may be started again (EX_TEMPFAIL)."""
_POLL_SECONDS = 1.0
# Somebody's data may have to be copied first; one that died meanwhile is told by its heartbeat.
_WAIT_SECONDS = 3600
_STOPPED = "tove/stopped/"
# Of collectives, of NCCL, of the coordinator.
_SIGNS = r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|Connection reset|Socket closed|Barrier"
_SHOWN = 8

_round = 0
_watch: threading.Event | None = None


class LostError(RuntimeError):
    """Another process did not come in time."""


def several() -> bool:
    """Whether this process works together with others."""
    return _client() is not None


def is_first() -> bool:
    """Whether this process is the one that prints, and writes files that are written once."""
    return not several() or jax.process_index() == 0


def watch() -> None:
    """Ends this process soon after another one said by `leave` why it stops, even in the middle of a collective."""
    global _watch
    if not several() or _watch is not None:
        return
    _watch = threading.Event()
    threading.Thread(target=_watching, args=(_watch,), name="watch", daemon=True).start()
    atexit.register(_watch.set)


def leave(status: int, reason: str) -> None:
    """Ends this process at once with a status, after telling the others; they end with the same.

    Nobody is waited for, unlike at the end of a run that went well: the others cannot come.
    """
    if _watch is not None:
        _watch.set()
    try:
        _client().key_value_set(f"{_STOPPED}{jax.process_index()}", json.dumps([status, reason]))
        if jax.process_index() == 0:  # it holds the store that the others read
            time.sleep(2 * _POLL_SECONDS)
    except RuntimeError:
        pass
    _exit(status)


def is_lost(error: BaseException) -> bool:
    """Whether an error may come of another process's end; libraries raise it again as kinds of their own."""
    return several() and (
        isinstance(error, (jax.errors.JaxRuntimeError, LostError)) or re.search(_SIGNS, str(error)) is not None
    )


def lost(error: BaseException) -> None:
    """Ends this process after an error that another process's end may have caused, for that one's reason if it gave one."""
    if _watch is not None:
        _watch.set()
    for _ in range(int(3 * _POLL_SECONDS / 0.2)):
        _end_if_told()
        time.sleep(0.2)
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if not is_lost(error):
        traceback.print_exception(error)
        leave(1, reason)
    print(
        f"tove: process {jax.process_index()}: stopped, perhaps since another process is gone: {reason}",
        file=sys.stderr,
    )
    leave(LOST, reason)


def agree(facts: Mapping[str, str], seconds: float = _WAIT_SECONDS) -> None:
    """Makes sure that all processes have the same facts, before anything is computed together.

    Args:
      facts: name to value, such as settings and hashes.
      seconds: to wait for the slowest.

    Raises:
      InputError: on every process alike: which process has what in which field, against process 0.
    """
    client = _client()
    if client is None:
        return
    place, wait = _place("agree"), int(seconds * 1000)
    client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(dict(facts)))
    if jax.process_index() == 0:
        all_facts = {}
        for index in range(jax.process_count()):
            all_facts[index] = json.loads(_get(f"{place}/{index}", wait, f"process {index} to begin"))
        client.key_value_set(f"{place}/verdict", differences(all_facts))
    if verdict := _get(f"{place}/verdict", wait, "process 0 to compare what the processes were given"):
        raise InputError(verdict)


def differences(facts: Mapping[int, Mapping[str, str]]) -> str:
    """Returns what some processes have other than process 0, in words; empty when they agree."""
    first = facts[0]
    found = []
    for index, other in facts.items():
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                found.append(f"{name}: process {index} has {other.get(name)}, process 0 has {first.get(name)}")
    if not found:
        return ""
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "the processes do not agree: " + "; ".join(found[:_SHOWN]) + more


def require_common(folder: Path, seconds: float = 30.0) -> None:
    """Makes sure that all processes see one folder, as checkpoints need.

    Raises:
      InputError: a process does not find there what process 0 wrote; on every process.
    """
    client = _client()
    if client is None:
        return
    place, found = _place("common"), True
    if jax.process_index() == 0:
        token = folder / f".common-{uuid.uuid4().hex[:12]}"
        token.touch()
        client.key_value_set(place, token.name)
    name = _get(place, _WAIT_SECONDS * 1000, "process 0 to open the run's folder")
    until = time.monotonic() + seconds
    while not (found := (folder / name).exists()) and time.monotonic() < until:
        time.sleep(0.5)  # a network's file system may show a new file late
    try:
        agree({f"a disk that all processes share ({folder})": "yes" if found else "no"})
    finally:
        if jax.process_index() == 0:
            (folder / name).unlink(missing_ok=True)


def tell(name: str, value: str, seconds: float = _WAIT_SECONDS) -> str:
    """Returns on every process what process 0 says; all call it, in the same order."""
    client = _client()
    if client is None:
        return value
    place = _place(name)
    if jax.process_index() == 0:
        client.key_value_set(place, value)
    return _get(place, int(seconds * 1000), f"process 0 to tell about {name}")


def barrier(name: str, seconds: float = _WAIT_SECONDS) -> None:
    """Waits until all processes have come here."""
    if (client := _client()) is not None:
        client.wait_at_barrier(_place(name), int(seconds * 1000))


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Lets process 0 do something, such as making a file, before the others do the same and find it done."""
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)


def after_all_compiled(jitted: Any) -> Callable[..., Any]:
    """Makes a jitted function begin in all processes at the same time, though some take longer to compile it.

    Processes that meet in a collective for the first time connect, and one that waits for that longer than the library's
    half minute ends the run; waiting for the coordinator has no such limit. Only for functions that all processes call
    in the same order, with the same global shapes; those of the first argument do not change. For one process it is the
    function itself.

    Args:
      jitted: of `jax.jit`.
    """
    if not several():
        return jitted
    seen = set()

    def call(*args: Any) -> Any:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(args[1:]))
        if shapes not in seen:
            jitted.lower(*args).compile()  # JAX keeps it for the call
            barrier("compiled")
            seen.add(shapes)
        return jitted(*args)

    return call


def gather_rows(array: np.ndarray) -> list[np.ndarray]:
    """Returns every process's array, (n, ...) with any n, in the order of the processes."""
    array = np.asarray(array)
    if not several():
        return [array]
    from jax.experimental import multihost_utils

    barrier("gather")  # without the limit that a collective has for one that comes late
    counts = np.asarray(multihost_utils.process_allgather(np.int32(len(array)))).reshape(-1)
    padded = np.zeros((int(counts.max()), *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    parts = np.asarray(multihost_utils.process_allgather(padded))
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def _client() -> Any:
    # Where Orbax, too, finds it; there is no public way to the key-value store.
    from jax._src import distributed

    return distributed.global_state.client


def _place(name: str) -> str:
    global _round
    _round += 1
    return f"tove/{name}/{_round}"


def _get(key: str, milliseconds: int, what: str) -> str:
    try:
        return _client().blocking_key_value_get(key, milliseconds)
    except RuntimeError as error:
        raise LostError(f"waited {milliseconds / 1000:g} s for {what}: {str(error).splitlines()[0]}") from error


def _watching(stop: threading.Event) -> None:
    while not stop.wait(_POLL_SECONDS):
        _end_if_told(stop)


def _end_if_told(stop: threading.Event | None = None) -> None:
    try:
        told = _client().key_value_dir_get(_STOPPED)
    except (RuntimeError, AttributeError) as error:
        if stop is not None and stop.is_set():
            return
        print(f"tove: stopped, process 0 is gone: {str(error).splitlines()[0]}", file=sys.stderr)
        _exit(LOST)
    for key, value in told:
        status, reason = json.loads(value)
        print(f"tove: stopped with process {key.rpartition('/')[2]}, which said: {reason}", file=sys.stderr)
        _exit(int(status))


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
