import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.parallel import first_match, logical_specs

TREE = {"a": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "b": [np.zeros(())]}


def test_the_first_rule_wins_and_matches_whole_paths():
    found = first_match([("a/k.*", 1), ("a", 5), (".*", 2)], ["a/kernel", "a/bias", "b/0"], "table")
    assert found == {"a/kernel": 1, "a/bias": 2, "b/0": 2}


def test_uncovered_parameters_are_all_named():
    with pytest.raises(InputError, match="no rule covers 2 parameters: a/bias, b/0"):
        first_match([("a/kernel", 1)], ["a/kernel", "a/bias", "b/0"], "table")


def test_a_bad_pattern_is_named():
    with pytest.raises(InputError, match="not a regular expression"):
        first_match([("(", 1)], ["a"], "table")


def test_axes_must_fit_the_dimensions():
    specs = logical_specs(TREE, [(".*kernel", ("embed", "mlp")), (".*bias", ("mlp",)), (".*", ())], "axes")
    assert specs["a"]["kernel"] == ("embed", "mlp") and specs["b"] == [()]
    with pytest.raises(InputError, match="a/bias has shape"):
        logical_specs(TREE, [(".*", ("embed", "mlp"))], "axes")
