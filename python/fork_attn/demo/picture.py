"""The picture of a trace: prompt, fork, threads, join, conclusion from left to right, as SVG.

Horizontal is position: what stands at the same place was written at the same time. The cuts in the
bars are where KV pages end. Colours suit light and dark backgrounds, and colour-blind readers
(Okabe and Ito's palette).
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from fork_attn.demo.trace import Node, Trace, load
from fork_attn.reason.text_width import wrap

WIDTH = 1200
MARGIN = 36
BAR = 18
LINE = 17  # from one line of text to the next
TRUNK, END = "#56b4e9", "#8a63d2"
LANES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
STYLE = f"""
text {{ font-family: {FONT}; font-size: 13px; fill: #30343b; }}
.title {{ font-size: 20px; font-weight: 600; }}
.step {{ font-size: 14px; font-weight: 600; }}
.label {{ font-weight: 600; }}
.faint {{ fill: #6a707a; font-size: 12px; }}
.card {{ fill: #ffffff; stroke: #d5d9df; }}
.cut {{ stroke: #ffffff; stroke-width: 2; }}
.axis {{ stroke: #b4bac3; }}
.copy {{ fill-opacity: 0.3; }}
@media (prefers-color-scheme: dark) {{
  text {{ fill: #dfe3ea; }}
  .faint {{ fill: #9aa3b0; }}
  .card {{ fill: #14171c; stroke: #333942; }}
  .cut {{ stroke: #14171c; }}
  .axis {{ stroke: #4a515c; }}
}}
"""


def draw(trace: Trace) -> str:
    """An SVG document of the trace: tokens, positions and pages, but no times."""
    return _Drawing(trace).document()


def colour(index: int) -> str:
    """Of the lane with that index."""
    return LANES[index % len(LANES)]


class _Drawing:
    """Three columns as wide as their tokens, at least wide enough for their text."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.parts: list[str] = []
        threads, gap = trace.threads, 56.0
        width = WIDTH - 2 * MARGIN - 2 * gap
        fork = trace.prompt.end
        join = max(node.end for node in threads)
        spans = (max(1, fork), max(1, join - fork), max(1, len(trace.conclusion.token_ids)))
        least = (0.22 * width, 0.34 * width, 0.26 * width)
        spare = width - sum(least)
        widths = [low + spare * span / sum(spans) for low, span in zip(least, spans, strict=True)]
        self.left = (MARGIN, MARGIN + widths[0] + gap, WIDTH - MARGIN - widths[2])
        self.scale = [w / span for w, span in zip(widths, spans, strict=True)]
        self.widths = widths
        self.texts = [wrap(_quote(node), widths[1] - 24, lines=5) for node in threads]
        heights = [BAR + 26 + LINE * len(lines) for lines in self.texts]
        self.tops = [116.0]
        for height in heights:
            self.tops.append(self.tops[-1] + height + 12)
        self.bottom = self.tops[-1]
        self.middle = (self.tops[0] + self.bottom) / 2 - 46

    def document(self) -> str:
        self._heading()
        self._prompt()
        for index, node in enumerate(self.trace.threads):
            self._thread(index, node)
        self._conclusion()
        self._axis(self.bottom + 8)
        bottom = self._memory(self.bottom + 82)
        height = round(bottom + 24)
        size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
        title = f"A prompt forks into {len(self.trace.threads)} threads over one KV cache and joins"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{title}</title>\n'
            f"<style>{STYLE}</style>\n"
            f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" '
            'rx="10"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )

    def _text(self, x: float, y: float, text: str, css: str = "", anchor: str = "") -> None:
        css = f' class="{css}"' if css else ""
        anchor = f' text-anchor="{anchor}"' if anchor else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{css}{anchor}>{escape(text)}</text>')

    def _lines(self, x: float, y: float, lines: list[str], note: str = "") -> None:
        for i, line in enumerate(lines):
            self._text(x, y + i * LINE, line)
        if note:
            self._text(x, y + len(lines) * LINE + 10, note, "faint")

    def _bar(self, column: int, y: float, node: Node, fill: str) -> float:
        """A node's tokens, cut where a page ends; returns its right end."""
        start = (self.trace.prompt.position, self.trace.prompt.end, self.trace.conclusion.position)
        x = self.left[column] + (node.position - start[column]) * self.scale[column]
        end = x + len(node.token_ids) * self.scale[column]
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{end - x:.1f}" height="{BAR}" rx="3" '
            f'fill="{fill}"/>'
        )
        visible = self.trace.page_size * self.scale[column] > 5
        for _, count in node.pages[:-1] if visible else ():
            x += count * self.scale[column]
            self.parts.append(
                f'<line class="cut" x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y + BAR:.1f}"/>'
            )
        return end

    def _curve(self, x0: float, y0: float, x1: float, y1: float, stroke: str) -> None:
        half = (x0 + x1) / 2
        path = f"M{x0:.1f},{y0:.1f} C{half:.1f},{y0:.1f} {half:.1f},{y1:.1f} {x1:.1f},{y1:.1f}"
        self.parts.append(f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="3"/>')

    def _heading(self) -> None:
        n = len(self.trace.threads)
        self._text(MARGIN, 42, f"One prompt, {n} threads, one KV cache", "title")
        steps = (
            "1  The prompt is read once",
            f"2  Fork: {n} threads, decoded together",
            "3  Join: it goes on, seeing them all",
        )
        for x, step in zip(self.left, steps, strict=True):
            self._text(x, 80, step, "step")

    def _prompt(self) -> None:
        y, x = self.middle, self.left[0]
        self._bar(0, y, self.trace.prompt, TRUNK)
        pages = len(self.trace.prompt.pages)
        tokens = len(self.trace.prompt.token_ids)
        self._text(x, y - 10, f"{tokens} tokens on {pages} pages", "faint")
        lines = wrap(self.trace.prompt.label, self.widths[0], lines=6)
        self._lines(x, y + BAR + 18, lines, "every thread sees these pages: no copy")

    def _thread(self, index: int, node: Node) -> None:
        x, y, fill = self.left[1], self.tops[index], colour(index)
        middle = self.middle + BAR / 2
        bar_y = y + 8
        self._curve(self.left[0] + self.widths[0], middle, x, bar_y + BAR / 2, fill)
        end = self._bar(1, bar_y, node, fill)
        into = self.left[2] - 10
        bend = into - 46
        if bend > end:
            self.parts.append(
                f'<path d="M{end:.1f},{bar_y + BAR / 2:.1f} H{bend:.1f}" stroke="{fill}" '
                'stroke-width="1.5" stroke-dasharray="2 4"/>'
            )
        lanes = len(self.trace.threads)
        target = middle + (index - (lanes - 1) / 2) * BAR / max(lanes, 1)
        self._curve(max(bend, end), bar_y + BAR / 2, into + 10, target, fill)
        first, *rest = self.texts[index]
        label = node.label.strip()
        top = bar_y + BAR + 17
        if first.startswith(label):
            self.parts.append(
                f'<text x="{x:.1f}" y="{top:.1f}"><tspan class="label">{escape(label)}</tspan>'
                f"{escape(first[len(label) :])}</text>"
            )
        else:
            self._text(x, top, first, "label")
        self._lines(x, top + LINE, rest)

    def _conclusion(self) -> None:
        node, x, y = self.trace.conclusion, self.left[2], self.middle
        self._bar(2, y, node, END)
        n = len(self.trace.threads)
        self._text(x, y - 10, f"sees the prompt and all {n} threads", "faint")
        lines = wrap(_quote(node), self.widths[2], lines=9)
        self._lines(x, y + BAR + 18, lines, "nothing is read again")

    def _axis(self, y: float) -> None:
        trace = self.trace
        join = trace.conclusion.position
        right = self.left[2] + len(trace.conclusion.token_ids) * self.scale[2]
        self.parts.append(
            f'<path class="axis" d="M{MARGIN},{y:.1f} H{right:.1f} m-6,-4 l6,4 l-6,4" fill="none"/>'
        )
        marks = (
            (self.left[0], 0),
            (self.left[1], trace.prompt.end),
            (self.left[2], join),
            (right, trace.conclusion.end),
        )
        for i, (x, position) in enumerate(marks):
            self._text(x, y + 17, str(position), "faint", "end" if i == 3 else "")
        text = (
            f"position · {trace.total_tokens} tokens written after the prompt, "
            f"only {trace.critical_path_tokens} of them one after another"
        )
        self._text(MARGIN, y + 36, text, "faint")

    def _memory(self, y: float) -> float:
        """Pages as squares: those stored, and those of contexts that share nothing.

        Returns where it ends.
        """
        self._text(MARGIN, y, f"KV memory, in pages of {self.trace.page_size} tokens", "step")
        left = MARGIN + 210.0
        rows = (
            ("fork-attn: each page once", [self._stored()]),
            ("every context by itself", self._contexts()),
        )
        longest = max(sum(map(len, groups)) + len(groups) for _, groups in rows)
        pitch = min(16.0, (WIDTH - MARGIN - 50 - left) / longest)
        side = pitch * 0.8
        for row, (label, groups) in enumerate(rows):
            top, x = y + 16 + row * 26, left
            self._text(MARGIN, top + 11, label, "faint")
            for group in groups:
                for fill, is_copy in group:
                    look = ' class="copy"' if is_copy else ""
                    self.parts.append(
                        f'<rect x="{x:.1f}" y="{top:.1f}" width="{side:.1f}" height="13" '
                        f'rx="{side / 6:.1f}" fill="{fill}"{look}/>'
                    )
                    x += pitch
                x += pitch * 0.6
            self._text(x + 6, top + 11, str(sum(map(len, groups))), "label")
        return y + 16 + 26 + 13

    def _stored(self) -> list[tuple[str, bool]]:
        """(colour, False) of each page that is stored: the colour of whoever wrote in it first."""
        seen: set[int] = set()
        stored: list[tuple[str, bool]] = []
        for node in self.trace.nodes:
            new = {page for page, _ in node.pages} - seen
            seen |= new
            stored += [(self._fill(node), False)] * len(new)
        return stored

    def _contexts(self) -> list[list[tuple[str, bool]]]:
        """(colour, is a copy) of each page of each context, if none shared anything."""
        groups = []
        for node in self.trace.nodes[1:]:
            context = [*(self.trace.nodes[parent] for parent in node.parents), node]
            tokens = [owner for owner in context for _ in owner.token_ids]
            groups.append(
                [
                    (self._fill(owner), owner is not node)
                    for owner in tokens[:: self.trace.page_size]
                ]
            )
        return groups

    def _fill(self, node: Node) -> str:
        if node.kind == "prompt":
            return TRUNK
        return END if node.kind == "conclusion" else colour(node.id - 1)


def _quote(node: Node) -> str:
    """A node's text in one line, with an ellipsis where it was cut off by the budget."""
    words = " ".join(node.text.split())
    return words + " …" if node.finish == "budget" else words


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(draw(load(source)), encoding="utf-8")
