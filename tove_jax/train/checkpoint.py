"""Checkpoints by Orbax: trainable state, optimiser, data iterator, settings, and where the frozen came from.

Layout of a run's folder::

    checkpoints/<step>/{trainable,optimizer,data,meta}     the last `train.keep` steps
    frozen/                                                frozen weights, once a run
    nonfinite/<step>/...                                   the state that met a NaN or Inf

A run that lies in an object store has them there, in another layout: `tove_jax.train.stored`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from tove_jax.config import Config, from_json
from tove_jax.config.schema import MergeConfig
from tove_jax.errors import InputError
from tove_jax.files import mirror
from tove_jax.methods.merge import fold
from tove_jax.parallel import together
from tove_jax.train import checked, stored
from tove_jax.train.state import TrainState, merge


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _manager(path: Path, **options: Any) -> ocp.CheckpointManager:
    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp.CheckpointManager(
        path,
        item_handlers={
            "trainable": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(**options),
    )


class Checkpoints:
    """The checkpoints of one run's folder.

    Args:
      workdir: the run's folder.
      config: the settings of this run.
      provenance: hashes and origins of what the weights came from, JSON-ready.
      name: sub-folder; ``checkpoints`` but for the one kept after a non-finite step.
    """

    def __init__(self, workdir: Path, config: Config, provenance: dict[str, Any], name: str = "checkpoints") -> None:
        self.path = (workdir / name).absolute()
        self._config = config
        self._provenance = provenance
        self._frozen: ocp.StandardCheckpointer | None = None
        try:
            self._manager = _manager(self.path, max_to_keep=config.train.keep, cleanup_tmp_directories=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot keep checkpoints here: {error}") from None

    def latest(self) -> int | None:
        """Returns the newest saved step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts saving; the arrays are copied before this returns, so the state may be donated.

        Raises:
          InputError: the disk is full or the folder cannot be written.
        """
        self._wait_frozen()  # a checkpoint without them would not be whole
        optimizer = {"opt_state": state.opt_state, "step": state.step, "bad_step": state.bad_step}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    trainable=ocp.args.StandardSave(state.trainable),
                    optimizer=ocp.args.StandardSave(optimizer),
                    data=ocp.args.JsonSave(data_state),
                    meta=ocp.args.JsonSave(checked.meta(self._config, self._provenance)),
                ),
                force=True,
            )
        except OSError as error:
            raise InputError(f"{self.path}: saving step {step} failed: {error}") from None

    def save_frozen(self, frozen: dict[str, Any]) -> None:
        """Stores the frozen weights once a run, so that a checkpoint is whole without its origin.

        The arrays are copied before this returns; what is written beside the first steps is there before one is saved.
        A language model that was read from ``language.initialize`` stays there; its hash is in the provenance.
        """
        path = self.path.parent / "frozen"
        frozen = checked.kept_frozen(self._config, frozen)
        if frozen and not path.exists():
            self._frozen = ocp.StandardCheckpointer()
            self._frozen.save(path, frozen)
            if together.several():  # its barriers would meet others, in another order in each process
                self._wait_frozen()

    def _wait_frozen(self) -> None:
        if self._frozen is None:
            return
        checkpointer, self._frozen = self._frozen, None
        try:
            checkpointer.close()
        except OSError as error:
            raise InputError(f"{self.path.parent}: saving the frozen weights failed: {error}") from None

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores onto the shardings of ``like``, whatever mesh or process count saved it.

        Args:
          step: a saved step.
          like: a state of the shapes, types and shardings wanted; its frozen part is kept.

        Returns:
          The state and the data iterator's state.

        Raises:
          InputError: not one of our checkpoints, truncated, of other settings or other shapes.
        """
        where = self.path / str(step)
        meta = _read_meta(self._manager, where, step)
        checked.require_resumable(meta, self._config, self._provenance, where)
        optimizer = {"opt_state": like.opt_state, "step": like.step, "bad_step": like.bad_step}
        saved = _saved_shapes(self._manager, where, step, "trainable")
        checked.require_shapes({name: leaf.shape for name, leaf in saved.items()}, like.trainable, where / "trainable")
        restored = _restore(
            self._manager,
            where,
            step,
            trainable=ocp.args.StandardRestore(_abstract(like.trainable)),
            optimizer=ocp.args.StandardRestore(_abstract(optimizer)),
            data=ocp.args.JsonRestore(),
        )
        rest = restored.optimizer
        state = TrainState(rest["step"], restored.trainable, like.frozen, rest["opt_state"], rest["bad_step"])
        return state, restored.data

    def wait(self) -> None:
        """Blocks until a save in flight is on disk.

        Raises:
          InputError: the save failed.
        """
        self._wait_frozen()
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise InputError(f"{self.path}: saving failed: {error}") from None

    def close(self) -> None:
        """Waits for a save in flight and closes."""
        self.wait()
        self._manager.close()


