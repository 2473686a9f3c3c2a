import pytest

from tove_jax.errors import InputError
from tove_jax.plan.chips import CHIPS, parse


@pytest.mark.parametrize(
    ("text", "slices", "name", "chips", "devices", "hosts"),
    [
        ("v5e-16", 1, "v5e:4x4", 16, 16, 4),
        ("v5litepod-64", 1, "v5e:8x8", 64, 64, 16),
        ("v5e:16x16", 2, "2 x v5e:16x16", 512, 512, 128),
        ("v5p-128", 1, "v5p:4x4x4", 64, 64, 16),
        ("v6e-256", 1, "v6e:16x16", 256, 256, 64),
        ("tpu7x-8", 1, "tpu7x:2x2x1", 4, 8, 1),
        ("h200:8", 1, "h200:8", 8, 8, 1),
        ("h100-8", 4, "4 x h100:8", 32, 32, 4),
        ("cpu:8", 1, "cpu:8", 8, 8, 1),
    ],
)
def test_topologies(text, slices, name, chips, devices, hosts):
    found = parse(text, slices)
    assert (found.name, found.chips, found.devices, found.hosts) == (name, chips, devices, hosts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e", "expected chip:shape"),
        ("v5x:4x4", "no chip 'v5x'"),
        ("v5e-17", "expected one of v5e-1, v5e-4"),
        ("v5p-7", "expected one of v5p-8"),
        ("v5e:4", "expected 2 dimensions"),
        ("h200:2x8", "more nodes by --slices"),
    ],
)
def test_what_is_no_topology(text, message):
    with pytest.raises(InputError, match=message):
        parse(text)


def test_a_device_is_its_share_of_a_chip():
    chip, device = CHIPS["tpu7x"], CHIPS["tpu7x"].device
    assert (device.flops, device.memory, device.host) == (chip.flops / 2, chip.memory // 2, 8)
    assert CHIPS["v5e"].device == CHIPS["v5e"]


def test_every_chip_names_its_source():
    for chip in CHIPS.values():
        assert chip.source and chip.flops > 0 and chip.memory > 0
