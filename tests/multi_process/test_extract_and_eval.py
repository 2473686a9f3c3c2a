"""Extraction and evaluation by several processes on this machine, through launch/local.sh."""

import filecmp
import json
import os
import shutil
import signal

import numpy as np

SHARDS = "--config.features.shard_records=2"


def stored(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_others_take_over_the_shards_of_a_killed_one(launch, workdir, tmp_path):
    (tmp_path / "features").mkdir()
    path = f"--config.features.path={tmp_path / 'features'}"
    run = launch(2, "extract", workdir, SHARDS, "--config.data.flip=False", path, "--quiet", TOVE_GRACE_SECONDS="100")
    run.until(lambda: list((tmp_path / "features").glob("clip/shard*.json")))
    os.kill(run.pid(1), signal.SIGKILL)
    status, _, err = run.wait()
    assert status == 137, err
    alone = launch(1, "extract", workdir, SHARDS, "--config.data.flip=False", f"{path}2", "--quiet")
    assert alone.wait()[0] == 0
    first, second = (stored(tmp_path / name) for name in ("features", "features2"))
    assert first == second and len(first) > 40


def test_hosts_without_a_common_disk_take_shares_by_their_number(launch, workdir, tmp_path):
    places = [f"--config.features.path={tmp_path / name}" for name in ("first", "second")]
    words = [SHARDS, "--config.data.flip=False", places[0], "--quiet", "--experts=clip", "--share=process"]
    assert launch(2, "extract", workdir, *words, DIFFER_1=places[1]).wait()[0] == 0
    for name, begin in (("first", 0), ("second", 1)):
        found = sorted(path.name[6:11] for path in (tmp_path / name / "clip").glob("shard*.json"))
        assert found == [f"{number:05d}" for number in range(begin, 12, 2)]


def test_evaluation_is_shared(launch, single, tmp_path):
    shutil.copytree(single, tmp_path / "copy")
    answers = {}
    for count in (1, 2):
        status, out, err = launch(count, "eval", tmp_path / "copy", "--config.eval.batch=4").wait()
        assert status == 0, err
        assert out.count("student minus its start, k-NN") == 1
        shutil.copy(tmp_path / "copy/eval/predictions.json", tmp_path / f"{count}.json")
        answers[count] = json.loads((tmp_path / "copy/metrics.json").read_text())
    assert filecmp.cmp(tmp_path / "1.json", tmp_path / "2.json", shallow=False)
    for name, value in answers[1].items():
        np.testing.assert_allclose(answers[2][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