def open_checkpoints(
    workdir: Path, config: Config, provenance: dict[str, Any], name: str = "checkpoints"
) -> Checkpoints | stored.StoredCheckpoints:
    """Opens the checkpoints of a run's folder, wherever the folder lies; see `Checkpoints`.

    Raises:
      InputError: the folder cannot be written.
    """
    found = mirror.mirror_of(workdir)
    if found is not None:
        return stored.StoredCheckpoints(found, config, provenance, name)
    return Checkpoints(workdir, config, provenance, name)


def is_run(folder: Path | str) -> bool:
    """Whether a folder is a run's, and not an export's."""
    bucket = mirror.bucket_of(folder)
    return (Path(folder) / "checkpoints").is_dir() if bucket is None else mirror.is_run(bucket)


def _read_meta(manager: ocp.CheckpointManager, where: Path, step: int) -> dict[str, Any]:
    meta = _restore(manager, where, step, meta=ocp.args.JsonRestore()).meta
    checked.require_format(meta, where)
    return meta


def _restore(manager: ocp.CheckpointManager, where: Path, step: int, **items: Any) -> Any:
    if not where.is_dir():
        raise InputError(f"{where}: no such checkpoint; present: {sorted(manager.all_steps())}")
    absent = [name for name in items if not (where / name).is_dir()]
    if absent:
        raise InputError(f"{where}: not a whole checkpoint of ours: {', '.join(absent)} missing")
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore raise many kinds for one cause: unreadable files.
        if together.is_lost(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(" [tensorstore_spec")[0]
        raise InputError(f"{where}: cannot be read, truncated or damaged: {reason}") from error


def _saved_shapes(manager: ocp.CheckpointManager, where: Path, step: int, item: str) -> dict[str, Any]:
    try:
        tree = manager.item_metadata(step)[item]
        return dict(getattr(tree, "tree", tree))
    except Exception as error:  # As in `_restore`.
        raise InputError(f"{where}/{item}: cannot be read, truncated or damaged: {error}") from error


def load_student(workdir: Path, step: int | None = None) -> tuple[Config, dict[str, Any], dict[str, Any]]:
    """Reads a run's parameters for evaluation or export, on one device; those of its language model are left out.

    Args:
      workdir: the run's folder.
      step: a saved step; the newest when None.

    Returns:
      The run's config, ``{"student": tree, "method": tree}``, and its provenance with ``step`` added. A merge
      has ``teacher`` in place of ``method``, and its ``student`` is the whole plain tower.

    Raises:
      InputError: no checkpoint there, or an unreadable one.
    """
    config, trainable, frozen, provenance = _load(workdir, step, lambda path: not path.startswith("language/"))
    params = merge(trainable, frozen)
    if isinstance(config.method, MergeConfig):
        params["student"] = fold(params, config)
    return config, params, provenance


def load_language(workdir: Path, step: int | None = None) -> dict[str, Any]:
    """Reads the ``language/...`` leaves that a run keeps, flat, on the host.

    Those are what trained, and what the run drew; a decoder that was read from ``language.initialize`` and stayed
    frozen is there.

    Raises:
      InputError: no checkpoint there, or an unreadable one.
    """
    # Past the accelerator, whose memory may be smaller than a language model's masters.
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        host = jax.local_devices()[0]
    _, trainable, frozen, _ = _load(workdir, step, lambda path: path.startswith("language/"), host)
    return jax.device_get({**frozen, **trainable})


def _load(
    workdir: Path, step: int | None, wanted: Callable[[str], bool], device: jax.Device | None = None
) -> tuple[Config, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns settings, the trainable and the frozen leaves that are wanted, and the provenance with ``step``."""
    if (bucket := mirror.bucket_of(workdir)) is not None:
        return stored.load(bucket, step, wanted, device or jax.local_devices()[0])
    with _opened(workdir, step) as (manager, where, step):
        config, provenance = _read_settings(manager, where, step)
    frozen = where.parents[1] / "frozen"
    return (
        config,
        _load_part(where / "trainable", wanted, device),
        _load_part(frozen, wanted, device) if frozen.is_dir() else {},
        provenance,
    )


def _load_part(folder: Path, wanted: Callable[[str], bool], device: jax.Device | None) -> dict[str, Any]:
    """Reads the wanted leaves of a saved tree onto one device, the first unless told; the others are not touched."""
    sharding = SingleDeviceSharding(device or jax.local_devices()[0])
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(folder).item_metadata.tree
            item = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
                for name, leaf in saved.items()
                if wanted(name)
            }
            options = ocp.checkpoint_utils.construct_restore_args(item)
            args = ocp.args.PyTreeRestore(item, restore_args=options, partial_restore=True)
            return dict(checkpointer.restore(folder, args=args)) if item else {}
    except Exception as error:  # As in `_restore`.
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(" [tensorstore_spec")[0]
        raise InputError(f"{folder}: cannot be read, truncated or damaged: {reason}") from error


def require_finished(config: Config, found: int, run: Path, asked: int | None = None) -> None:
    """Refuses a run that is not at its end, unless one of its steps was asked for.

    Args:
      config: the run's settings.
      found: the step that was read.
      run: the run's folder, for the error.
      asked: the step asked for; None or 0: none.
    """
    if not asked and found < config.train.steps:
        raise InputError(
            f"{run}: is at step {found} of {config.train.steps}: run `tove train` to its end, or name a saved step"
        )


def load_settings(workdir: Path, step: int | None = None) -> tuple[Config, dict[str, Any]]:
    """Reads a run's settings, and its provenance with ``step`` added; no weights.

    Args:
      workdir: the run's folder.
      step: a saved step; the newest when None.

    Raises:
      InputError: no checkpoint there, or an unreadable one.
    """
    if (bucket := mirror.bucket_of(workdir)) is not None:
        return stored.load_settings(bucket, step)
    with _opened(workdir, step) as (manager, where, step):
        return _read_settings(manager, where, step)


@contextmanager
def _opened(workdir: Path, step: int | None) -> Iterator[tuple[ocp.CheckpointManager, Path, int]]:
    """Yields the manager, folder and number of a saved step, the newest when None."""
    path = (Path(workdir) / "checkpoints").absolute()
    if not path.is_dir():
        raise InputError(f"{path}: no checkpoints here; run `tove train` first")
    with _manager(path, read_only=True, save_interval_steps=0, create=False) as manager:
        step = manager.latest_step() if step is None else step
        if step is None:
            raise InputError(f"{path}: no checkpoint has been saved yet")
        yield manager, path / str(step), step


def _read_settings(manager: ocp.CheckpointManager, where: Path, step: int) -> tuple[Config, dict[str, Any]]:
    meta = _read_meta(manager, where, step)
    return from_json(meta["config"], f"{where}/meta"), {**meta["provenance"], "step": step}
