import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tove_jax.config.schema import MeshConfig
from tove_jax.errors import InputError
from tove_jax.parallel import check_replication, make_mesh, shard_batch, tree_shardings
from tove_jax.parallel.mesh import AXIS_RULES, constrain, fit_sizes, partition_spec


def test_one_size_may_be_left_to_the_devices():
    assert dict(make_mesh(MeshConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("given", "devices", "slices", "rows", "found"),
    [
        ((-1, -1, -1), 1, 1, 256, (1, 1, 1)),
        ((-1, -1, -1), 8, 1, 256, (1, 8, 1)),
        ((-1, -1, -1), 64, 1, 256, (4, 16, 1)),
        ((-1, -1, -1), 512, 2, 1024, (32, 16, 1)),
        ((-1, -1, -1), 512, 2, 256, (16, 16, 2)),  # two devices a row
        ((-1, -1, -1), 24, 2, 48, (2, 12, 1)),
        ((-1, -1, -1), 16, 2, None, (2, 8, 1)),
        ((2, -1, -1), 64, 1, 32, (2, 16, 2)),
        ((-1, 4, -1), 64, 1, 32, (8, 4, 2)),
        ((-1, -1, 4), 64, 1, 32, (1, 16, 4)),
        ((2, 2, -1), 8, 1, None, (2, 2, 2)),
        ((1, -1, 1), 64, 1, 32, (1, 64, 1)),
    ],
)
def test_sizes_follow_from_devices_slices_and_batch(given, devices, slices, rows, found):
    assert fit_sizes(MeshConfig(*given), devices, slices, rows=rows, heads=16) == found


def test_a_batch_that_no_mesh_splits():
    with pytest.raises(InputError, match="no divisor of 4 heads lets .* = 6 rows divide over the rest of 16 devices"):
        fit_sizes(MeshConfig(-1, -1, -1), 16, rows=6, heads=4)
    with pytest.raises(InputError, match="fsdp_limit"):
        fit_sizes(MeshConfig(-1, -1, -1, fsdp_limit=0), 8)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 3), (0, 1, 1)])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(InputError, match="mesh"):
        make_mesh(MeshConfig(*sizes))


def test_an_axis_is_left_whole_when_it_does_not_divide_or_is_taken():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert partition_spec(("embed", "mlp"), (8, 8), mesh, AXIS_RULES) == PartitionSpec("fsdp", "tensor")
    assert partition_spec(("embed", "mlp"), (7, 8), mesh, AXIS_RULES) == PartitionSpec(None, "tensor")
    assert partition_spec(("embed", "embed"), (8, 8), mesh, AXIS_RULES) == PartitionSpec("fsdp", None)
    with pytest.raises(InputError, match="logical axis 'width'"):
        partition_spec(("width",), (8,), mesh, AXIS_RULES)


def test_big_replicated_arrays_are_named():
    mesh = make_mesh(MeshConfig(1, 8, 1))
    shapes = {
        "big": jax.ShapeDtypeStruct((1001, 1000), np.float32),
        "fine": jax.ShapeDtypeStruct((1000, 1000), np.float32),
    }
    specs = {"big": ("embed", None), "fine": ("embed", None)}
    shardings = tree_shardings(shapes, specs, mesh)
    tree = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[n]) for n, s in shapes.items()}
    with pytest.raises(InputError, match=r"(?s)1 arrays.*big \(1001, 1000\): 4.0 MB"):
        check_replication(tree, mesh, 1.0)
    check_replication(tree, mesh, 5.0)


def test_batches_are_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    batch = shard_batch({"x": np.arange(8)}, mesh)
    assert batch["x"].sharding.shard_shape((8,)) == (2,)
    np.testing.assert_array_equal(batch["x"], np.arange(8))


def test_constrain_is_the_identity_outside_a_mesh():
    x = np.ones((2, 3))
    assert constrain(x, ("batch", "embed")) is x


class Fake:
    """A device that says where it is, as far as laying out a mesh asks."""

    def __init__(self, id, slice_index, platform="tpu"):
        self.id, self.slice_index, self.platform = id, slice_index, platform
        self.process_index, self.device_kind, self.core_on_chip = slice_index, "fake", 0
        self.coords = (id // 2 % 2, id // 4, 0)


def test_data_is_the_outer_axis_over_slices():
    devices = [Fake(number, number % 2) for number in range(8)]  # the slices' devices come mixed
    mesh = make_mesh(MeshConfig(4, 2, 1), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    np.testing.assert_array_equal(slices[:, 0, 0], [0, 0, 1, 1])
    assert (slices == slices[:, :1, :1]).all()
    with pytest.raises(InputError, match="data = 1 is not a multiple of the 2 slices"):
        make_mesh(MeshConfig(1, 8, 1), devices)


def test_nodes_of_gpus_may_share_parameters():
    devices = [Fake(number, number // 4, "gpu") for number in range(8)]
    assert [device.id for device in make_mesh(MeshConfig(1, 8, 1), devices).devices.flat] == list(range(8))


def test_experts_of_lora_can_be_sharded():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    names, shape = ("layers", "embed", "expert", "rank"), (3, 8, 4, 2)
    assert partition_spec(names, shape, mesh, AXIS_RULES) == PartitionSpec(None, "fsdp", None, None)
    rules = {**AXIS_RULES, "expert": ("tensor",)}
    assert partition_spec(names, shape, mesh, rules) == PartitionSpec(None, "fsdp", "tensor", None)
