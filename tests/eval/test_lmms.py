"""Our models inside lmms-eval, against the least of its interface (0.7.3)."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
from PIL import Image

from tests.eval.answering import COLOURS, ColourAnswerer
from tove_jax.errors import InputError
from tove_jax.eval import answerers, lmms


@pytest.fixture
def package(monkeypatch):
    """A package with what the adapter takes from lmms-eval; returns the base class's module."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    class Base:
        def __init__(self):
            self.task_dict = {}
            self.cached = []
            self.cache_hook = types.SimpleNamespace(add_partial=lambda *what: self.cached.append(what))

    @dataclasses.dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None

    modules["lmms_eval.api.model"].lmms = Base
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    monkeypatch.delitem(lmms.__dict__, "Tove", raising=False)
    yield Base
    lmms.__dict__.pop("Tove", None)


@pytest.fixture
def model(package, monkeypatch):
    opened = []
    monkeypatch.setattr(
        answerers, "open_answerer", lambda folder, **options: opened.append((folder, options)) or ColourAnswerer()
    )
    made = lmms.Tove(pretrained="folder", batch_size="2", experts="a+b", step=3, device="cpu")
    assert opened == [("folder", {"step": 3, "experts": ("a", "b"), "template": ""})]
    made.task_dict = {"colours": {"test": [{"colour": name} for name in COLOURS]}}
    return made


def visual(document):
    return [Image.new("RGB", (3, 2), COLOURS[document["colour"]])]


def request(*arguments):
    return types.SimpleNamespace(args=arguments)


def test_the_class_is_where_the_manifest_says(package):
    found = lmms.manifest()
    module, _, name = found.simple_class_path.rpartition(".")
    assert (found.model_id, module) == ("tove_jax", "tove_jax.eval.lmms")
    made = getattr(sys.modules[module], name)
    assert issubclass(made, package) and made.is_simple and getattr(lmms, name) is made
    with pytest.raises(AttributeError):
        lmms.Other  # noqa: B018


def test_questions_are_answered_in_order_and_by_batches(model):
    short, long = {"max_new_tokens": 16, "until": ["e"]}, {"max_new_tokens": 64}
    asked = [request("What?", short if number != 2 else long, visual, number, "colours", "test") for number in range(3)]
    # "green" and "red" are cut at their first e.
    assert model.generate_until(asked) == ["r", "gr", "blue"]
    assert model.bridge._answerer.sizes == [2, 1]
    assert model.cached[0] == ("generate_until", ("What?", short), "r")


def test_losses_of_choices_and_of_single_continuations(model):
    texts = [" red", " blue", " green"]
    choices = [request("Which?", text, visual, 0, "colours", "test") for text in texts]
    found = model.loglikelihood(choices)
    assert [loss for loss, _ in found] == [1.0, 6.0, 7.0] and not any(greedy for _, greedy in found)
    single = [
        request("Which?", lambda document: document["colour"], visual, number, "colours", "test") for number in (0, 1)
    ]
    assert model.loglikelihood(single) == [(1.0, True), (1.0, True)]
    assert model.loglikelihood([request("Which?", "no", visual, 0, "colours", "test")]) == [(4.0, False)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1024, False, 1.0, 1.0, 1)),
        ({"max_new_tokens": 9, "temperature": 0, "num_beams": 3, "top_p": None}, (9, False, 1.0, 1.0, 3)),
        ({"temperature": 0.5, "top_p": 0.9, "num_beams": 3}, (1024, True, 0.5, 0.9, 1)),
    ],
)
def test_settings(settings, expected):
    found = lmms.decoding_of(settings)
    assert (found.new_tokens, found.sample, found.temperature, found.top_p, found.beams) == expected


def test_bad_input(model):
    with pytest.raises(InputError, match="expected pretrained, step, experts, template, found dtype"):
        lmms.Tove(pretrained="folder", dtype="auto")
    with pytest.raises(InputError, match="task colours: expected pictures, found str"):
        model.generate_until([request("What?", {}, lambda document: ["film.mp4"], 0, "colours", "test")])
    with pytest.raises(InputError, match="several rounds"):
        model.generate_until_multi_round([])
    assert lmms.pictures_of(None, "t") == [] and lmms.cut_at("a b", None) == "a b"
