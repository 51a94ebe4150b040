"""A trace as one HTML file: the picture, each token under the pointer, each thread's whole text.

Self-contained: no script, font or style comes from anywhere else.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

from fork_attn.reason import trace_picture
from fork_attn.reason.scene import Group, Rect
from fork_attn.reason.text_width import printable
from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_records import ThreadRecord
from fork_attn.reason.trace_show import facts, summary

_STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.5 ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif;
  margin: 24px auto; max-width: 1200px; padding: 0 16px; color: #30343b; background: #fff; }
svg { width: 100%; height: auto; } svg title { pointer-events: none; }
g[data-thread] { transition: opacity .12s; cursor: pointer; }
svg.dim g[data-thread] { opacity: .18; } svg.dim g[data-thread].lit { opacity: 1; }
#tip { position: fixed; display: none; max-width: 420px; padding: 6px 10px; border-radius: 6px;
  background: #23272e; color: #f2f4f7; white-space: pre-wrap; pointer-events: none; z-index: 1; }
#tip b { font-weight: 600; } #tip i { font-style: normal; color: #aeb6c2; }
details { border-top: 1px solid #d5d9df; padding: 6px 0; }
summary { cursor: pointer; } summary i { font-style: normal; color: #6a707a; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 6px 16px; font-size: 13px; }
pre span { opacity: .5; }
@media (prefers-color-scheme: dark) { body { color: #dfe3ea; background: #14171c; }
  details { border-color: #333942; } summary i { color: #9aa3b0; } }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const svg = document.querySelector('svg'), tip = document.getElementById('tip');
const groups = [...svg.querySelectorAll('g[data-thread]')];
const element = (tag, text) =>
  Object.assign(document.createElement(tag), { textContent: text });
function light(group) {
  const seen = new Set([group.dataset.thread, 'prompt', ...(group.dataset.sees || '').split(' ')]);
  svg.classList.add('dim');
  for (const g of groups) g.classList.toggle('lit', seen.has(g.dataset.thread));
}
for (const group of groups) {
  const thread = data[group.dataset.thread];
  for (const rect of group.querySelectorAll('rect')) rect.querySelector('title')?.remove();
  group.addEventListener('mouseenter', () => light(group));
  group.addEventListener('mouseleave', () => {
    svg.classList.remove('dim');
    tip.style.display = 'none';
  });
  group.addEventListener('mousemove', (event) => {
    if (!thread) return;
    const cell = thread.cells[event.target.dataset?.cell];
    tip.replaceChildren(element('b', thread.label), element('i', '  ' + thread.facts));
    if (cell) tip.append('\\n', element('b', cell.text), element('i', '\\n' + cell.facts));
    tip.style.display = 'block';
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px';
    tip.style.top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8) + 'px';
  });
  group.addEventListener('click', () => {
    const row = document.getElementById('thread-' + group.dataset.thread);
    if (row) { row.open = true; row.scrollIntoView({ behavior: 'smooth', block: 'center' }); }
  });
}
"""


def html(trace: Trace) -> str:
    """The document. Pointing at a thread dims all that it does not see."""
    scene = trace_picture.draw(trace)
    data = {
        group.data["thread"]: _facts(trace.threads[int(group.data["thread"])], trace, group)
        for group in scene.groups
        if group.data.get("thread", "").isdigit()
    }
    title = escape(f"{trace.protocol}: {trace.prompt[:60]}")
    rows = "\n".join(map(_row, trace.threads))
    # "</" would end the script element.
    blob = json.dumps(data, ensure_ascii=False).replace("</", "<\\/")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{scene.svg()}"
        f"<p>{escape(summary(trace))}</p>\n"
        f"<p>Point at a thread: what it does not see grows pale. Click for its text.</p>\n"
        f'{rows}\n<div id="tip"></div>\n'
        f'<script type="application/json" id="data">{blob}</script>\n'
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _facts(thread: ThreadRecord, trace: Trace, group: Group) -> dict[str, Any]:
    cells = {}
    for mark in group.marks:
        if isinstance(mark, Rect) and mark.cell:
            low, high = map(int, mark.cell.split("-"))
            cells[mark.cell] = _cell(trace, thread, low, high)
    return {"label": thread.label or f"thread {thread.id}", "facts": facts(thread), "cells": cells}


def _cell(trace: Trace, thread: ThreadRecord, low: int, high: int) -> dict[str, str]:
    """What the pointer shows of tokens [low, high)."""
    text = thread.slice_text(low, high) if thread.text_ends else ""
    parts = []
    positions = [p for p in thread.positions[low:high] if p is not None]
    if positions:
        last = f" to {positions[-1]}" if len(positions) > 1 else ""
        parts.append(f"position {positions[0]}{last}")
    steps = [s for s in thread.sampled_steps[low:high] if s is not None]
    if steps:
        parts.append(f"step {steps[0]}" + (f" to {steps[-1]}" if steps[-1] > steps[0] else ""))
        if steps[0] == steps[-1] < len(trace.steps):
            parts.append(f"{1e3 * trace.steps[steps[0]].seconds:.1f} ms")
    else:
        parts.append("injected")
    if high - low == 1 and (logprob := thread.logprobs[low]) is not None:
        parts.append(f"log-probability {logprob:.2f}")
    if high - low == 1:
        parts.append(f"id {thread.token_ids[low]}")
    return {"text": printable(text), "facts": ", ".join(parts)}


def _row(thread: ThreadRecord) -> str:
    label = f"{escape(thread.label or f'thread {thread.id}')} <i>{escape(facts(thread))}</i>"
    body = ""
    flags = thread.injected
    start = 0
    for end in range(1, len(flags) + 1) if thread.text_ends else ():
        if end == len(flags) or flags[end] != flags[start]:
            piece = escape(printable(thread.slice_text(start, end)))
            body += f"<span>{piece}</span>" if flags[start] else piece
            start = end
    return f'<details id="thread-{thread.id}"><summary>{label}</summary><pre>{body}</pre></details>'
