"""The road of `make demo-vlm`, small: features, training with a language model, answers to held-out questions."""

import json
from pathlib import Path

import pytest

from tove_jax.cli.main import main

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config.features.experts=('clip', 'efficientnet_lite0:64', 'hed:32', 'pp_ocr_det:32')",
    "--config.data.flip=False",
]


def test_a_language_model_learns_and_answers_about_held_out_drawings(tmp_path, capsys):
    demo, run = tmp_path / "demo", tmp_path / "run"
    assert main(["extract", f"--config={ROOT}/configs/demo.py:smoke", f"--workdir={demo}", *SMALL, "--quiet"]) == 0
    told = [
        f"--config={ROOT}/configs/demo_vlm.py:encoder=both,smoke",
        f"--config.features.path={demo / 'features'}",
        f"--config.student.initialize={demo / 'start'}",
        f"--workdir={run}",
        *SMALL,
    ]
    assert main(["train", *told, "--quiet"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss/text"] < rows[0]["loss/text"] and rows[0]["loss/kd"] > 0
    capsys.readouterr()
    task = [
        f"--tasks=held_out={run}",
        f"--model={run}",
        f"--workdir={run}",
        "--prompts=plain",
        "--limit=24",
        "--choose",
    ]
    assert main(["eval", *task]) == 0
    assert "accuracy" in capsys.readouterr().out
    answers = [json.loads(line) for line in (run / "eval" / "held_out.jsonl").read_text().splitlines()[1:]]
    assert len(answers) == 24 and all(one["answer"] in one["choices"] for one in answers if "choices" in one)
    assert json.loads((run / "metrics.json").read_text())["eval/held_out/accuracy"] == pytest.approx(
        json.loads((run / "eval" / "held_out.json").read_text())["metrics"]["accuracy"]
    )
    picture = str(ROOT / "docs/images/report.png")
    assert main(["ask", f"--model={run}", f"--image={picture}", "What is this?", "--choices=a bird,a ship"]) == 0
    out = capsys.readouterr().out
    assert "a bird" in out and "a ship" in out
    assert main(["ask", f"--model={run}", f"--image={picture}", "What is this?", "--new-tokens=4"]) == 0
