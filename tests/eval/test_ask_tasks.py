"""`tove eval --tasks`: models by name, tasks by their files, a table."""

from __future__ import annotations

import json

import pytest

from tests.eval.answering import ColourAnswerer, write_pope
from tove_jax.cli.main import main
from tove_jax.errors import InputError
from tove_jax.eval import answerers
from tove_jax.eval.ask_tasks import Model, ask_tasks


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A Hugging Face folder that is opened as a `ColourAnswerer`; how it was opened is kept."""
    opened = []

    def open_answerer(folder, **options):
        opened.append((str(folder), options))
        return ColourAnswerer()

    monkeypatch.setattr(answerers, "open_answerer", open_answerer)
    folder = tmp_path / "llava-tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(200_000))
    return folder, opened


def test_the_command_answers_and_prints_a_table(model, tmp_path, capsys):
    folder, opened = model
    path = write_pope(tmp_path / "pope")
    words = ["eval", "--model", str(folder), "--workdir", str(tmp_path / "run"), "--resamples=20", "--batch=4"]
    assert main([*words, "--tasks", f"pope={path}", f"pope@again={path}:{path.parent}", "--limit=4"]) == 0
    assert opened == [(str(folder), {"step": None, "experts": None, "template": ""})]
    shown = capsys.readouterr().out
    assert "| pope  | f1_mean " in shown and "| again |" in shown and "pope.jsonl" in shown
    found = json.loads((tmp_path / "run/eval/again.json").read_text())
    assert found["questions"] == 4 and found["settings"]["model"].startswith("llava-tiny ")
    assert json.loads((tmp_path / "run/metrics.json").read_text())["eval/pope/f1_mean"] == 1.0


def test_results_go_beside_the_runs_unless_told(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = ask_tasks(Model(str(model[0])), [f"pope={write_pope(tmp_path / 'pope')}"], resamples=0)
    assert found[0].answers.resolve() == tmp_path / "runs/llava-tiny/eval/pope.jsonl"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "pop=x", "--model", "m"], "did you mean 'pope'"),
        (["--tasks", "pope=none.json", "--model", "m"], "none.json cannot be read"),
        (["--tasks", "held_out", "--model", "m"], "m/checkpoints: no checkpoints here"),
        (["--tasks", "pope=x"], "expected --model, or --workdir"),
        (["--tasks", "pope=x", "--model", "m", "--seeds", "a"], "--seeds: expected none beside --tasks"),
    ],
)
def test_bad_input_is_told_before_a_model_is_opened(model, words, message, capsys):
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err and not model[1]


def test_a_model_without_tasks_is_refused(tmp_path, capsys):
    assert main(["eval", "--config=configs/demo.py", "--model=m", f"--workdir={tmp_path}"]) == 2
    assert "--model: expected --tasks" in capsys.readouterr().err


def test_a_model_is_described_by_what_it_holds(model, tmp_path):
    folder, _ = model
    first = Model(str(folder)).describe()
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(folder)
    assert Model(str(folder)).describe() == first
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[5] = 1
    (folder / "model.safetensors").write_bytes(content)
    assert Model(str(folder)).describe() != first
    assert Model("org/name").describe() == "org/name"
    with_experts = Model("org/name", experts=("a", "b"), template="v1").describe()
    assert with_experts == "org/name, experts a+b, template v1"
    assert Model("org/name", experts=()).describe() == "org/name, experts none"


def test_another_model_does_not_go_on_with_the_answers(model, tmp_path):
    folder, _ = model
    task = f"pope={write_pope(tmp_path / 'pope')}"
    ask_tasks(Model(str(folder)), [task], tmp_path / "run", resamples=0)
    (folder / "config.json").write_text("{ }")
    with pytest.raises(InputError, match="settings.model"):
        ask_tasks(Model(str(folder)), [task], tmp_path / "run", resamples=0)
    ask_tasks(Model(str(folder)), [task], tmp_path / "run", resamples=0, overwrite=True)
