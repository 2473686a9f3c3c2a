"""The runner with invented predictors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tove_jax.config.schema import EvalConfig
from tove_jax.errors import InputError
from tove_jax.eval import runner

CONFIG = EvalConfig(batch=16, neighbours=3, resamples=50)


@pytest.fixture(scope="module")
def problem():
    generator = np.random.default_rng(0)
    labels = [None if index % 11 == 0 else "abc"[index % 3] for index in range(160)]
    clean = np.eye(3)[np.arange(160) % 3]
    features = {
        "pixels": generator.normal(size=(160, 8)),
        "init": clean @ generator.normal(size=(3, 6)) + generator.normal(size=(160, 6)) * 1.5,
        "student": clean @ generator.normal(size=(3, 6)) + generator.normal(size=(160, 6)) * 0.4,
        "perfect": clean,
    }
    calls: list[int] = []

    def predictor(name):
        def predict(indices):
            calls.append(len(indices))
            return features[name][indices]

        return predict

    return {name: predictor(name) for name in features}, labels, range(0, 100), range(100, 160), calls


@pytest.fixture(scope="module")
def result(problem):
    return runner.score(*problem[:4], CONFIG)


def test_names_and_numbers(result):
    metrics = result.metrics
    for task in ("knn", "probe"):
        for name in ("pixels", "init", "student", "perfect", "student_minus_init", "student_minus_pixels"):
            low, mean, high = (metrics[f"eval/{task}/{name}{end}"] for end in ("_low", "", "_high"))
            assert low <= mean <= high
        assert metrics[f"eval/{task}/perfect"] == 1.0
        assert metrics[f"eval/{task}/student"] > metrics[f"eval/{task}/init"] + 0.05
        assert metrics[f"eval/{task}/student_minus_init"] == pytest.approx(
            metrics[f"eval/{task}/student"] - metrics[f"eval/{task}/init"]
        )
    assert metrics["eval/linear_error/student/perfect"] < metrics["eval/linear_error/init/perfect"]
    assert 0.25 < metrics["eval/majority"] < 0.45
    assert metrics["eval/pictures/train"] == 90 and metrics["eval/pictures/held_out"] == 55
    assert all(isinstance(value, (int, float)) for value in metrics.values())


def test_kept_answers_give_the_metric_again(result):
    for task in ("knn", "probe"):
        answers = result.predictions[task]["student"]
        right = [answer == truth for answer, truth in zip(answers, result.truth, strict=True)]
        assert np.mean(right) == pytest.approx(result.metrics[f"eval/{task}/student"])
    assert len(result.held_out) == 55 and result.classes == ("a", "b", "c")


def test_batches_and_repeats(problem, result):
    assert max(problem[4]) == 16
    assert runner.evaluate(*problem[:4], CONFIG) == result.metrics


def test_what_was_scored_before_is_compared_with_and_not_run_again(problem, result):
    predictors, *rest, calls = problem
    shared = runner.score({name: predictors[name] for name in ("pixels", "init", "perfect")}, *rest, CONFIG)
    calls.clear()
    alone = runner.score({"student": predictors["student"]}, *rest, CONFIG, shared.scored)
    assert sum(calls) == 90 + 55
    # Together they say all that one evaluation says, and nothing twice.
    both = {"eval/majority", "eval/classes", "eval/pictures/train", "eval/pictures/held_out"}
    assert set(alone.metrics) & set(shared.metrics) == both
    assert alone.metrics | shared.metrics == result.metrics
    assert alone.predictions["knn"] == {"student": result.predictions["knn"]["student"]}
    assert shared.scored["pixels"].gallery is None and shared.scored["init"].gallery.shape == (90, 6)
    with pytest.raises(InputError, match="init was scored on other pictures than these 10"):
        labels = [*rest[0][:105], *[None] * 50, *rest[0][155:]]
        runner.score({"student": predictors["student"]}, labels, *rest[1:], CONFIG, {"init": shared.scored["init"]})


def test_table_lists_each_network_once(result):
    text = runner.table(result.metrics)
    assert runner.accuracy_names(result.metrics) == ["pixels", "init", "student", "perfect"]
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["pixels", "init", "student", "perfect"]
    assert "student minus its start, k-NN: +" in text


def test_refuses(problem):
    predictors, labels, train, held_out, _ = problem
    only = {"student": predictors["student"]}
    with pytest.raises(InputError, match="picture number 98 is both"):
        runner.evaluate(only, labels, train, range(98, 120), CONFIG)
    with pytest.raises(InputError, match="held-out pictures with a label, found none"):
        runner.evaluate(only, [*labels[:100], *[None] * 60], train, held_out, CONFIG)
    with pytest.raises(InputError, match="eval.neighbours"):
        runner.evaluate(only, labels, train, held_out, dataclasses.replace(CONFIG, neighbours=500))
    with pytest.raises(InputError, match="features of student: expected"):
        runner.evaluate({"student": lambda rows: np.ones((1, 2))}, labels, train, held_out, CONFIG)
    with pytest.raises(InputError, match="picture number 7 has values that are not finite"):
        broken = {"student": lambda rows: np.where(np.array(rows)[:, None] == 7, np.nan, np.ones((len(rows), 2)))}
        runner.evaluate(broken, labels, train, held_out, CONFIG)
