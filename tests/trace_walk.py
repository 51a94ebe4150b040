"""Traces made by hand: forced tokens on a tiny attached model, recorded as the engine records.

The logits that each token was "sampled" from are kept, so that a training example of the trace can
be compared with what the model saw when it generated.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fork_attn import Branch, hf
from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_records import (
    Event,
    Injection,
    InjectionKind,
    Span,
    StepRecord,
    ThreadRecord,
)

TEXT = "so we try two and three then see what they say of it all <b> & more"
WORDS = TEXT.split()


@dataclass
class Lane:
    """A record while it is being written."""

    record: ThreadRecord
    branch: Branch
    tokens: list[int] = field(default_factory=list)
    sampled: list[int | None] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    logits: torch.Tensor | None = None  # after its last fed token


class Walk:
    def __init__(self, model: Any, seed: int = 0, protocol: str = "walk", **options: Any) -> None:
        self.model, self.cache = model, hf.attach(model, **options)
        self.rng = random.Random(seed)
        self.vocab = model.config.vocab_size
        self.lanes: list[Lane] = []
        self.events: list[Event] = []
        self.steps: list[StepRecord] = []
        self.protocol = protocol
        self.seen: dict[tuple[int, int], torch.Tensor] = {}  # (record, token): its logits

    def _lane(self, branch: Branch, kind: str, label: str, parents: tuple[int, ...],
              context: tuple[Span, ...], depth: int) -> Lane:  # fmt: skip
        record = ThreadRecord(
            len(self.lanes), kind, label, parents, context, depth, 0, (), (), (), (), ()
        )  # type: ignore[arg-type]
        self.lanes.append(Lane(record, branch))
        return self.lanes[-1]

    def root(self, length: int) -> Lane:
        lane = self._lane(self.cache.new_branch(), "root", "root", (), (), 0)
        self.give(lane, length, "prompt")
        return lane

    def give(self, lane: Lane, count: int, kind: InjectionKind = "header") -> None:
        """Injects tokens; they are fed with the next step."""
        start = len(lane.tokens)
        lane.tokens += [self.rng.randrange(3, self.vocab) for _ in range(count)]
        lane.sampled += [None] * count
        lane.injections.append(Injection(start, start + count, kind))

    def feed(self, lanes: list[Lane]) -> None:
        """One step: all that these lanes have not fed yet."""
        waiting = {lane.branch: lane.tokens[len(lane.fed) :] for lane in lanes}
        waiting = {branch: tokens for branch, tokens in waiting.items() if tokens}
        if not waiting:
            return
        fed = [lane for lane in lanes if lane.branch in waiting]
        starts = [lane.branch.position for lane in fed]
        rows = hf.forward(self.model, waiting)
        for lane, start, row in zip(fed, starts, rows, strict=True):
            count = len(waiting[lane.branch])
            lane.positions += range(start, start + count)
            lane.fed += [len(self.steps)] * count
            lane.logits = row
        tokens = sum(map(len, waiting.values()))
        pages = self.cache.stats().pages_live
        self.steps.append(StepRecord(0.01, 0.008, 0.001, len(fed), tokens, pages))

    def write(self, lanes: list[Lane], count: int) -> None:
        """Each lane samples `count` tokens, one a step; the last is not fed yet."""
        for _ in range(count):
            self.feed(lanes)
            for lane in lanes:
                assert lane.logits is not None
                self.seen[lane.record.id, len(lane.tokens)] = lane.logits
                lane.tokens.append(self.rng.randrange(3, self.vocab))
                lane.sampled.append(max(lane.fed, default=len(self.steps) - 1))

    def context(self, lane: Lane) -> tuple[Span, ...]:
        own = Span(lane.record.id, 0, len(lane.fed))
        return (*lane.record.context, own) if len(own) else lane.record.context

    def fork(self, lane: Lane, count: int) -> list[Lane]:
        self.feed([lane])
        context, logits = self.context(lane), lane.logits
        children = [
            self._lane(
                b, "thread", f"path {i + 1}", (lane.record.id,), context, lane.record.depth + 1
            )
            for i, b in enumerate(lane.branch.fork(count))
        ]
        for child in children:
            child.logits = logits
        ids = tuple(child.record.id for child in children)
        self.events.append(
            Event(len(self.steps), "fork", lane.record.id, ids, tokens_reused=lane.branch.length)
        )
        return children

    def join(self, lane: Lane, children: list[Lane], position: str | int = "max") -> Lane:
        self.feed(children)
        context = self.context(lane)
        for child in children:
            context += tuple(s for s in self.context(child) if s not in context)
            child.record = replace(child.record, status="joined")
        lane.branch.join([child.branch for child in children], position=position)
        ids = tuple(child.record.id for child in children)
        parents = (lane.record.id, *ids)
        after = self._lane(
            lane.branch, "continuation", "after the join", parents, context, lane.record.depth
        )
        after.logits = children[-1].logits
        self.events.append(
            Event(len(self.steps), "join", lane.record.id, ids, after.record.id, "union", position)
        )
        return after

    def prune(self, lane: Lane, note: str = "") -> None:
        lane.record = replace(lane.record, status="pruned", note=note)
        lane.branch.free()
        self.events.append(Event(len(self.steps), "prune", lane.record.id, note=note))

    def trace(self, final: Lane) -> Trace:
        threads = tuple(map(self._record, self.lanes))
        prompt = threads[0].injections[0].end
        answer = [*final.record.context, Span(final.record.id, 0, len(final.tokens))]
        if answer[0].thread == 0:
            answer[0] = Span(0, prompt, answer[0].end)
        return Trace(
            self.protocol, "tiny", threads[0].slice_text(0, prompt).strip(),
            threads[0].token_ids[:prompt], threads, tuple(self.events), tuple(self.steps),
            tuple(answer), final.record.id,
        )  # fmt: skip

    def _record(self, lane: Lane) -> ThreadRecord:
        words = [f" {WORDS[token % len(WORDS)]}" for token in lane.tokens]
        ends = [len("".join(words[: i + 1])) for i in range(len(words))]
        unfed = [None] * (len(lane.tokens) - len(lane.fed))
        return replace(
            lane.record,
            token_ids=tuple(lane.tokens),
            positions=(*lane.positions, *unfed),
            logprobs=tuple(None if s is None else -0.5 for s in lane.sampled),
            sampled_steps=tuple(lane.sampled),
            fed_steps=(*lane.fed, *unfed),
            injections=tuple(lane.injections),
            text="".join(words),
            text_ends=tuple(ends),
        )


def nested(model: Any, seed: int = 0) -> tuple[Walk, Trace]:
    """A prompt, three unequal threads, one of which forks and joins again, one pruned; a join."""
    walk = Walk(model, seed, num_pages=256, page_size=4)
    root = walk.root(7)
    walk.write([root], 3)
    a, b, c = walk.fork(root, 3)
    for child in (a, b):
        walk.give(child, 2)
    walk.write([a, b, c], 4)
    inner = walk.fork(b, 2)
    walk.write([a, *inner], 3)
    walk.write([inner[1]], 2)
    walk.prune(c, "too long")
    b2 = walk.join(b, inner)
    walk.write([b2], 2)
    end = walk.join(root, [a, b2], "max")
    walk.give(end, 1)
    walk.write([end], 4)
    return walk, walk.trace(end)
