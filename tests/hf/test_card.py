"""The model card tells what is known, and says what is not."""

from __future__ import annotations

import dataclasses

import pytest

from tove_jax.config.schema import Config, ViewConfig
from tove_jax.data.view import View
from tove_jax.experts.base import ExpertCard
from tove_jax.hf.card import model_card


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
