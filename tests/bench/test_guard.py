"""The compiled training steps cost what they did: counts against goldens, so that a slowdown has a name."""

import json

import pytest

from tests import bench_goldens

FILE = bench_goldens.file_of(bench_goldens.version())


@pytest.fixture(scope="module")
def golden():
    if not FILE.exists():
        known = ", ".join(sorted(path.stem for path in bench_goldens.FOLDER.glob("*.json")))
        pytest.skip(f"compilers differ: no counts of {FILE.stem}, only of {known}; python -m tests.bench_goldens")
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def counted(golden):
    return bench_goldens.count_all()


@pytest.mark.parametrize("name", bench_goldens.CASES)
def test_a_step_costs_what_it_did(name, golden, counted):
    lines = bench_goldens.differences(name, counted[name], golden[name])
    assert not lines, "\n".join([*lines, "if that is meant: python -m tests.bench_goldens"])


def test_goldens_hold_every_step_and_figure(golden):
    assert list(golden) == list(bench_goldens.CASES)
    for name, found in golden.items():
        assert tuple(found) == bench_goldens.FIGURES and min(found["flops"], found["bytes"], found["fusions"]) > 0
        # One device has nobody to talk to.
        assert bool(found["collectives"]) == ("2x2x2" in name)


def test_a_worse_step_is_named():
    golden = {"flops": 1000, "bytes": 500, "temporaries": 100, "fusions": 10, "collectives": 0}
    assert not bench_goldens.differences("x", {**golden, "flops": 1019}, golden)
    found = {**golden, "flops": 1050, "collectives": 2, "fusions": 9}
    assert bench_goldens.differences("x", found, golden) == [
        "x: flops 1,050, golden 1,000 (+5.0%)",
        "x: fusions 9, golden 10 (-10.0%)",
        "x: collectives 2, golden 0 (from none)",
    ]
