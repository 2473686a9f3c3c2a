"""Charts as inline SVG, drawn with the page's own colours so that they follow light and dark."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_POINTS = 300
_DECADES = 5


class Series(NamedTuple):
    """One line of a chart.

    Attributes:
      name: label at its end.
      colour: a CSS colour, such as ``var(--student)``.
      steps: x values, ascending.
      values: y values; None and NaN leave a gap.
    """

    name: str
    colour: str
    steps: Sequence[float]
    values: Sequence[float | None]


class Bar(NamedTuple):
    """One row of a dot chart: a value with its interval."""

    name: str
    colour: str
    value: float
    low: float
    high: float
    strong: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers from at most `low` to at least `high`, about `count` of them."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(position * step, 12) for position in range(first, last + 1)]


def number(value: float) -> str:
    """Returns a short form of a number: ``1,000``, ``0.25``, ``3e-05``."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def thin(
    steps: Sequence[float], values: Sequence[float | None], points: int = _POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbouring points so that at most `points` are left; None becomes NaN."""
    x = np.asarray(steps, np.float64)
    y = np.array([math.nan if value is None else value for value in values], np.float64)
    if len(x) <= points:
        return x, y
    blocks = np.array_split(np.arange(len(x)), points)
    means = [float(np.nanmean(y[block])) if np.isfinite(y[block]).any() else math.nan for block in blocks]
    return np.array([x[block].mean() for block in blocks]), np.array(means)


def _svg(width: int, height: int, alt: str, body: Sequence[str], kind: str) -> str:
    label = html.escape(alt, quote=True)
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}" '
        f'style="--least:{width * 2 // 3}px">' + "".join(body) + "</svg>"
    )


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start", style: str = "") -> str:
    extra = f' style="{style}"' if style else ""
    place = f'x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"'
    return f"<text {place}{extra}>{html.escape(words)}</text>"


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves label positions apart, keeping their order, within [low, high]."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    floor = low
    for index in order:
        placed[index] = max(placed[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def line_chart(
    series: Sequence[Series],
    alt: str,
    *,
    width: int = 520,
    height: int = 250,
    from_zero: bool = False,
    logarithmic: bool = False,
) -> str:
    """Draws lines over steps, each named at its end.

    Args:
      series: the lines; longer ones than 300 points are averaged in blocks.
      alt: what the chart shows, for readers who do not see it.
      width: of the drawing, CSS pixels at full size.
      height: of the drawing; more where the names need it.
      from_zero: the value axis starts at zero.
      logarithmic: base-10 value axis where all values are above zero; what lies more than five decades below
        the largest is drawn there.

    Returns:
      An ``<svg>`` element.
    """
    lines = [(one, *thin(one.steps, one.values)) for one in series]
    lines = [(one, x, y) for one, x, y in lines if np.isfinite(y).any()]
    if not lines:
        return _svg(width, 60, alt, [_text(width / 2, 34, "no finite values", "tick", "middle")], "line")
    height = max(height, 15 * len(lines) + 50)
    finite = np.concatenate([y[np.isfinite(y)] for _, _, y in lines])
    logarithmic = logarithmic and bool((finite > 0).all())
    scale = np.log10 if logarithmic else np.asarray
    low, high = (float(value) for value in scale(np.array([finite.min(), finite.max()])))
    if logarithmic:
        # What is nothing beside the rest, such as a balance loss at an even start, shall not press it flat.
        low = max(low, high - _DECADES)
        lines = [(one, x, np.maximum(y, 10.0**low)) for one, x, y in lines]
        low, high = math.floor(low * 4) / 4, math.ceil(high * 4) / 4
        exponents = range(math.floor(low), math.ceil(high) + 1)
        marks = [m * 10.0**e for e in exponents for m in ((1, 2, 5) if high - low < 2.5 else (1,))]
        marks = [mark for mark in marks if low - 1e-9 <= math.log10(mark) <= high + 1e-9]
        if high - low < 1e-9:
            low, high = low - 0.25, high + 0.25
    else:
        marks = ticks(0.0 if from_zero else low, high)
        low, high = marks[0], marks[-1]
    start = min(float(x[0]) for _, x, _ in lines)
    stop = max(float(x[-1]) for _, x, _ in lines)
    longest = max(len(one.name) for one, _, _ in lines)
    left = 18 + 7 * max((len(number(mark)) for mark in marks), default=2)
    right, top, bottom = max(38, min(180, 24 + int(7.3 * longest))), 12, 30

    def across(x: float) -> float:
        return left + (width - left - right) * ((x - start) / (stop - start) if stop > start else 0.5)

    def up(y: float) -> float:
        return height - bottom - (height - top - bottom) * (y - low) / (high - low)

    body = []
    for mark in marks:
        level = up(float(scale(np.array(mark))))
        body.append(f'<line x1="{left}" x2="{width - right}" y1="{level:.1f}" y2="{level:.1f}" class="grid"/>')
        body.append(_text(left - 8, level + 4, number(mark), "tick", "end"))
    whole = [mark for mark in ticks(start, stop, 5) if start <= mark <= stop]
    for position, mark in enumerate(whole):
        words = number(mark) + (" steps" if position == len(whole) - 1 else "")
        body.append(_text(across(mark), height - 8, words, "tick", "middle"))
    ends = []
    for one, x, y in lines:
        path, pen = [], "M"
        for step, value in zip(x, y, strict=True):
            if not math.isfinite(value):
                pen = "M"
                continue
            path.append(f"{pen}{across(step):.1f} {up(float(scale(np.array(value)))):.1f}")
            pen = "L"
        body.append(f'<path d="{"".join(path)}" class="line" style="stroke:{one.colour}"/>')
        last = int(np.flatnonzero(np.isfinite(y))[-1])
        ends.append((across(float(x[last])), up(float(scale(np.array(y[last]))))))
    places = _spread([y for _, y in ends], 15, top + 4, height - bottom)
    for (one, _, _), (across_end, up_end), place in zip(lines, ends, places, strict=True):
        body.append(f'<circle cx="{across_end:.1f}" cy="{up_end:.1f}" r="3" style="fill:{one.colour}"/>')
        body.append(_text(width - right + 12, place + 4, one.name, "name", style=f"fill:{one.colour}"))
    return _svg(width, height, alt, body, "line")


class Curve(NamedTuple):
    """One line over named places, with or without an interval at each.

    Attributes:
      name: label at its end; empty for none.
      colour: a CSS colour.
      values: one a place.
      low: of the intervals, or empty.
      high: of the intervals, or empty.
    """

    name: str
    colour: str
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def place_chart(
    places: Sequence[Sequence[str]],
    curves: Sequence[Curve],
    alt: str,
    *,
    width: int = 520,
    height: int = 270,
    from_zero: bool = False,
    percent: bool = False,
) -> str:
    """Draws values over a few named places, such as encoders with fewer and fewer experts.

    Args:
      places: the lines of text below each place, left to right; long ones are broken between words.
      curves: the lines, each named at its end; a band shows the interval.
      alt: what the chart shows.
      width: of the drawing.
      height: of the drawing.
      from_zero: the value axis starts at zero.
      percent: values are shares, written in per cent.

    Returns:
      An ``<svg>`` element.
    """
    everything = [value for one in curves for values in (one.values, one.low, one.high) for value in values]
    marks = ticks(0.0 if from_zero else min(everything), max(everything))
    low, high = marks[0], marks[-1]

    def words(mark: float) -> str:
        return f"{100 * mark:.3g} %" if percent else number(mark)

    left = 18 + 7 * max(len(words(mark)) for mark in marks)
    right = 20 + int(7.3 * max(len(one.name) for one in curves))
    # Half a place at both sides, and lines no wider than a place, so that the words below fit.
    pitch = (width - left - right) / len(places)
    room = max(6, int(pitch / 6.8))
    places = [
        [part for said in place for part in textwrap.wrap(said, room, break_long_words=False)] for place in places
    ]
    top, bottom = 12, 14 + 16 * max(len(place) for place in places)

    def across(place: int) -> float:
        return left + pitch * (place + 0.5)

    def up(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - low) / (high - low)

    body = []
    for mark in marks:
        body.append(f'<line x1="{left}" x2="{width - right}" y1="{up(mark):.1f}" y2="{up(mark):.1f}" class="grid"/>')
        body.append(_text(left - 8, up(mark) + 4, words(mark), "tick", "end"))
    for place, said in enumerate(places):
        for line, text in enumerate(said):
            kind = "tick" if line else "name"
            body.append(_text(across(place), height - bottom + 18 + 15 * line, text, kind, "middle"))
    for one in curves:
        if one.low:
            there = [f"{across(place):.1f} {up(value):.1f}" for place, value in enumerate(one.high)]
            back = [f"{across(place):.1f} {up(value):.1f}" for place, value in enumerate(one.low)]
            body.append(f'<path d="M{"L".join([*there, *back[::-1]])}Z" class="band" style="fill:{one.colour}"/>')
    named = [up(one.values[-1]) for one in curves]
    spread = _spread(named, 15, top + 4, height - bottom)
    for one, name in zip(curves, spread, strict=True):
        points = [(across(place), up(value)) for place, value in enumerate(one.values)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        body.append(f'<path d="M{path}" class="line" style="stroke:{one.colour}"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:{one.colour}"/>' for x, y in points]
        if one.name:
            body.append(_text(points[-1][0] + 12, name + 4, one.name, "name", style=f"fill:{one.colour}"))
    return _svg(width, height, alt, body, "line")


def cluster_chart(
    places: Sequence[str],
    curves: Sequence[Curve],
    alt: str,
    *,
    references: Sequence[float | None] = (),
    width: int = 520,
    height: int = 270,
) -> str:
    """Draws shares (0 to 1) as bars from zero, a cluster a place, a bar a curve, with their intervals.

    Args:
      places: words below each cluster.
      curves: values by place, NaN for none; named above, in their colours, where they have names.
      alt: what the chart shows.
      references: of each place, a dashed line across its cluster; None for none.
      width: of the drawing.
      height: of the drawing, without the names above.

    Returns:
      An ``<svg>`` element.
    """
    everything = [value for one in curves for values in (one.values, one.high) for value in values]
    everything += [value for value in references if value is not None]
    marks = [mark for mark in ticks(0.0, max([0.1, *(v for v in everything if math.isfinite(v))])) if mark <= 1 + 1e-9]
    high = max([marks[-1], *(value for value in everything if math.isfinite(value))])
    left, right, bottom, top = 52, 12, 34, 12
    body, pen = [], float(left)
    for one in curves:
        if one.name:
            room = 30 + 7.3 * len(one.name)
            if pen + room > width and pen > left:
                pen, top = float(left), top + 18
            body.append(f'<rect x="{pen:.1f}" y="{top - 10}" width="10" height="10" style="fill:{one.colour}"/>')
            body.append(_text(pen + 15, top, one.name, "tick"))
            pen += room
    top += 18 if pen > left else 0
    height += top - 12
    pitch = (width - left - right) / max(1, len(places))
    bar = min(34.0, 0.8 * pitch / max(1, len(curves)))

    def up(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / high

    for mark in marks:
        body.append(f'<line x1="{left}" x2="{width - right}" y1="{up(mark):.1f}" y2="{up(mark):.1f}" class="grid"/>')
        body.append(_text(left - 8, up(mark) + 4, f"{100 * mark:.0f} %", "tick", "end"))
    for place, words in enumerate(places):
        middle = left + pitch * (place + 0.5)
        first = middle - bar * len(curves) / 2
        for number, one in enumerate(curves):
            value = one.values[place]
            if not math.isfinite(value):
                continue
            x, said = first + bar * number, html.escape(f"{one.name} {words}: {100 * value:.1f} %".strip())
            interval = ""
            if one.low:
                ends = f'y1="{up(one.low[place]):.1f}" y2="{up(one.high[place]):.1f}"'
                interval = (
                    f'<line x1="{x + bar / 2:.1f}" x2="{x + bar / 2:.1f}" {ends} '
                    'style="stroke:var(--ink);stroke-width:1.5"/>'
                )
            body.append(
                f'<g><title>{said}</title><rect x="{x + 1:.1f}" y="{up(value):.1f}" width="{bar - 2:.1f}" '
                f'height="{up(0) - up(value):.1f}" style="fill:{one.colour}"/>{interval}</g>'
            )
        reference = references[place] if references else None
        if reference is not None:
            ends = f'x1="{first - 6:.1f}" x2="{middle + bar * len(curves) / 2 + 6:.1f}"'
            level = f'y1="{up(reference):.1f}" y2="{up(reference):.1f}"'
            # A light line below the dashes, so that they are seen on bars too.
            body.append(f'<line {ends} {level} style="stroke:var(--surface);stroke-width:3"/>')
            body.append(f'<line {ends} {level} class="reference" style="stroke:var(--ink)"/>')
        body.append(_text(middle, height - bottom + 18, words, "name", "middle"))
    return _svg(width, height, alt, body, "bars")


def dot_chart(rows: Sequence[Bar], alt: str, *, reference: tuple[str, float] | None = None, width: int = 520) -> str:
    """Draws accuracies (0 to 1) as dots with their 95 % intervals, one row each.

    Args:
      rows: top to bottom; a strong row is drawn larger.
      alt: what the chart shows.
      reference: name and value of a dashed line, such as the commonest label.
      width: of the drawing.

    Returns:
      An ``<svg>`` element.
    """
    pitch, top, bottom = 34, 12, 34
    longest = max((len(row.name) for row in rows), default=4)
    left, right = min(220, 24 + 8 * longest), 64
    height = top + pitch * len(rows) + bottom
    lows = [row.low for row in rows] + ([reference[1]] if reference else [])
    marks = ticks(min(lows, default=0.0), max((row.high for row in rows), default=1.0), 6)
    marks = [mark for mark in marks if mark <= 1.0 + 1e-9]
    low, high = marks[0], max(marks[-1], max((row.high for row in rows), default=1.0))

    def across(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    body = []
    for mark in marks:
        x = across(mark)
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}" class="grid"/>')
        body.append(_text(x, height - bottom + 18, f"{100 * mark:.0f} %", "tick", "middle"))
    if reference:
        x = across(reference[1])
        body.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}" class="reference">'
            f"<title>{html.escape(reference[0])}: {100 * reference[1]:.1f} %</title></line>"
        )
    for position, row in enumerate(rows):
        y = top + pitch * (position + 0.5)
        kind = "name strong" if row.strong else "name"
        body.append(_text(left - 14, y + 4, row.name, kind, "end"))
        body.append(
            f'<g style="stroke:{row.colour};fill:{row.colour}"><title>{html.escape(row.name)}: '
            f"{100 * row.value:.1f} % ({100 * row.low:.1f} to {100 * row.high:.1f})</title>"
            f'<line x1="{across(row.low):.1f}" x2="{across(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            'class="whisker"/>'
            f'<circle cx="{across(row.value):.1f}" cy="{y:.1f}" r="{7 if row.strong else 5}"/></g>'
        )
        words = f"{100 * row.value:.1f} %"
        body.append(_text(width - right + 10, y + 4, words, "value strong" if row.strong else "value"))
    return _svg(width, height, alt, body, "dots")


def sheet(charts: Sequence[tuple[str, str]]) -> str:
    """Puts charts below each other into one SVG that stands alone, with the report's colours, light and dark.

    Args:
      charts: title, perhaps with a second line of words, and ``<svg>`` element of each, as the functions above
        give them.

    Returns:
      The text of an SVG file.
    """
    style = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    colours = style[: style.index("* {")]
    rules = "\n".join(line for line in style.splitlines() if line.startswith("svg "))
    body, top, widest = [], 16, 0
    for title, chart in charts:
        width, height = (int(side) for side in re.findall(r'viewBox="0 0 (\d+) (\d+)"', chart)[0])
        for line, words in enumerate(title.splitlines()):
            top += 18 if line else 14
            body.append(_text(24, top, words, "tick" if line else "name"))
        body.append(chart.replace("<svg ", f'<svg x="12" y="{top + 10}" width="{width}" height="{height}" ', 1))
        top += height + 26
        widest = max(widest, width + 24)
    font = "svg { font: 12.5px var(--sans); font-variant-numeric: tabular-nums; }"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {widest} {top}" width="{widest}" height="{top}">'
        f"<style>{html.escape(colours + font + rules, quote=False)}</style>"
        f'<rect width="{widest}" height="{top}" style="fill:var(--surface)"/>' + "".join(body) + "</svg>\n"
    )
