"""Mesh, sharding rules and start-up checks; knows no model."""

from tove_jax.parallel.mesh import BATCH_AXES, constrain, make_mesh, run_mesh
from tove_jax.parallel.rules import first_match, flat_paths, logical_specs, map_paths
from tove_jax.parallel.sharding import check_replication, shard_batch, tree_shardings

__all__ = [
    "BATCH_AXES",
    "check_replication",
    "constrain",
    "first_match",
    "flat_paths",
    "logical_specs",
    "make_mesh",
    "map_paths",
    "run_mesh",
    "shard_batch",
    "tree_shardings",
]
