"""A trace as a timeline for Perfetto (https://ui.perfetto.dev) or chrome://tracing.

The format is Chrome's trace events: one track for each thread with its tokens, arrows for forks and
joins, a track of the model's steps, counters of the threads fed and of the pages in use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_layout import Bar, layout

_PROCESS = 1
_STEPS_TRACK = 0


def timeline(trace: Trace) -> str:
    """JSON of the trace's events, times in microseconds from its first step."""
    events = list(_events(trace))
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, ensure_ascii=False)


def _events(trace: Trace) -> Iterator[dict[str, Any]]:
    plan = layout(trace)
    ends = [0.0, *accumulate(1e6 * step.seconds for step in trace.steps)]
    ends += [ends[-1]] * (plan.steps + 1 - len(ends))
    tracks = _tracks(trace)

    yield _meta("process_name", _STEPS_TRACK, f"{trace.protocol} on {trace.model}")
    yield _meta("thread_name", _STEPS_TRACK, "model steps")
    for thread in trace.threads:
        if tracks[thread.id] == thread.id + 1:
            yield _meta("thread_name", thread.id + 1, f"{thread.id}: {thread.label}")
    yield from _steps(trace, ends)
    for bar in plan.bars:
        yield from _thread(bar, tracks[bar.thread.id], ends)
    for number, c in enumerate(plan.connectors):
        flow = {"cat": c.kind, "name": c.kind, "id": number, "pid": _PROCESS}
        leave, arrive = plan.bars[c.source], plan.bars[c.target]
        # An arrow binds to the slice that encloses its ends.
        at = max(ends[leave.start], ends[min(c.leave, leave.end)] - 0.5)
        yield {**flow, "ph": "s", "tid": tracks[c.source], "ts": at}
        yield {**flow, "ph": "f", "bp": "e", "tid": tracks[c.target], "ts": ends[arrive.start]}


def _tracks(trace: Trace) -> list[int]:
    """Each record's track: that of the record it goes on from, else its own, id + 1."""
    before = {event.into: event.thread for event in trace.events if event.into is not None}
    tracks: list[int] = []
    for thread in trace.threads:
        tracks.append(tracks[before[thread.id]] if thread.id in before else thread.id + 1)
    return tracks


def _steps(trace: Trace, ends: list[float]) -> Iterator[dict[str, Any]]:
    for number, step in enumerate(trace.steps):
        start = ends[number]
        inner = (
            ("model", step.model_seconds),
            ("sampling", step.sampling_seconds),
            ("coordination", max(0.0, step.coordination_seconds)),
        )
        parts = {f"{name} ms": round(1e3 * seconds, 3) for name, seconds in inner}
        yield _slice(
            f"step {number}", _STEPS_TRACK, start, ends[number + 1],
            {"threads": step.width, "tokens": step.tokens, **parts},
        )  # fmt: skip
        counters = (("threads fed", step.width), ("pages in use", step.pages_live))
        for name, value in counters:
            yield {
                "ph": "C", "name": name, "pid": _PROCESS, "tid": _STEPS_TRACK, "ts": start,
                "args": {name: value},
            }  # fmt: skip


def _thread(bar: Bar, track: int, ends: list[float]) -> Iterator[dict[str, Any]]:
    thread = bar.thread
    facts = {
        "status": thread.status, "note": thread.note, "sampled": thread.num_sampled,
        "injected": len(thread.token_ids) - thread.num_sampled, "seed": thread.seed,
        "sees": [f"{s.thread}[{s.start}:{s.end}]" for s in thread.context], "text": thread.text,
    }  # fmt: skip
    yield _slice(
        thread.label or f"thread {thread.id}", track, ends[bar.start], ends[bar.end], facts
    )
    for piece in bar.pieces:
        text = thread.slice_text(piece.start, piece.end) if thread.text_ends else ""
        yield _slice(
            text or " ", track, ends[piece.step], ends[piece.step + 1],
            {
                "token_ids": list(thread.token_ids[piece.start : piece.end]),
                "positions": list(thread.positions[piece.start : piece.end]),
                "logprobs": list(thread.logprobs[piece.start : piece.end]),
                "injected": piece.injected,
            },
        )  # fmt: skip


def _slice(name: str, track: int, start: float, end: float, args: Any) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "cat": "thread", "pid": _PROCESS, "tid": track,
        "ts": start, "dur": end - start, "args": args,
    }  # fmt: skip


def _meta(kind: str, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": track, "args": {"name": name}}
