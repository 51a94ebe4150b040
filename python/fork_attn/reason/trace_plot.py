"""A trace's picture in the format that a path names."""

from __future__ import annotations

from pathlib import Path

from fork_attn.reason.trace import Trace

SUFFIXES = (".svg", ".html", ".png")


def check_suffix(path: Path) -> None:
    """Raises: ValueError: the path ends in none of `SUFFIXES`."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: expected one of {', '.join(SUFFIXES)}, got {str(path)!r}")


def plot(trace: Trace, path: Path) -> None:
    """Writes the picture; see `Trace.plot`."""
    from fork_attn.reason import trace_html, trace_picture

    check_suffix(path)
    if path.suffix == ".png":
        trace_picture.draw(trace).save_png(path)
    elif path.suffix == ".svg":
        path.write_text(trace_picture.draw(trace).svg(), encoding="utf-8")
    else:
        path.write_text(trace_html.html(trace), encoding="utf-8")
