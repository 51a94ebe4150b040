"""Views of a trace: tree, picture, HTML, timeline."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hf_models import build
from rich.console import Console
from trace_walk import Walk, nested

from fork_attn.reason import trace_html, trace_picture, trace_show, trace_timeline
from fork_attn.reason.scene import Rect, Text
from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_layout import layout

HOSTILE = " <b>&amp;</script>\x00\x1b[31m ]]> $x$ 漢字"


@pytest.fixture(scope="module")
def trace() -> Iterator[Trace]:
    yield nested(build("llama"))[1]


@pytest.fixture(scope="module")
def wide() -> Trace:
    """40 threads of which each is one token longer than the one before it."""
    walk = Walk(build("llama"), num_pages=512, page_size=4)
    root = walk.root(5)
    children = walk.fork(root, 40)
    for number in range(len(children)):
        walk.write(children[number:], 1)
    end = walk.join(root, children)
    walk.write([end], 2)
    return walk.trace(end)


def hostile(trace: Trace) -> Trace:
    """The same threads, and text that no format takes as it is."""
    threads = tuple(
        replace(
            t,
            label=HOSTILE,
            text=HOSTILE * len(t.token_ids),
            text_ends=tuple(len(HOSTILE) * (i + 1) for i in range(len(t.token_ids))),
        )
        for t in trace.threads
    )
    return replace(trace, threads=threads, prompt=HOSTILE, protocol=HOSTILE, model=HOSTILE)


def test_lanes_do_not_overlap(trace: Trace, wide: Trace) -> None:
    for each in (trace, wide):
        plan = layout(each)
        cells = [(bar.lane, step) for bar in plan.bars for step in range(bar.start, bar.end)]
        assert len(cells) == len(set(cells))
        assert max(lane for lane, _ in cells) < plan.lanes
        assert plan.steps == len(each.steps)


def test_who_goes_on_keeps_the_lane_and_children_lie_below(trace: Trace) -> None:
    bars = layout(trace).bars
    for event in trace.events_of("join"):
        assert event.into is not None
        assert bars[event.into].lane == bars[event.thread].lane
    for event in trace.events_of("fork"):
        assert all(bars[child].lane > bars[event.thread].lane for child in event.others)


def test_every_token_but_the_prompt_is_in_one_place(trace: Trace) -> None:
    for bar in layout(trace).bars:
        prompt = sum(i.end - i.start for i in bar.thread.injections if i.kind == "prompt")
        drawn = [i for piece in bar.pieces for i in range(piece.start, piece.end)]
        assert drawn == list(range(prompt, len(bar.thread.token_ids)))
        flags = [piece.injected for piece in bar.pieces for _ in range(piece.start, piece.end)]
        assert flags == list(bar.thread.injected[prompt:])


def test_connectors_are_the_forks_and_joins(trace: Trace) -> None:
    found = {(c.kind, c.source, c.target) for c in layout(trace).connectors}
    expected = {
        ("fork", e.thread, child) for e in trace.events_of("fork") for child in e.others
    } | {("join", child, e.into) for e in trace.events_of("join") for child in e.others}
    assert found == expected and len(found) == 9


@pytest.mark.parametrize("name", ["trace", "wide"])
def test_the_picture_lies_within_its_borders(name: str, request: pytest.FixtureRequest) -> None:
    scene = trace_picture.draw(request.getfixturevalue(name))
    for mark in scene.marks():
        if isinstance(mark, Rect):
            assert mark.x >= 0 and mark.x + mark.width <= scene.width + 0.1
            assert mark.y >= 0 and mark.y + mark.height <= scene.height + 0.1


def test_the_picture_says_what_happened(trace: Trace) -> None:
    words = [mark.text for mark in trace_picture.draw(trace).marks() if isinstance(mark, Text)]
    text = "\n".join(words)
    assert "path 3 · pruned · too long" in text
    assert f"{trace.total_tokens} tokens sampled, {trace.critical_path_tokens}" in text
    assert "injected, not sampled" in text and "stopped at a limit" not in text
    assert words.count("✕") == 1


def test_svg_is_xml_whatever_the_text(trace: Trace) -> None:
    for each in (trace, hostile(trace)):
        root = ElementTree.fromstring(trace_picture.draw(each).svg())
        assert root.tag.endswith("svg")


def test_html_needs_nothing_else_and_survives_any_text(trace: Trace) -> None:
    for each in (trace, hostile(trace)):
        text = trace_html.html(each)
        links = re.findall(r"(?:src|href|url)\s*[=(]", text)
        assert not links and "http" not in text.replace("http://www.w3.org/2000/svg", "")
        assert text.count("<script") == text.count("</script>") == 2
        found = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
        assert found
        data = json.loads(found[1].replace("<\\/", "</"))
        assert set(data) == {str(t.id) for t in each.threads}
        svg = re.search(r"<svg.*?</svg>", text, re.DOTALL)
        assert svg
        drawn = re.findall(r'data-cell="([0-9-]+)"', svg[0])
        assert sorted(drawn) == sorted(cell for thread in data.values() for cell in thread["cells"])


def test_png(trace: Trace, tmp_path: Path) -> None:
    hostile(trace).plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_plot_goes_by_suffix(trace: Trace, tmp_path: Path) -> None:
    trace.plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<svg")
    trace.plot(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(ValueError, match=r"path: expected one of \.svg, \.html, \.png, got .*gif"):
        trace.plot(tmp_path / "a.gif")
    assert not (tmp_path / "a.gif").exists()


def test_timeline(trace: Trace, tmp_path: Path) -> None:
    trace.timeline(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    # The root and its continuation are one track; so are path 2 and its own.
    assert len(names) == 1 + 6
    slices = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 and e["tid"] in names for e in slices)
    end = 1e6 * trace.seconds
    assert all(e["ts"] + e["dur"] <= end + 1e-3 for e in slices)
    for track in names:  # slices of a track are nested or apart
        own = sorted((e["ts"], -e["dur"]) for e in slices if e["tid"] == track)
        open_until: list[float] = []
        for start, duration in own:
            while open_until and open_until[-1] <= start + 1e-6:
                open_until.pop()
            assert not open_until or start - duration <= open_until[-1] + 1e-6
            open_until.append(start - duration)
    widths = [e["args"]["threads fed"] for e in events if e["name"] == "threads fed"]
    assert widths == [step.width for step in trace.steps]
    starts = [e["id"] for e in events if e["ph"] == "s"]
    ends = [e["id"] for e in events if e["ph"] == "f"]
    assert starts == ends and len(starts) == 9
    json.loads(trace_timeline.timeline(hostile(trace)))


def shown(trace: Trace, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    trace.show(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_show(trace: Trace) -> None:
    text = shown(trace)
    assert "pruned, too long" in text
    for thread in trace.threads[1:]:
        assert thread.text.split()[-1] in text
    lines = text.splitlines()
    depth = {label: next(line.index(label) for line in lines if label in line) for label in
             ("root", "path 2", "path 3")}  # fmt: skip
    assert depth["root"] < depth["path 2"] == depth["path 3"]
    assert f"{trace.total_tokens} tokens sampled" in text


def test_show_cuts_long_texts_and_survives_any(trace: Trace) -> None:
    assert "<b>&amp;" in shown(hostile(trace))
    long = replace(trace.threads[1], text="word " * 2000, text_ends=(5,) * 8 + (10000,))
    node = trace_show.node(trace, long, max_chars=100)
    assert len(node.plain) < 300 and " … " in node.plain
