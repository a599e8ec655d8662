"""Curves as SVG that works without a script; page.js adds the values under the pointer.

A chart is drawn in units of its viewBox, which the page scales to its column. Each run has a colour (CSS class c0, c1,
…), so that a chart can show several.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from megalite.report.numbers import short, ticks

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 30  # margins
MOST_POINTS = 800  # of a curve: more than a chart has pixels
SMOOTHING = 0.05  # weight of a new value in the moving mean of noisy curves
COLOURS = 8

Points = list[tuple[float, float]]


@dataclass
class Curve:
    """name: of the run. colour: index. faint: drawn thin, in the background. dots: draw a dot at each point."""

    name: str
    colour: int
    points: Points
    faint: bool = False
    dots: bool = False


@dataclass
class Mark:
    """A vertical line at a step, with a tooltip. kind: `restart` or `fault`."""

    step: float
    kind: str
    text: str


@dataclass
class Chart:
    """title: with the unit. zero: whether the vertical axis starts at 0."""

    title: str
    curves: list[Curve]
    zero: bool = False
    marks: list[Mark] = field(default_factory=list)


def thinned(points: Points) -> Points:
    """At most MOST_POINTS points: the lowest and the highest of each group of neighbours, so that no peak is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = -(-2 * len(points) // MOST_POINTS)
    result: Points = []
    for first in range(0, len(points), size):
        group = points[first : first + size]
        low = min(group, key=lambda point: point[1])
        high = max(group, key=lambda point: point[1])
        result += sorted({low, high})
    return result


def smoothed(points: Points) -> Points:
    """The exponential moving mean with bias correction (as in arXiv 1412.6980, section 3)."""
    mean = weight = 0.0
    result = []
    for x, y in points:
        mean += SMOOTHING * (y - mean)
        weight += SMOOTHING * (1 - weight)
        result.append((x, mean / weight))
    return result


def svg(chart: Chart) -> str:
    """The chart; empty if no curve has a point."""
    everything = [point for curve in chart.curves for point in curve.points]
    if not everything:
        return ""
    scale = _Scale(everything, chart.zero)
    parts = [*_axes(scale)]
    for mark in chart.marks:
        if scale.x0 <= mark.step <= scale.x1:
            x = scale.x(mark.step)
            line = f'<line class="mark {mark.kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            parts.append(f"{line}<title>{escape(mark.text)}</title></line>")
    parts += [_drawn(curve, scale) for curve in sorted(chart.curves, key=lambda c: not c.faint)]
    label = escape(chart.title, quote=True)
    return (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f"data-curves='{_for_script(chart, scale)}'>{''.join(parts)}</svg></figure>"
    )


class _Scale:
    """Maps values to coordinates in the viewBox."""

    def __init__(self, points: Sequence[tuple[float, float]], zero: bool) -> None:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.x0, self.x1 = min(xs), max(xs)
        self.y0, self.y1 = min(0.0, *ys) if zero else min(ys), max(ys)
        if self.x1 == self.x0:
            self.x0, self.x1 = self.x0 - 0.5, self.x1 + 0.5
        room = 0.05 * (self.y1 - self.y0) or abs(self.y1) * 0.1 or 1.0
        self.y1 += room
        self.y0 -= 0 if zero else room

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def _axes(scale: _Scale) -> list[str]:
    parts = []
    for value in ticks(scale.y0, scale.y1):
        y = scale.y(value)
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{short(value)}</text>')
    for value in ticks(scale.x0, scale.x1):
        x = scale.x(value)
        anchor = "end" if x > WIDTH - RIGHT - 20 else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" class="{anchor}">{short(value)}</text>'
        )
    return parts


def _drawn(curve: Curve, scale: _Scale) -> str:
    points = [(scale.x(x), scale.y(y)) for x, y in curve.points]
    colour = f"c{curve.colour % COLOURS}"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    line = f'<polyline class="{colour}{" faint" if curve.faint else ""}" points="{path}"/>'
    if not curve.dots and len(points) > 1:
        return line
    return line + "".join(
        f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points
    )


def _for_script(chart: Chart, scale: _Scale) -> str:
    """The data from which page.js finds the point under the pointer, as an attribute's text."""
    curves = [
        {"name": curve.name, "colour": curve.colour % COLOURS, "points": curve.points}
        for curve in chart.curves
        if not curve.faint
    ]
    box = [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM, scale.x0, scale.x1, scale.y0, scale.y1]
    return escape(json.dumps({"box": box, "curves": curves}), quote=True)
