"""The model card tells what is known, and says what is not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tove_jax.config.schema import Config, HawaiiConfig, MergeConfig, MoveKDConfig, TrainConfig, ViewConfig
from tove_jax.data.view import View
from tove_jax.experts.base import ExpertCard
from tove_jax.hf.card import model_card
from tove_jax.hf.export import save_start
from tove_jax.models import vit


def test_card_tells_experts_licences_numbers(make_student):
    yaml = pytest.importorskip("yaml")
    student = dataclasses.replace(make_student(), initialize="openai/clip-vit-base-patch32")
    expert = ExpertCard("hed", "HED", "Xie and Tu, arXiv 1504.06375", "a package", "MIT", View(112), (7, 7), 512)
    other = {"name": "x|y", "title": "X|Y", "licence": "", "weights_hash": "0123456789abcdef0000"}
    provenance = {
        "step": 77,
        "experts": [expert, other],
        "data": {"name": "OpenMoji", "licence": "CC BY-SA 4.0", "train": 90, "held_out": 30},
        "metrics": {
            "eval/knn/student": 0.58125,
            "eval/knn/student_low": 0.55,
            "eval/knn/student_high": 0.61,
            "eval/knn/student_std": 0.02,
            "gate_low": 4.0,
            "steps": 3,
            "note": "not a number",
            "flag": True,
        },
    }
    text = model_card(Config(title="My tower", student=student), "f00d", provenance)
    for part in (
        "# My tower",
        "| HED | a package | MIT | Xie and Tu, arXiv 1504.06375 |",
        "| X\\|Y |  | not stated |",
        "`0123456789abcdef`",
        "OpenMoji (90 trained on, 30 held out)",
        "CC BY-SA 4.0",
        "| steps | 77 |",
        "| `eval/knn/student` | 0.5813 (0.55 to 0.61) |",
        "| `gate_low` | 4 |",
        "3 of rank 4, alpha 1, top1 routing",
        "trust_remote_code=True",
        "outputs.hidden_states[-2][:, 1:]",
        "`f00d`",
    ):
        assert part in text, part
    assert "student_low" not in text and "student_std" not in text and "not a number" not in text and "flag" not in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and front["base_model"] == "openai/clip-vit-base-patch32"


def test_card_without_provenance(make_student):
    student = dataclasses.replace(make_student("none"), view=ViewConfig(fit="pad"), feature="layers/1")
    text = model_card(Config(student=student), "f00d", {})
    assert "trust_remote_code" not in text and "base_model" not in text
    assert "Not recorded." in text and "None recorded." in text
    assert "pad them to a square first" in text
    assert "hidden_states[2]" in text  # transformers counts the embedding as state 0


def test_the_start_is_said_for_what_it_is(make_student, tmp_path):
    plain = make_student("none")

    def start(initialize, method=None):
        config = Config(student=dataclasses.replace(plain, initialize=str(initialize)), method=method or MoveKDConfig())
        (line,) = [line for line in model_card(config, "f00d", {}).splitlines() if line.startswith("| start |")]
        return line.removeprefix("| start | ").removesuffix(" |")

    assert start("") == "random weights"
    assert start("openai/clip-vit-base-patch32") == "`openai/clip-vit-base-patch32`"
    assert start(tmp_path / "my-clip") == "`my-clip`"
    # The folder that a run draws and keeps says so itself, wherever it is used again.
    drawn = tmp_path / "run" / "start"
    module = vit.from_config(plain)
    params = module.init(jax.random.key(0), jnp.zeros((1, plain.image_size, plain.image_size, 3)))["params"]
    save_start(Config(student=plain, train=TrainConfig(seed=7)), params, drawn)
    assert start(drawn) == "random weights, drawn with seed 7"
    given = dataclasses.replace(plain, initialize="openai/clip-vit-base-patch32")
    save_start(Config(student=given), params, tmp_path / "copy")
    assert start(tmp_path / "copy") == "`copy`"
    # A merge begins at its source's, even where that folder lies on another machine.
    merge = MergeConfig(source="elsewhere/run", source_method=HawaiiConfig())
    assert start("elsewhere/run/start", merge) == "random weights, the start of the run that was merged"
    assert start("else/where/my-clip", merge) == "`my-clip`"
    card = model_card(Config(student=plain, method=merge), "f00d", {})
    assert "distilled by HAWAII, then merged into one tower, from" in card
