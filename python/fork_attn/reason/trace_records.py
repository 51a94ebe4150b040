"""What a trace is made of: threads, events, steps, and spans of tokens.

Plain data. `docs/trace.md` is the schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["done", "joined", "pruned", "limit", "cancelled", "malformed"]
"""How a thread ended: by itself, in a join, as a loser, at a limit, from outside, or in tags that
its protocol cannot follow. What is not a plain end has a note."""

EventKind = Literal[
    "fork", "join", "select", "prune", "refuse", "malformed", "limit", "rollback", "cancel"
]
JoinKind = Literal["union", "rebase", "text", "message"]
InjectionKind = Literal["prompt", "header", "copy", "message"]


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of one thread, as seen by another."""

    thread: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Injection:
    """Tokens [start, end) of a thread that it was given instead of sampling them.

    Attributes:
        kind: the prompt; a header of the protocol; a copy of what another thread wrote, computed
            again at other positions or after other tokens (text joins); or a message.
        source: for a copy, the thread that wrote the tokens first.
    """

    start: int
    end: int
    kind: InjectionKind
    source: int | None = None


@dataclass(frozen=True)
class Watching:
    """The thread also sees what another one writes, while that is being written.

    Token i that a step feeds to the watcher sees all that the other was fed in earlier steps, and
    of the same step its tokens j <= i - lag.

    Attributes:
        thread: the record that is watched.
        lag: see above.
        rebase: True where the watched tokens stand end to end with what is before them; False where
            they stand at their own positions.
        after: tokens that the watcher saw when it began: the watched ones stand behind them.
    """

    thread: int
    lag: int = 0
    rebase: bool = False
    after: int = 0


@dataclass(frozen=True)
class ThreadRecord:
    """A run of tokens that one branch wrote between a fork, a join or a rollback and the next.

    A thread that goes on after a join is a new record, whose parents are all that it waited for: so
    the records form a DAG. Token i sees `context`, then its own tokens up to itself, and what
    `watches` adds.

    Attributes:
        id: index in `Trace.threads`.
        kind: "root", "thread" (a child of a fork), or "continuation" (after a join, select or
            rollback).
        label: what the protocol calls it, such as "path 2".
        parents: records that it follows, in the order in which it sees them.
        context: what it sees before its own first token, in context order.
        depth: forks above it.
        seed: of its sampling.
        token_ids: as sampled or given, never tokenised again.
        positions: of each token; None where the token was never fed.
        logprobs: of each token under the distribution it was sampled from; None if injected.
        sampled_steps: index in `Trace.steps` of the step whose logits gave the token; None if
            injected.
        fed_steps: of the step that fed it to the model; None if none did (an end token, or one that
            a limit cut off).
        injections: the runs of tokens that were not sampled, in order.
        watches: threads that it sees while they write.
        status: how it ended.
        note: why, where `status` alone does not say.
        text: the tokens as text.
        text_ends: for each token the end of its text in `text`.
    """

    id: int
    kind: Literal["root", "thread", "continuation"]
    label: str
    parents: tuple[int, ...]
    context: tuple[Span, ...]
    depth: int
    seed: int
    token_ids: tuple[int, ...]
    positions: tuple[int | None, ...]
    logprobs: tuple[float | None, ...]
    sampled_steps: tuple[int | None, ...]
    fed_steps: tuple[int | None, ...]
    injections: tuple[Injection, ...] = ()
    watches: tuple[Watching, ...] = ()
    status: Status = "done"
    note: str = ""
    text: str = ""
    text_ends: tuple[int, ...] = ()

    @property
    def num_sampled(self) -> int:
        return len(self.token_ids) - sum(i.end - i.start for i in self.injections)

    @property
    def injected(self) -> tuple[bool, ...]:
        """For each token whether it was given instead of sampled."""
        flags = [False] * len(self.token_ids)
        for injection in self.injections:
            flags[injection.start : injection.end] = [True] * (injection.end - injection.start)
        return tuple(flags)

    @property
    def num_accepted(self) -> int:
        """Tokens that were drafted: a step sampled them from its logits and had been fed them."""
        pairs = zip(self.sampled_steps, self.fed_steps, strict=True)
        return sum(sampled is not None and sampled == fed for sampled, fed in pairs)

    def slice_text(self, start: int, end: int) -> str:
        """The text of tokens [start, end)."""
        ends = (0, *self.text_ends)
        return self.text[ends[start] : ends[end]]

    @property
    def steps(self) -> tuple[int, int] | None:
        """The first and the last step that it took part in; None if it never was in one."""
        every = [s for s in (*self.fed_steps, *self.sampled_steps) if s is not None]
        return (min(every), max(every)) if every else None


@dataclass(frozen=True)
class Event:
    """What happened to the threads.

    Attributes:
        step: index in `Trace.steps` of the step before which it happened.
        kind: what.
        thread: to which record it happened.
        others: a fork's children, a join's children, a select's winner, in order.
        into: for join, select and rollback the record that goes on from here.
        join: for a join its kind.
        position: for a join its position rule, "max", "sum" or the position.
        tokens_reused: tokens of KV that were read on instead of being computed once more: for a
            fork the parent's context for each child, for a join what it took over.
        note: for people.
    """

    step: int
    kind: EventKind
    thread: int
    others: tuple[int, ...] = ()
    into: int | None = None
    join: JoinKind | None = None
    position: str | int | None = None
    tokens_reused: int = 0
    note: str = ""


@dataclass(frozen=True)
class StepRecord:
    """One forward of the model. Where several prompts run together its times are for all of them.

    Attributes:
        seconds: from the end of the step before to the end of this one.
        model_seconds: of them in the model.
        sampling_seconds: of them in picking tokens from logits.
        width: threads of this trace that it fed.
        tokens: tokens that it fed to them.
        pages_live: pages in use in the cache, after it.
        drafting_seconds: of `seconds` in drafting.
        drafts: threads of this trace that it verified a draft of.
        drafted: tokens of these drafts; accepted: those of them that were kept.
    """

    seconds: float
    model_seconds: float
    sampling_seconds: float
    width: int
    tokens: int
    pages_live: int
    drafting_seconds: float = 0.0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def coordination_seconds(self) -> float:
        """What is left: forks, joins, slots, plans, tags, records."""
        worked = self.model_seconds + self.sampling_seconds + self.drafting_seconds
        return self.seconds - worked
