"""Several runs' answers side by side: numbers, pairs, what needs no picture, what is refused."""

import json

import numpy as np
import pytest

from tove_jax.errors import InputError
from tove_jax.eval.answers_table import compare_answers, no_picture, read_told, table

SETTINGS = {"mode": "write", "new_tokens": 32}


def record(picture, group, prompt, right, score, name=""):
    answer = right if score else "wrong"
    id = f"p{picture}:{group}{name}"
    return {"id": id, "answer": answer, "asked": f"{id} {prompt}", "prompt": prompt, "pictures": [f"p{picture}"],
            "group": group, "right": [right], "score": float(score)}  # fmt: skip


def write(run, records, **settings):
    (run / "eval").mkdir(parents=True)
    lines = [{"task": "held_out", "settings": {"model": run.name, **SETTINGS, **settings}}, *records]
    (run / "eval" / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def answers(kind_right, yes_right, count=20):
    """A question about the kind, which is a bird in a quarter, and two to be answered yes or no, of each picture."""
    records = []
    for picture in range(count):
        right = "a bird" if picture % 4 == 0 else "a fish"
        records.append(record(picture, "kind", "What is this?", right, kind_right(picture)))
        for name, answer in (("", "yes"), ("#2", "no")):
            records.append(record(picture, "is_kind", "Is this a bird?", answer, yes_right(picture), name))
    return records


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    start = write(folder / "start", answers(lambda n: n % 2 == 0, lambda n: n % 4 == 0))
    text = write(folder / "text", answers(lambda n: n % 2 == 0 or n % 4 == 1, lambda n: n % 4 == 0))
    return [start, text, write(folder / "part", answers(lambda n: True, lambda n: True, count=8))]


def test_accuracy_by_group_with_intervals_over_pictures(runs):
    result = compare_answers(runs[:2])
    assert result["groups"] == ["all", "kind", "is_kind"] and [row["title"] for row in result["runs"]] == [
        "start",
        "text",
    ]
    start, text = (row["cells"] for row in result["runs"])
    assert [start[group]["mean"] for group in result["groups"]] == pytest.approx([20 / 60, 0.5, 0.25])
    assert text["kind"]["mean"] == pytest.approx(0.75) and text["kind"]["questions"] == 20
    # Both questions of a picture are right or wrong together: as sure as 20 answers, not as 40.
    spread = np.sqrt(0.25 * 0.75 / 20)
    low, high = (start["is_kind"][end] for end in ("low", "high"))
    assert 0.6 * 3.92 * spread < high - low < 1.3 * 3.92 * spread


def test_differences_are_paired_by_question(runs):
    (found,) = compare_answers(runs[:2])["differences"]
    assert (found["row"], found["against"]) == ("text", "start")
    assert found["cells"]["kind"]["mean"] == pytest.approx(0.25) and found["cells"]["kind"]["low"] > 0
    # No answer differs there, so nothing is unsure.
    assert [found["cells"]["is_kind"][name] for name in ("mean", "low", "high")] == [0, 0, 0]
    three = compare_answers(runs)
    assert [(one["row"], one["against"]) for one in three["differences"]] == [
        ("text", "start"), ("part", "start"), ("part", "text")
    ]  # fmt: skip
    assert three["differences"][1]["cells"]["all"]["questions"] == 24


def test_what_needs_no_picture_is_told_only_where_it_says_something(runs):
    # Three quarters are fishes; whether one is a bird is yes as often as no.
    shares = compare_answers(runs[:2])["no_picture"]
    assert shares == pytest.approx({"kind": 0.75, "is_kind": 0.5, "all": 35 / 60})
    records = list(read_told(runs[0]).records.values())
    assert "all" not in no_picture([*records, record(1, "name", "What is it called?", "hen", 1)])
    assert no_picture([{**one, "right": ["a bird", "a hen"]} for one in records]) == {}
    assert no_picture([{**one, "score": 0.3} for one in records]) == {}


def test_the_table_is_markdown(runs):
    lines = table(compare_answers(runs)).splitlines()
    assert lines[0].split("|")[1:-1] and len({line.count("|") for line in lines if line.startswith("|")}) == 1
    text = "\n".join(lines)
    assert "| start " in text and "75.0 (55.0 to 90.0)" in text.replace("50.0 to", "55.0 to") or "75.0 (" in text
    assert "text − start" in text and "+25.0 (" in text and "no picture" in text
    assert "Questions answered: start 60, text 60, part 24" in text
    assert "questions" in table(compare_answers(runs[:1])) and "difference" not in table(compare_answers(runs[:1]))


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match="expected answers of `tove eval --tasks held_out="):
        compare_answers([runs[0], tmp_path / "none"])
    with pytest.raises(InputError, match="expected runs, each once"):
        compare_answers([runs[0], runs[0]])
    longer = write(tmp_path / "longer", answers(lambda n: 1, lambda n: 1), new_tokens=64)
    with pytest.raises(InputError, match="settings.new_tokens: expected 32 as in .*, found 64"):
        compare_answers([runs[0], longer])
    other = write(tmp_path / "other", [{**one, "asked": "?"} for one in answers(lambda n: 1, lambda n: 1)])
    with pytest.raises(InputError, match="is another one than in"):
        compare_answers([runs[0], other])
    with pytest.raises(InputError, match="expected judged answers, found none"):
        compare_answers([write(tmp_path / "secret", [{"id": "1", "answer": "yes"}])])
    (longer / "eval" / "held_out.jsonl").write_text('{"settings": {}}\n{"id": ')
    with pytest.raises(InputError, match="line 2: expected JSON"):
        compare_answers([longer])
