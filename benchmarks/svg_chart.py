"""Line and bar charts as SVG text: the same input gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
_WIDTH, _HEIGHT = 720.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 72.0, 190.0, 40.0, 52.0


@dataclass(frozen=True)
class Series:
    """Points of one line; `marks_only` draws no line between them, `dashed` no marks."""

    name: str
    points: Sequence[tuple[float, float]]
    marks_only: bool = False
    dashed: bool = False


class _Axis:
    """A logarithmic axis from the powers below and above its values."""

    def __init__(self, values: list[float], base: int, low: float, high: float) -> None:
        self.base, self.low, self.high = base, low, high
        logs = [math.log(v, base) for v in values]
        self.first = math.floor(min(logs) + 1e-9)
        self.last = max(math.ceil(max(logs) - 1e-9), self.first + 1)

    def at(self, value: float) -> float:
        share = (math.log(value, self.base) - self.first) / (self.last - self.first)
        return self.low + share * (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        every = max(1, (self.last - self.first) // 8)
        return [float(self.base) ** p for p in range(self.first, self.last + 1, every)]


def lines(title: str, x_text: str, y_text: str, series: Sequence[Series], x_base: int = 2) -> str:
    """Lines on two logarithmic axes.

    Raises:
        ValueError: no points, or one that is not positive.
    """
    points = [p for one in series for p in one.points]
    if not points or min(min(p) for p in points) <= 0:
        raise ValueError("series: expected positive points")
    x = _Axis([p[0] for p in points], x_base, _LEFT, _WIDTH - _RIGHT)
    y = _Axis([p[1] for p in points], 10, _HEIGHT - _BOTTOM, _TOP)
    out = _begin(title, _HEIGHT)
    for tick in x.ticks:
        at = x.at(tick)
        out.append(_line(at, _TOP, at, _HEIGHT - _BOTTOM, "#e6e6e6"))
        out.append(_text(at, _HEIGHT - _BOTTOM + 18, number(tick), "middle"))
    for tick in y.ticks:
        at = y.at(tick)
        out.append(_line(_LEFT, at, _WIDTH - _RIGHT, at, "#e6e6e6"))
        out.append(_text(_LEFT - 8, at + 4, number(tick), "end"))
    out.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, x_text, "middle"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    out.append(
        f'<text transform="translate(16 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_text)}</text>"
    )
    for index, one in enumerate(series):
        out += _drawn(one, COLOURS[index % len(COLOURS)], x, y, index)
    return "\n".join([*out, "</svg>"]) + "\n"


def _drawn(one: Series, colour: str, x: _Axis, y: _Axis, index: int) -> list[str]:
    at = [(x.at(a), y.at(b)) for a, b in sorted(one.points)]
    out = []
    width = 3 if index == 0 else 1.8
    if not one.marks_only:
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in at)
        dash = ' stroke-dasharray="6 4"' if one.dashed else ""
        out.append(f'<path fill="none" stroke="{colour}" stroke-width="{width}"{dash} d="{path}"/>')
    if not one.dashed:
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in at]
    row = _TOP + 14 + 20 * index
    left = _WIDTH - _RIGHT + 14
    out.append(_line(left, row - 4, left + 18, row - 4, colour, width))
    out.append(_text(left + 24, row, one.name))
    return out


def bars(title: str, unit: str, groups: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """Groups of horizontal bars on a logarithmic axis, with their values; the first bar's name has
    the first colour in all groups.

    Raises:
        ValueError: no bars, or one that is not positive.
    """
    values = [v for _, group in groups for _, v in group]
    if not values or min(values) <= 0:
        raise ValueError("groups: expected positive values")
    names = list(dict.fromkeys(name for _, group in groups for name, _ in group))
    rows = sum(len(group) for _, group in groups)
    height = _TOP + 16.0 * rows + 14.0 * len(groups) + 30.0 + 18.0 * len(names)
    x = _Axis([*values, min(values) / 2], 10, 170.0, _WIDTH - 90.0)
    out = _begin(title, height)
    at = _TOP
    for label, group in groups:
        out.append(_text(160, at + 8.0 * len(group) + 4, label, "end"))
        for name, value in group:
            colour = COLOURS[names.index(name) % len(COLOURS)]
            width = x.at(value) - x.low
            out.append(
                f'<rect x="{x.low:.1f}" y="{at:.1f}" width="{width:.1f}" height="13" '
                f'fill="{colour}"/>'
            )
            out.append(_text(x.low + width + 5, at + 11, f"{number(value)} {unit}"))
            at += 16.0
        at += 14.0
    for index, name in enumerate(names):
        row = at + 14.0 + 18.0 * index
        colour = COLOURS[index % len(COLOURS)]
        out.append(f'<rect x="170" y="{row - 10:.1f}" width="13" height="11" fill="{colour}"/>')
        out.append(_text(190, row, name))
    return "\n".join([*out, "</svg>"]) + "\n"


def number(value: float) -> str:
    """Three digits, with k and M for thousands and millions."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _begin(title: str, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" '
        f'width="{_WIDTH:.0f}" height="{height:.0f}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
