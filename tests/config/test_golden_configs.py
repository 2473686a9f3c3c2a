import pytest

from tests.golden_configs import CONFIGS, ROOT, file_of, text


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_what_their_golden_text_says(name):
    assert text(name) == file_of(name).read_text(), "python -m tests.golden_configs writes it anew"


def test_every_shipped_config_is_listed():
    listed = {name.partition(":")[0] for name in CONFIGS}
    full_size = {"hawaii_vit_l.py", "tove_vit_b.py"}  # their own tests pin their shapes
    assert {path.name for path in (ROOT / "configs").glob("*.py")} - full_size == listed
