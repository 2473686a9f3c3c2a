import dataclasses
import json
from pathlib import Path

import pytest

from tove_jax.config import Config, freeze, from_file, from_json, parse_arguments, thaw, to_json
from tove_jax.config.schema import HawaiiConfig, MergeConfig
from tove_jax.errors import InputError

ROOT = Path(__file__).parents[2]
BASE = str(ROOT / "configs/base.py")


def test_overrides_reach_nested_fields_and_keep_types():
    config = from_file(BASE, ["--config.optim.lr=1", "--config.features.experts=('a', 'b')"])
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.features.experts == ("a", "b")
    assert dataclasses.replace(config, optim=Config().optim, features=Config().features) == Config()


def test_the_result_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_file(BASE).optim.lr = 3.0


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--config.optim.learning=1", "config.optim.learning"),
        ("--config.optim.lrr=1", "did you mean 'optim.lr'"),
        ("--config.method.kd_wieght=1", "did you mean 'method.kd_weight'"),
        ("--config.train.steps=many", "config.train.steps"),
        ("--config.train.steps=1.5", "config.train.steps"),
        ("--config.student.attention=flashy", "'auto', 'xla', 'cudnn'"),
        ("--config.optim.groups=5", "config.optim.groups"),
    ],
)
def test_a_wrong_field_or_value_is_named(override, named):
    with pytest.raises(InputError, match=named.replace("(", r"\(")):
        from_file(BASE, [override])


def test_a_config_file_with_a_field_too_many_or_too_few(tmp_path):
    values = thaw(Config())
    values.train.stpes = 3
    with pytest.raises(InputError, match=r"config\.train\.stpes: no such field \(did you mean 'steps'\?\)"):
        freeze(values)
    values = thaw(Config()).to_dict()
    del values["train"]["batch"]
    with pytest.raises(InputError, match=r"config\.train: missing batch"):
        freeze(values)
    with pytest.raises(InputError, match="no such file"):
        from_file(str(tmp_path / "absent.py"))


def test_a_method_is_chosen_by_its_name():
    values = thaw(Config())
    values.method.name = "move_kb"
    with pytest.raises(InputError, match="config.method.name"):
        freeze(values)


def test_json_goes_out_and_in():
    config = from_file(BASE, ["--config.train.steps=7"])
    assert from_json(to_json(config), "here") == config
    with pytest.raises(InputError, match="here: not JSON"):
        from_json("{", "here")


def test_fields_added_since_a_file_was_written_take_their_defaults():
    method = MergeConfig(source="run", source_method=HawaiiConfig(), lora_rank=4)
    config = dataclasses.replace(Config(title="old"), method=method)
    values = json.loads(to_json(config))
    del values["mesh"], values["text"]["pack"], values["method"]["blocks"]
    del values["method"]["source_method"]["instruction_width"]
    assert from_json(json.dumps(values), "here") == config
    values["method"]["blockz"] = 1
    with pytest.raises(InputError, match=r"here\.method\.blockz: no such field .did you mean 'blocks'"):
        from_json(json.dumps(values), "here")


def test_arguments_take_their_defaults_types():
    arguments = parse_arguments("smoke,seed=3", smoke=False, seed=0, method="move_kd")
    assert (arguments.smoke, arguments.seed, arguments.method) == (True, 3, "move_kd")
    with pytest.raises(InputError, match="did you mean 'smoke'"):
        parse_arguments("smok", smoke=False)
    # Of what reads the file, no traceback is left.
    with pytest.raises(
        InputError, match=r"^\S+demo.py:smok: config argument 'smok': not taken .did you mean 'smoke'..$"
    ):
        from_file(str(ROOT / "configs/demo.py") + ":smok", [])
    with pytest.raises(InputError, match="expected int"):
        parse_arguments("seed=x", seed=0)


def test_every_field_says_what_it_is():
    def walk(kind):
        for field in dataclasses.fields(kind):
            assert field.metadata.get("doc"), f"{kind.__name__}.{field.name}"
            if dataclasses.is_dataclass(field.default_factory):
                walk(field.default_factory)

    walk(Config)
