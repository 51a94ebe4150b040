"""A drawing as plain marks, written as SVG or PNG.

Colours suit light and dark backgrounds, and colour-blind readers (Okabe and Ito's palette).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from fork_attn.reason.text_width import printable

FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"

# Name: colour on light and on dark backgrounds.
COLOURS = {
    "ink": ("#30343b", "#dfe3ea"),
    "faint": ("#6a707a", "#9aa3b0"),
    "axis": ("#b4bac3", "#4a515c"),
    "card": ("#ffffff", "#14171c"),
    "edge": ("#d5d9df", "#333942"),
    "prompt": ("#56b4e9", "#56b4e9"),
    "trunk": ("#8a63d2", "#a48be0"),
    "thread": ("#0072b2", "#3a94d0"),
    "limit": ("#e69f00", "#e69f00"),
    "malformed": ("#d55e00", "#e8762a"),
    "dropped": ("#a3a9b3", "#6b727d"),
}
SIZES = {"title": 20, "label": 13, "ink": 13, "faint": 12, "small": 11}


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    width: float
    height: float
    colour: str
    opacity: float = 1.0
    radius: float = 2.0
    edge: str = ""
    note: str = ""  # shown under the pointer
    cell: str = ""  # which tokens it stands for, "low-high"


@dataclass(frozen=True)
class Line:
    """From point to point; `curved` leaves the first and enters the last horizontally."""

    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 1.5
    dashed: bool = False
    curved: bool = False


@dataclass(frozen=True)
class Text:
    """Text whose baseline begins (or, by `anchor`, ends) at a point."""

    x: float
    y: float
    text: str
    size: str = "ink"
    colour: str = "ink"
    bold: bool = False
    anchor: str = "start"


Mark = Rect | Line | Text


@dataclass
class Group:
    """Marks that belong together; `data` become `data-` attributes in SVG."""

    marks: list[Mark] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)


@dataclass
class Scene:
    width: float
    height: float
    title: str
    groups: list[Group] = field(default_factory=list)

    def marks(self) -> Iterable[Mark]:
        return (mark for group in self.groups for mark in group.marks)

    def svg(self) -> str:
        """An SVG document that needs nothing else."""
        size = f'width="{self.width:.0f}" height="{self.height:.0f}"'
        box = f'viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
        body = "\n".join(_group(group) for group in self.groups)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} role="img">\n'
            f"<title>{_text(self.title)}</title>\n<style>{_style()}</style>\n{body}\n</svg>\n"
        )

    def save_png(self, path: Path, scale: float = 2.0) -> None:
        """Writes a PNG on a light background.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from fork_attn.reason.scene_png import save

        save(self, path, scale)


def _style() -> str:
    lines = [f"text {{ font-family: {FONT}; }}"]
    lines += [f".s-{name} {{ font-size: {px}px; }}" for name, px in SIZES.items()]
    lines.append(".bold { font-weight: 600; }")

    def theme(index: int) -> list[str]:
        return [
            f".f-{name} {{ fill: {pair[index]}; }} .l-{name} {{ stroke: {pair[index]}; }}"
            for name, pair in COLOURS.items()
            if index == 0 or pair[0] != pair[1]
        ]

    dark = "\n  ".join(theme(1))
    lines += [*theme(0), f"@media (prefers-color-scheme: dark) {{\n  {dark}\n}}"]
    return "\n" + "\n".join(lines) + "\n"


def _group(group: Group) -> str:
    inner = "\n".join(map(_mark, group.marks))
    if not group.data:
        return inner
    attributes = " ".join(f"data-{name}={quoteattr(v)}" for name, v in group.data.items())
    return f"<g {attributes}>\n{inner}\n</g>"


def _mark(mark: Mark) -> str:
    if isinstance(mark, Rect):
        return _rect(mark)
    if isinstance(mark, Line):
        dash = ' stroke-dasharray="2 4"' if mark.dashed else ""
        return (
            f'<path d="{_path(mark)}" fill="none" class="l-{mark.colour}" '
            f'stroke-width="{mark.width:g}"{dash}/>'
        )
    css = f"s-{mark.size} f-{mark.colour}" + (" bold" if mark.bold else "")
    anchor = f' text-anchor="{mark.anchor}"' if mark.anchor != "start" else ""
    return (
        f'<text x="{mark.x:.1f}" y="{mark.y:.1f}" class="{css}"{anchor}>{_text(mark.text)}</text>'
    )


def _rect(mark: Rect) -> str:
    css = f"f-{mark.colour}" + (f" l-{mark.edge}" if mark.edge else "")
    opacity = f' fill-opacity="{mark.opacity:g}"' if mark.opacity != 1 else ""
    place = (
        f'x="{mark.x:.1f}" y="{mark.y:.1f}" width="{max(mark.width, 0.5):.1f}" '
        f'height="{mark.height:.1f}" rx="{mark.radius:g}" class="{css}"{opacity}'
    )
    place += f' data-cell="{mark.cell}"' if mark.cell else ""
    if not mark.note:
        return f"<rect {place}/>"
    return f"<rect {place}><title>{_text(mark.note)}</title></rect>"


def _path(line: Line) -> str:
    (x0, y0), *rest = line.points
    parts = [f"M{x0:.1f},{y0:.1f}"]
    for x, y in rest:
        half = (x0 + x) / 2
        bend = f"C{half:.1f},{y0:.1f} {half:.1f},{y:.1f} {x:.1f},{y:.1f}"
        parts.append(bend if line.curved else f"L{x:.1f},{y:.1f}")
        x0, y0 = x, y
    return " ".join(parts)


def _text(text: str) -> str:
    return escape(printable(text))
