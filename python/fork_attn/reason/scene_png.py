"""Scenes as PNG, with matplotlib."""

from __future__ import annotations

from pathlib import Path

from fork_attn.reason.scene import COLOURS, SIZES, Line, Rect, Scene, Text

_DPI = 100.0


def save(scene: Scene, path: Path, scale: float) -> None:
    """Draws a scene in its light colours, `scale` pixels for each of its units.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error}; PNG pictures need it: pip install "fork-attn[plot]", or write SVG'
        ) from error
    figure = Figure(figsize=(scene.width / _DPI, scene.height / _DPI), dpi=_DPI * scale)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, scene.width)
    axes.set_ylim(scene.height, 0)
    axes.axis("off")
    for order, mark in enumerate(scene.marks()):
        if isinstance(mark, Rect):
            _rect(axes, mark, order)
        elif isinstance(mark, Line):
            _line(axes, mark, order)
        else:
            _text(axes, mark, order)
    figure.savefig(path, format="png", facecolor=COLOURS["card"][0])


def _rect(axes, mark: Rect, order: int) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.patches import Rectangle

    edge = COLOURS[mark.edge][0] if mark.edge else "none"
    axes.add_patch(
        Rectangle(
            (mark.x, mark.y), max(mark.width, 0.5), mark.height, facecolor=COLOURS[mark.colour][0],
            alpha=mark.opacity, edgecolor=edge, linewidth=0.7, zorder=order,
        )
    )  # fmt: skip


def _line(axes, mark: Line, order: int) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    points, codes = [mark.points[0]], [Outline.MOVETO]
    for (x0, y0), (x1, y1) in zip(mark.points, mark.points[1:], strict=False):
        half = (x0 + x1) / 2
        if mark.curved:
            points += [(half, y0), (half, y1), (x1, y1)]
            codes += [Outline.CURVE4] * 3
        else:
            points.append((x1, y1))
            codes.append(Outline.LINETO)
    axes.add_patch(
        PathPatch(
            Outline(points, codes), fill=False, edgecolor=COLOURS[mark.colour][0],
            linewidth=mark.width * 0.72, linestyle=":" if mark.dashed else "-", zorder=order,
        )
    )  # fmt: skip


def _text(axes, mark: Text, order: int) -> None:  # type: ignore[no-untyped-def]
    axes.text(
        mark.x, mark.y, mark.text.replace("$", r"\$"), color=COLOURS[mark.colour][0], zorder=order,
        fontsize=SIZES[mark.size] * 0.68, fontweight="bold" if mark.bold else "normal",
        ha={"start": "left", "end": "right", "middle": "center"}[mark.anchor], va="baseline",
    )  # fmt: skip
