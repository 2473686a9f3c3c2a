import pytest

from tests.golden_specs import CONFIGS, file_of, text


@pytest.mark.parametrize("name", CONFIGS)
def test_full_size_configs_are_sharded_as_their_golden_text_says(name):
    assert text(name) == file_of(name).read_text(), "python -m tests.golden_specs writes it anew"
