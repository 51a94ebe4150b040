"""Logs: what threads write while they run, and the thread records made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from fork_attn.reason.detokenize import Pieces, text_of
from fork_attn.reason.trace_records import (
    Injection,
    InjectionKind,
    Span,
    Status,
    ThreadRecord,
    Watching,
)


class Log:
    """One thread record in the making.

    `positions` and `fed_steps` are as long as what was fed or dropped; the tokens behind are the
    thread's queue.
    """

    __slots__ = (
        "context",
        "depth",
        "dropped",
        "fed_steps",
        "id",
        "injections",
        "kind",
        "label",
        "logprobs",
        "note",
        "parents",
        "positions",
        "sampled_steps",
        "seed",
        "status",
        "token_ids",
        "watches",
    )

    def __init__(
        self,
        id: int,
        kind: Literal["root", "thread", "continuation"],
        label: str,
        parents: tuple[int, ...],
        context: tuple[Span, ...],
        depth: int,
        seed: int,
    ) -> None:
        self.id, self.kind, self.label = id, kind, label
        self.parents, self.context, self.depth, self.seed = parents, context, depth, seed
        self.token_ids: list[int] = []
        self.positions: list[int | None] = []
        self.logprobs: list[float | None] = []
        self.sampled_steps: list[int | None] = []
        self.fed_steps: list[int | None] = []
        self.injections: list[Injection] = []
        self.dropped: list[int] = []
        self.watches: list[Watching] = []
        self.status: Status | None = None
        self.note = ""

    def num_sampled(self) -> int:
        return len(self.token_ids) - sum(i.end - i.start for i in self.injections)

    def give(self, tokens: Sequence[int], kind: InjectionKind, source: int | None) -> None:
        """Appends tokens that were not sampled."""
        start, n = len(self.token_ids), len(tokens)
        self.token_ids += tokens
        self.logprobs += [None] * n
        self.sampled_steps += [None] * n
        self.injections.append(Injection(start, start + n, kind, source))

    def take_queue(self, old: Log, count: int) -> None:
        """Moves the last `count` tokens of another log here: they are fed under this one."""
        cut, start = len(old.token_ids) - count, len(self.token_ids)
        for mine, theirs in (
            (self.token_ids, old.token_ids),
            (self.logprobs, old.logprobs),
            (self.sampled_steps, old.sampled_steps),
        ):
            mine += theirs[cut:]
            del theirs[cut:]
        moved = [i for i in old.injections if i.start >= cut]
        old.injections = [i for i in old.injections if i.start < cut]
        self.injections += [
            Injection(i.start - cut + start, i.end - cut + start, i.kind, i.source) for i in moved
        ]

    def drop(self, count: int) -> None:
        """The next `count` tokens of the queue are never fed."""
        self.dropped += range(len(self.positions), len(self.positions) + count)
        self.positions += [None] * count
        self.fed_steps += [None] * count

    def own(self) -> list[Span]:
        """The fed tokens."""
        spans, start, end = [], 0, len(self.positions)
        for index in (*self.dropped, end):
            if index > start:
                spans.append(Span(self.id, start, index))
            start = index + 1
        return spans

    def visible(self) -> tuple[Span, ...]:
        """What the thread sees now, in context order."""
        return (*self.context, *self.own())

    def build(self, pieces: Pieces, first_step: int) -> ThreadRecord:
        """The record; steps are counted from `first_step`."""
        short = len(self.token_ids) - len(self.positions)
        text, ends = text_of(pieces, self.token_ids)

        def shifted(steps: Iterable[int | None]) -> tuple[int | None, ...]:
            return tuple(None if step is None else step - first_step for step in steps)

        return ThreadRecord(
            id=self.id,
            kind=self.kind,
            label=self.label,
            parents=self.parents,
            context=self.context,
            depth=self.depth,
            seed=self.seed,
            token_ids=tuple(self.token_ids),
            positions=(*self.positions, *[None] * short),
            logprobs=tuple(self.logprobs),
            sampled_steps=shifted(self.sampled_steps),
            fed_steps=(*shifted(self.fed_steps), *[None] * short),
            injections=tuple(self.injections),
            watches=tuple(self.watches),
            status=self.status or "done",
            note=self.note,
            text=text,
            text_ends=ends,
        )


def union(spans: Sequence[Span], more: Iterable[Span]) -> tuple[Span, ...]:
    """`spans`, then the parts of `more` that they do not hold yet, in order."""
    result = list(spans)
    held: dict[int, list[tuple[int, int]]] = {}
    for span in spans:
        held.setdefault(span.thread, []).append((span.start, span.end))
    for span in more:
        parts = [(span.start, span.end)]
        for low, high in held.get(span.thread, ()):
            parts = [
                part
                for start, end in parts
                for part in ((start, min(end, low)), (max(start, high), end))
                if part[0] < part[1]
            ]
        for start, end in parts:
            result.append(Span(span.thread, start, end))
            held.setdefault(span.thread, []).append((start, end))
    return tuple(result)


def prefix(spans: Iterable[Span], length: int) -> tuple[Span, ...]:
    """The first `length` tokens of spans."""
    result = []
    for span in spans:
        if length <= 0:
            break
        result.append(Span(span.thread, span.start, min(span.end, span.start + length)))
        length -= len(span)
    return tuple(result)


def num_tokens(spans: Iterable[Span]) -> int:
    return sum(map(len, spans))
