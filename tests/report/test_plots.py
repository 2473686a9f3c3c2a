"""Charts: well-formed, all finite, and placed where the numbers say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tove_jax.report import plots


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.241, 0.695), (-3, 4e4), (1e-7, 3e-6), (5, 5), (0, 0)])
def test_ticks_are_few_and_hold_the_values(low, high):
    marks = plots.ticks(low, high)
    assert marks[0] <= low + 1e-12 and marks[-1] >= high - 1e-12
    assert 2 <= len(marks) <= 8
    np.testing.assert_allclose(np.diff(marks), marks[1] - marks[0], rtol=1e-6)


def test_numbers_are_short():
    assert [plots.number(x) for x in (0, 0.25, 1234.5, 3e-5, 12.0)] == ["0", "0.25", "1,234", "3e-05", "12"]


def test_thinning_keeps_the_mean_and_leaves_gaps():
    steps = list(range(1000))
    x, y = plots.thin(steps, [float(step) for step in steps], 100)
    assert len(x) == 100
    np.testing.assert_allclose(y.mean(), 499.5)
    np.testing.assert_allclose(x, y)
    _, gap = plots.thin([0, 1, 2], [1.0, None, 3.0])
    assert np.isnan(gap[1])


def test_a_line_passes_its_points_in_order():
    svg = plots.line_chart([plots.Series("loss", "red", [0, 5, 10], [4.0, 2.0, 1.0])], "words <&>")
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == "words <&>"
    path = next(one for one in root if one.tag == "path").attrib["d"]
    points = np.array([[float(v) for v in pair.split()] for pair in re.findall(r"[\d.]+ [\d.]+", path)])
    assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) > 0).all()
    np.testing.assert_allclose(np.diff(points[:, 1])[0] / np.diff(points[:, 1])[1], 2, rtol=0.02)


def test_a_gap_breaks_the_line_and_a_label_a_series():
    one = plots.Series("a", "red", [1, 2, 3, 4, 5], [1.0, 2.0, None, float("nan"), 1.0])
    svg = plots.line_chart([one, plots.Series("b", "blue", [1, 5], [1.0, 1.0])], "", logarithmic=True)
    ElementTree.fromstring(svg)
    assert svg.count("M") == 3 and "nan" not in svg
    heights = [float(y) for y in re.findall(r'y="([\d.]+)" class="name"', svg)]
    assert abs(heights[0] - heights[1]) >= 14


def test_a_series_of_nothing_says_so():
    assert "no finite values" in plots.line_chart([plots.Series("a", "red", [1], [None])], "")


def test_dots_stand_in_order_and_inside():
    rows = [plots.Bar("low", "red", 0.2, 0.1, 0.3), plots.Bar("a & b", "blue", 0.9, 0.8, 1.0, True)]
    root = ElementTree.fromstring(plots.dot_chart(rows, "alt", reference=("commonest", 0.15)))
    circles = [float(one.attrib["cx"]) for one in root.iter("circle")]
    whiskers = [one for one in root.iter("line") if one.attrib["class"] == "whisker"]
    assert circles[0] < circles[1] <= 520
    for circle, line in zip(circles, whiskers, strict=True):
        assert float(line.attrib["x1"]) <= circle <= float(line.attrib["x2"])
    assert any("a & b: 90.0 %" in (title.text or "") for title in root.iter("title"))


def test_a_curve_over_places_meets_its_values_and_its_words_fit():
    places = [("3", "all"), ("2", "−\u00a0a rather long name"), ("1", "−\u00a0b"), ("0", "−\u00a0c")]
    values = [0.6, 0.5, 0.55, 0.4]
    low, high = [value - 0.1 for value in values], [value + 0.1 for value in values]
    svg = plots.place_chart(places, [plots.Curve("k-NN", "red", values, low, high)], "alt", percent=True)
    root = ElementTree.fromstring(svg)
    heights = [float(one.attrib["cy"]) for one in root if one.tag == "circle"]
    across = [float(one.attrib["cx"]) for one in root if one.tag == "circle"]
    assert np.argsort(heights).tolist() == np.argsort([-value for value in values]).tolist()
    np.testing.assert_allclose(np.diff(across), across[1] - across[0], atol=0.11)
    slope = np.diff(heights) / np.diff(values)
    np.testing.assert_allclose(slope, slope[0], rtol=0.01)
    words = [one.text for one in root if one.tag == "text"]
    assert "60 %" in words and "−\u00a0a rather long" in words and "name" in words
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for one in (one for one in root if one.tag == "text"):
        assert 0 < float(one.attrib["x"]) < width and 0 < float(one.attrib["y"]) <= height


def test_many_lines_get_room_for_their_names():
    series = [plots.Series(f"layer {place}", "red", [0, 1], [0.5, 0.5]) for place in range(24)]
    root = ElementTree.fromstring(plots.line_chart(series, "alt", from_zero=True))
    named = sorted(float(one.attrib["y"]) for one in root if one.tag == "text" and one.text.startswith("layer"))
    assert len(named) == 24 and min(np.diff(named)) > 14 and named[0] > 0


def test_what_is_nothing_does_not_press_a_logarithmic_chart_flat():
    series = [plots.Series("big", "red", [0, 1], [1.0, 2.0]), plots.Series("none", "red", [0, 1], [1e-14, 0.1])]
    svg = plots.line_chart(series, "alt", logarithmic=True)
    assert "1e-14" not in svg and ">0.0001<" in svg
