"""What a step's compiler is asked for: by platform, on several devices, and only what it knows."""

import jax
import pytest

from tove_jax.config.schema import MeshConfig
from tove_jax.parallel import make_mesh
from tove_jax.parallel.overlap import OPTIONS, compiler_options


def test_processors_and_single_devices_are_asked_for_nothing():
    asked = {"cpu": {"xla_allow_excess_precision": False}}
    assert compiler_options(make_mesh(MeshConfig(2, 2, 2))) == {}
    assert compiler_options(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), asked) == {}
    assert compiler_options(make_mesh(MeshConfig(2, 2, 2)), asked) == asked["cpu"]


def test_options_that_the_compiler_does_not_know_are_left_out_and_named(capsys):
    asked = {"cpu": {"xla_new": True, "xla_allow_excess_precision": False, "xla_gone": False}}
    assert compiler_options(make_mesh(MeshConfig(2, 2, 2)), asked) == {"xla_allow_excess_precision": False}
    told = capsys.readouterr().err
    assert "does not know xla_new" in told and "does not know xla_gone" in told


def test_a_value_that_cannot_be_is_an_error():
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a valid bool value"):
        compiler_options(make_mesh(MeshConfig(2, 2, 2)), {"cpu": {"xla_allow_excess_precision": "perhaps"}})


def test_options_for_gpus_are_known_to_xla():
    """Its table of options is one for all platforms, but those of TPUs, whose library is not installed here."""
    made = compiler_options(make_mesh(MeshConfig(2, 2, 2)), {"cpu": OPTIONS["gpu"]})
    assert made == OPTIONS["gpu"] != {}


def test_inside_a_mesh():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        assert compiler_options(mesh, {"cpu": {"xla_gone": True}}) == {}
