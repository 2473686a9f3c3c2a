"""Where a run begins: the start's weights, fresh adapters, the method's own parameters, all sharded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tove_jax import methods
from tove_jax.config.schema import Config, MergeConfig
from tove_jax.errors import InputError
from tove_jax.experts.base import ExpertCard
from tove_jax.files.weights import hash_arrays
from tove_jax.hf.load import load_clip
from tove_jax.hf.start import start_folder
from tove_jax.methods import merge
from tove_jax.parallel import logical_specs, tree_shardings
from tove_jax.parallel.sharding import replicated
from tove_jax.train.handover import read_handover
from tove_jax.train.merge import read_source
from tove_jax.train.objective import DTYPES, logical_axes, make_student
from tove_jax.train.optimizer import make_optimizer
from tove_jax.train.state import TrainState, flatten, parameter_factors, split, unflatten

# Fields of the student that its start must share.
SHAPE_FIELDS = ("image_size", "patch_size", "width", "layers", "heads", "mlp_width", "activation", "norm_epsilon")


def start_parameters(config: Config, workdir: Path) -> Any:
    """Reads the student's start as a plain CLIP tree, on the host.

    Raises:
      InputError: the start has another shape than ``config.student``.
    """
    start, params = load_clip(start_folder(config, workdir), image_size=config.student.image_size)
    for name in SHAPE_FIELDS:
        wanted, found = getattr(config.student, name), start[name]
        if found != wanted:
            raise InputError(f"config.student.{name} is {wanted!r}, but the start {start['initialize']} has {found!r}")
    return params


def initial_parameters(
    config: Config, workdir: Path, cards: Mapping[str, ExpertCard]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns every parameter of a run before its first step, on the host.

    With ``train.start_from`` they are another run's, see `tove_jax.train.handover.read_handover`; a merge, which
    has its own source, does not read that setting.

    Args:
      config: the run's settings; ``train.seed`` draws adapters and method parameters.
      workdir: the run's folder.
      cards: of each expert; grids and widths decide the method's shapes.

    Returns:
      ``{"student": tree, "method": tree}``, or for a merge ``{"student": tree, "teacher": tree}``; and hashes
      of the weights behind them: ``start``, and a source's (`tove_jax.train.merge.read_source`,
      `tove_jax.train.handover.Handover`).

    Raises:
      InputError: the start, or the source, does not fit the settings.
    """
    adapter_key, method_key = jax.random.split(jax.random.key(config.train.seed + 1))
    plain = start_parameters(config, workdir)
    start = flatten(plain)
    origins = {"start": hash_arrays(start)}
    if isinstance(config.method, MergeConfig):
        source, behind = read_source(config, origins["start"])
        return jax.device_get(merge.initial(config, source, plain, adapter_key)), {**behind, **origins}
    student = make_student(config)
    size = config.student.image_size

    def draw(key: jax.Array) -> Any:
        # The tower's own weights are the start's: drawing them too would take as long as all the rest.
        fresh = flatten(student.init(key, jnp.zeros((1, size, size, 3)))["params"])
        return {path: leaf for path, leaf in fresh.items() if path not in start}

    merged = unflatten({**jax.device_get(jax.jit(draw)(adapter_key)), **start})
    extra = methods.get(config.method.name).init_extra(config, cards, student.grid**2, method_key)
    params = {"student": merged, "method": jax.device_get(extra)}
    if not config.train.start_from:
        return params, origins
    handed = read_handover(config, params, origins["start"])
    if not jax.process_index():
        for note in handed.notes:
            print(f"train: from {config.train.start_from}: {note}", file=sys.stderr)
    return handed.params, {**handed.origins, **origins}


def state_shardings(config: Config, state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the sharding of every leaf; an optimiser slot follows its parameter."""
    table = logical_axes(config)

    def of(tree: dict[str, Any]) -> dict[str, Any]:
        return tree_shardings(tree, logical_specs(tree, table, "logical axes"), mesh)

    trainable = of(state.trainable)

    def slot(path: Any, leaf: Any) -> Any:
        name = getattr(path[-1], "key", None) if path else None
        return trainable[name] if name in trainable and leaf.shape == state.trainable[name].shape else replicated(mesh)

    return TrainState(
        step=replicated(mesh),
        trainable=trainable,
        frozen=of(state.frozen) if state.frozen else {},
        opt_state=jax.tree_util.tree_map_with_path(slot, state.opt_state),
        bad_step=replicated(mesh),
    )


def state_builder(
    config: Config, params: Any, make_optimizer: Callable[..., optax.GradientTransformation] = make_optimizer
) -> tuple[Callable[[Any], TrainState], optax.GradientTransformation]:
    """Returns what makes the state of step 0 from a nested tree like `params`, arrays or shapes; and the optimiser."""
    factors = parameter_factors(config.optim, flatten(params))
    optimizer = make_optimizer(config.optim, config.train.steps, factors)

    def build(tree: Any) -> TrainState:
        trainable, frozen = split(tree, factors, DTYPES[config.train.dtype])
        return TrainState(jnp.int32(0), trainable, frozen, optimizer.init(trainable), jnp.int32(-1))

    return build, optimizer


def initial_state(
    config: Config, params: dict[str, Any], make_optimizer: Any, mesh: Mesh
) -> tuple[TrainState, TrainState, optax.GradientTransformation]:
    """Splits the parameters, makes the optimiser and its slots, and puts all on the mesh.

    Args:
      config: groups, optimiser, dtype.
      params: nested tree, on the host; leaves that lie on the mesh already, a language model's, are given away.
      make_optimizer: ``(optim config, steps, factors) -> optax transformation``.
      mesh: the device mesh.

    Returns:
      The state, its shardings and the optimiser.
    """
    build, optimizer = state_builder(config, params, make_optimizer)
    shardings = state_shardings(config, jax.eval_shape(build, params), mesh)
    flat = flatten(params)
    placed = {path: leaf for path, leaf in flat.items() if isinstance(leaf, jax.Array)}
    rest = {path: leaf for path, leaf in flat.items() if path not in placed}
    # Given away, they take no second place in the devices' memory.
    make = jax.jit(lambda placed, rest: build(unflatten({**rest, **placed})), out_shardings=shardings, donate_argnums=0)
    return make(placed, rest), shardings, optimizer
