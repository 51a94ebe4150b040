"""Where things lie in a picture of a trace: a lane for each thread, a column for each step."""

from __future__ import annotations

from dataclasses import dataclass

from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_records import Event, ThreadRecord


@dataclass(frozen=True)
class Piece:
    """Tokens [start, end) of a thread that belong to one step, sampled from it or fed in it."""

    step: int
    start: int
    end: int
    injected: bool


@dataclass(frozen=True)
class Bar:
    """A thread record's place.

    Attributes:
        lane: its row, 0 at the top.
        start, end: the first step, and the one after the last; a record without tokens is as wide
            as nothing.
        pieces: its tokens in order, without the prompt.
    """

    thread: ThreadRecord
    lane: int
    start: int
    end: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Connector:
    """A line from one bar's end, or from within it, to another bar's start."""

    kind: str
    source: int
    target: int
    leave: int  # step at which the source ends or is left
    arrive: int


@dataclass(frozen=True)
class Layout:
    bars: tuple[Bar, ...]
    connectors: tuple[Connector, ...]
    lanes: int
    steps: int


def layout(trace: Trace) -> Layout:
    """Lanes and columns of all records; `bars[i]` is that of thread i.

    A record that goes on after a join, select or rollback keeps the lane of the record it goes on
    from; children take the first free lanes below their parent.
    """
    continued = {event.into: event.thread for event in trace.events if event.into is not None}
    pieces = [_pieces(thread) for thread in trace.threads]
    begin = [_begin(trace, thread, pieces[thread.id]) for thread in trace.threads]
    end = [max([begin[t.id], *(piece.step + 1 for piece in pieces[t.id])]) for t in trace.threads]
    lanes = _lanes(trace, continued, begin, end)
    bars = tuple(
        Bar(t, lanes[t.id], begin[t.id], end[t.id], tuple(pieces[t.id])) for t in trace.threads
    )
    steps = max([len(trace.steps), *end])
    return Layout(bars, tuple(_connectors(trace, bars)), max(lanes) + 1, steps)


def _pieces(thread: ThreadRecord) -> list[Piece]:
    """Sampled tokens belong to the step that gave them, injected ones to that which took them."""
    found: list[Piece] = []
    given = thread.injected
    prompt = {
        i for run in thread.injections if run.kind == "prompt" for i in range(run.start, run.end)
    }
    for i in range(len(thread.token_ids)):
        step = thread.fed_steps[i] if given[i] else thread.sampled_steps[i]
        if i in prompt or step is None:
            continue
        last = found[-1] if found else None
        if last is not None and last.step == step and last.injected == given[i] and last.end == i:
            found[-1] = Piece(step, last.start, i + 1, given[i])
        else:
            found.append(Piece(step, i, i + 1, given[i]))
    return found


def _begin(trace: Trace, thread: ThreadRecord, pieces: list[Piece]) -> int:
    if pieces:
        return min(piece.step for piece in pieces)
    for event in trace.events:
        if thread.id == event.into or (event.kind == "fork" and thread.id in event.others):
            return event.step
    return 0


def _lanes(trace: Trace, continued: dict[int, int], begin: list[int], end: list[int]) -> list[int]:
    heir = {before: after for after, before in continued.items()}

    def last_step(thread: int) -> int:
        """The end of the lane that a record opens, with all that goes on in it."""
        last = end[thread]
        while thread in heir:
            thread = heir[thread]
            last = max(last, end[thread])
        return last

    lanes = [0] * len(trace.threads)
    taken: list[list[tuple[int, int]]] = []
    for thread in trace.threads:
        if thread.id in continued:
            lanes[thread.id] = lanes[continued[thread.id]]
            continue
        span = (begin[thread.id], max(last_step(thread.id), begin[thread.id] + 1))
        lane = lanes[thread.parents[0]] + 1 if thread.parents else 0
        while lane < len(taken) and any(a < span[1] and span[0] < b for a, b in taken[lane]):
            lane += 1
        while lane >= len(taken):
            taken.append([])
        taken[lane].append(span)
        lanes[thread.id] = lane
    return lanes


def _connectors(trace: Trace, bars: tuple[Bar, ...]) -> list[Connector]:
    found: list[Connector] = []
    for event in trace.events:
        if event.kind == "fork":
            leave = min(bars[event.thread].end, max(event.step, bars[event.thread].start))
            found += [
                Connector("fork", event.thread, child, leave, bars[child].start)
                for child in event.others
            ]
        elif event.into is not None:
            found += _into(event, bars)
    return found


def _into(event: Event, bars: tuple[Bar, ...]) -> list[Connector]:
    assert event.into is not None
    arrive = bars[event.into].start
    return [
        Connector(event.kind, thread, event.into, bars[thread].end, arrive)
        for thread in event.others
    ]
