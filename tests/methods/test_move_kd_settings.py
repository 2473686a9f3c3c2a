"""MoVE-KD's presets, its quirks as fields, and its full-size settings."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.move_kd_cases import card, evaluate, make_config, random_case
from tove_jax.bench.cost import EXPERTS
from tove_jax.config import door
from tove_jax.config.schema import AdapterConfig, MoveKDConfig
from tove_jax.errors import InputError
from tove_jax.methods import move_kd
from tove_jax.methods.presets import PRESETS
from tove_jax.models import vit
from tove_jax.train.state import flatten, parameter_factors

# Published sizes of the encoder adapters; Pix2Struct is in no set of the paper's tables.
ENCODER_ADAPTERS = {"sam_l": 2_623_040, "eva02_l": 3_409_472, "pix2struct_l": 2_164_288, "convnext_xxl": 3_737_152}
CONFIG = str(Path(__file__).parents[2] / "configs" / "move_kd_vit_l.py")


def test_presets():
    reference = PRESETS["reference"]
    assert reference.method == MoveKDConfig(saturation_scope="device", sam_layout="scrambled")
    assert reference.adapter == AdapterConfig()
    assert PRESETS["paper"].method.token_weight_source == "scores"
    recommended = PRESETS["recommended"]
    assert recommended.adapter.b_init == "zeros" and recommended.method.stop_gradient_teacher_weight
    for preset in PRESETS.values():
        config, params, outputs, features, batch = random_case(**dataclasses.asdict(preset.method))
        loss, _ = evaluate(params, outputs, features, batch, config)
        assert np.isfinite(loss)


def full_size(config):
    """Shapes of every parameter of a full-size run, flat."""
    cards = {name: card(name, EXPERTS[name][:2], EXPERTS[name][2]) for name in config.features.names if name != "clip"}
    cards["clip"] = dataclasses.replace(card("clip", (24, 24), 1024, clip=True), summary_width=1024)
    module = vit.from_config(config.student)
    student = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 336, 336, 3)))["params"]
    extra = jax.eval_shape(lambda: move_kd.init_extra(config, cards, module.grid**2, jax.random.key(0)))
    return flatten({"student": student, "method": extra})


def count(shapes, *words):
    return sum(math.prod(leaf.shape) for path, leaf in shapes.items() if any(word in path for word in words))


@pytest.mark.parametrize("teachers", ["v1_0", "v1_1"])
def test_full_size_config(teachers):
    first = door.from_file(f"{CONFIG}:teachers={teachers}")
    names = first.features.names
    assert set(names) == {"clip", "eva02_l", "convnext_xxl"} | ({"sam_l"} if teachers == "v1_1" else set())
    shapes = full_size(first)
    assert count(shapes, "method/") == sum(ENCODER_ADAPTERS[name] for name in names if name != "clip")
    for name in names:
        assert count(shapes, f"method/{name}/") == ENCODER_ADAPTERS.get(name, 0)
    # The paper's one site has half of the experts; the released code's has the published number.
    reference = full_size(door.from_file(f"{CONFIG}:teachers={teachers},preset=reference"))
    assert count(reference, "/adapter/") == 24_040_008
    assert count(shapes, "student/") - count(shapes, "/adapter/") == 303_507_456
    factors = parameter_factors(first.optim, shapes)
    trained = {path for path, factor in factors.items() if factor is not None}
    assert trained == {path for path in shapes if "/adapter/" in path or path.startswith("method/")}
    assert (first.optim.lr, first.train.batch, first.train.steps) == (1e-3, 256, 2180)
    assert (first.student.view.fit, first.features.views, first.train.seed) == ("crop", "published", 42)
    second = door.from_file(f"{CONFIG}:teachers={teachers},stage=2")
    assert None not in parameter_factors(second.optim, shapes).values()
    assert (second.optim.lr, second.train.batch, second.train.steps) == (2e-5, 128, 5197)
    assert (second.student.view.fit, second.features.views) == ("pad", "student")
    for config in (first, second):
        o = config.optim
        assert (o.b1, o.b2, o.eps, o.weight_decay, o.schedule, o.warmup, o.clip_norm) == (
            0.9, 0.999, 1e-8, 0.0, "cosine", 0.03, 1.0,
        )  # fmt: skip
        assert config.train.dtype == "bfloat16"
        assert config.student.initialize == "openai/clip-vit-large-patch14-336"


def test_full_size_config_takes_presets_and_refuses_the_rest():
    for name, preset in PRESETS.items():
        config = door.from_file(f"{CONFIG}:preset={name},seed=7")
        assert (config.method, config.student.adapter) == (preset.method, preset.adapter)
        assert config.train.seed == 7 and config.features.views == ("student" if name == "recommended" else "published")
    assert door.from_file(CONFIG) == door.from_file(f"{CONFIG}:preset=paper,teachers=v1_0,stage=1,seed=42")
    smoke = door.from_file(f"{CONFIG}:smoke,teachers=v1_1,stage=2")
    assert len(smoke.features.experts) == 4 and smoke.train.steps < 10 and smoke.optim.lr == 2e-5
    for wrong, message in {
        "teachers=v1_2": "did you mean 'v1_1'|did you mean 'v1_0'",
        "stage=3": "expected 1 or 2, found 3",
        "preset=papr": "did you mean 'paper'",
    }.items():
        with pytest.raises(InputError, match=message):
            door.from_file(f"{CONFIG}:{wrong}")


def test_pix2struct_encoder_adapter_has_its_size():
    config = make_config(("clip", "pix2struct_l"), 1024)
    assert count(full_size(config), "method/") == ENCODER_ADAPTERS["pix2struct_l"]


# The quirks of the released code, by their number on the page: field and the code's value. 10 is a crash.
QUIRKS = {
    1: {"method.token_weight_source": "probs_softmax"},
    2: {"method.teacher_score_scale": "one"},
    3: {"method.saturation_rule": True, "method.saturation_scope": "device"},
    4: {"method.clip_weight": 0.8},
    5: {"method.stop_gradient_teacher_weight": False},
    6: {"student.adapter.site": "linears"},
    7: {"student.adapter.b_init": "kaiming"},
    8: {"student.adapter.router_gradient": "none"},
    9: {"method.sam_layout": "scrambled"},
    11: {"student.feature": "layers/-2"},
    12: {"method.balance_pool": "all"},
    13: {"method.kd_on_text_only": True},
    14: {"features.views": "published"},
}


def test_every_quirk_is_a_field_that_the_reference_follows():
    config = door.from_file(f"{CONFIG}:preset=reference,teachers=v1_1")
    page = (Path(__file__).parents[2] / "docs/methods/move_kd.md").read_text()
    listed = page[page.index("## Quirks of the released code") :]
    for number, fields in QUIRKS.items():
        entry = listed[listed.index(f"\n{number}. ") :]
        entry = entry[: entry.find(f"\n{number + 1}. ")] if f"\n{number + 1}. " in entry else entry
        for path, value in fields.items():
            found = config
            for part in path.split("."):
                found = getattr(found, part)
            assert found == value, path
            assert f"`{path}`" in entry or f"`{path.rpartition('.')[2]}`" in entry, path
