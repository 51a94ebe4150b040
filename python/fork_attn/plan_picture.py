"""A picture of a plan: row blocks against the slots that they read, one colour per span."""

from __future__ import annotations

from itertools import pairwise

import torch

from fork_attn.plan_format import sections
from fork_attn.plan_report import TreePlan, item_slots

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#997700", "#555555")
_WIDTH = 900.0
_LEFT, _TOP, _BOTTOM = 60.0, 34.0, 46.0


def picture(tree: TreePlan, title: str) -> str:
    """The plan as an SVG document.

    A row is a row block, from the top in plan order; the x axis holds every slot of the tree once,
    depth first, so that a context is a set of bars. Where the colour changes in a row, its keys are
    cut: the pieces belong to different spans, and are merged from partial results.
    """
    parts = sections(tree.plan.buffer)
    num_slots = int(tree.rank.max()) + 1
    num_blocks = len(parts.blocks)
    row = min(18.0, max(1.5, 600.0 / num_blocks))
    height = _TOP + num_blocks * row + _BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 20:.0f}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="12">',
        f"<title>{title}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="20">{title}</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{num_blocks * row:.1f}" '
        'fill="#f2f2f2"/>',
    ]
    scale = _WIDTH / num_slots
    spans = parts.spans.tolist()
    for span, (begin, end) in enumerate(pairwise(spans)):
        bars = []
        for item in range(begin, end):
            y = _TOP + int(parts.items[item, 0]) * row
            ranks = tree.rank[item_slots(tree.plan, parts, item)]
            for first, last in _ranges(ranks, 0.5 / scale):
                width = max((last - first) * scale, 0.4)
                x, bottom = _LEFT + first * scale, max(row - 0.5, 1.0)
                bars.append(f"M{x:.2f} {y:.2f}h{width:.2f}v{bottom:.2f}h-{width:.2f}z")
        lines.append(f'<path fill="{_COLOURS[span % len(_COLOURS)]}" d="{"".join(bars)}"/>')
    foot = _TOP + num_blocks * row
    lines += [
        f'<text x="{_LEFT}" y="{foot + 16:.0f}">0</text>',
        f'<text x="{_LEFT + _WIDTH}" y="{foot + 16:.0f}" text-anchor="end">{num_slots}</text>',
        f'<text x="{_LEFT + _WIDTH / 2}" y="{foot + 34:.0f}" text-anchor="middle">'
        "slots of all contexts, depth first</text>",
        f'<text transform="translate(16 {(_TOP + foot) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{num_blocks} row blocks</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _ranges(ranks: torch.Tensor, gap: float) -> list[tuple[int, int]]:
    """The ranges that the ranks fill, those less than `gap` apart taken together."""
    ordered = ranks.sort().values
    breaks = (ordered.diff() > 1 + gap).nonzero().flatten()
    first = torch.cat([ordered[:1], ordered[breaks + 1]])
    last = torch.cat([ordered[breaks], ordered[-1:]]) + 1
    return list(zip(first.tolist(), last.tolist(), strict=True))
