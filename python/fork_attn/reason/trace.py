"""Trace: the record of a whole generation. Who forked, wrote and joined, when, at which positions.

Plain data, without tensors, without a model and without a tokenizer. `docs/trace.md` is the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from fork_attn.reason.training import TrainingExample

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


@dataclass(frozen=True)
class Trace:
    """One prompt, the threads that thought about it, and what came of it.

    Attributes:
        protocol: the protocol's name.
        model: the model's name.
        prompt: as given; prompt_ids: as tokens.
        threads: all records; `threads[0]` is the root, which begins with the prompt.
        events: in order of time.
        steps: the model's forwards from the first to the last of this trace.
        answer: what makes up the answer, in reading order, without the prompt. Mostly what the
            final record sees and wrote; where threads never join, one after another.
        final: the record that was written last on the way to the answer.
        finish: "done", or what cut it off.
        seed: of the whole; sampling, limits: what was asked for, as plain values.
        speculation: what drafted tokens, as plain values; empty where nothing did.
        page_size: tokens per page; pages_shared: most pages that were seen by two branches or more
            at once, in the whole cache.
    """

    protocol: str
    model: str
    prompt: str
    prompt_ids: tuple[int, ...]
    threads: tuple[ThreadRecord, ...]
    events: tuple[Event, ...]
    steps: tuple[StepRecord, ...]
    answer: tuple[Span, ...] = ()
    final: int = 0
    finish: Literal["done", "limit", "cancelled"] = "done"
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    speculation: dict[str, Any] = field(default_factory=dict)
    page_size: int = 16
    pages_shared: int = 0

    @property
    def root(self) -> ThreadRecord:
        return self.threads[0]

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """The answer's tokens, without the prompt."""
        spans = ((self.threads[s.thread].token_ids, s.start, s.end) for s in self.answer)
        return tuple(token for ids, start, end in spans for token in ids[start:end])

    @cached_property
    def text(self) -> str:
        """The answer's text: that of `token_ids`, tags included."""
        return "".join(self.threads[s.thread].slice_text(s.start, s.end) for s in self.answer)

    @property
    def total_tokens(self) -> int:
        """Tokens that the model sampled, in all threads."""
        return sum(thread.num_sampled for thread in self.threads)

    @cached_property
    def critical_path_tokens(self) -> int:
        """Sampled tokens of the longest chain of threads of which each waited for the one before.

        Threads that were pruned or cancelled count only where another went on from them.
        """
        longest = self._chains(lambda thread: thread.num_sampled)
        waited = {parent for thread in self.threads for parent in thread.parents}
        return max(
            longest[t.id]
            for t in self.threads
            if t.id == self.final or t.id in waited or t.status not in ("pruned", "cancelled")
        )

    def _chains(self, cost: Callable[[ThreadRecord], int]) -> list[int]:
        """For each thread the cost of the dearest chain of threads that leads to its end."""
        longest = [0] * len(self.threads)
        for thread in self.threads:
            above = max((longest[p] for p in thread.parents), default=0)
            longest[thread.id] = above + cost(thread)
        return longest

    @property
    def drafted_tokens(self) -> int:
        """Draft tokens that steps verified."""
        return sum(step.drafted for step in self.steps)

    @property
    def accepted_tokens(self) -> int:
        """Draft tokens that were kept."""
        return sum(step.accepted for step in self.steps)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens. Of a tree with several candidates at most one path can be
        accepted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def accepted_per_draft(self) -> float:
        """Tokens that a thread's draft brought it in one step, on average."""
        drafts = sum(step.drafts for step in self.steps)
        return self.accepted_tokens / drafts if drafts else 0.0

    @cached_property
    def steps_saved(self) -> int:
        """Forwards by which drafts shortened the longest chain of threads of which each follows
        the one before: each accepted token stands for one."""

        def steps(thread: ThreadRecord) -> int:
            return len({step for step in thread.fed_steps if step is not None})

        plain = self._chains(lambda thread: steps(thread) + thread.num_accepted)
        return max(plain) - max(self._chains(steps))

    @property
    def parallel_degree(self) -> float:
        """Total over critical-path tokens (Multiverse, arXiv 2506.09991); 1 if all is serial."""
        return self.total_tokens / self.critical_path_tokens if self.critical_path_tokens else 1.0

    @property
    def acceleration_ratio(self) -> float:
        """1 - critical path / total (ThreadWeaver, arXiv 2512.07843): the share of tokens that cost
        no time of their own."""
        return 1.0 - 1.0 / self.parallel_degree

    @property
    def step_seconds(self) -> tuple[float, ...]:
        return tuple(step.seconds for step in self.steps)

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def coordination_share(self) -> float:
        """Share of the time that went neither into the model, sampling nor drafting."""
        spent = sum(step.coordination_seconds for step in self.steps)
        return spent / self.seconds if self.steps else 0.0

    @property
    def prefill_avoided(self) -> int:
        """Tokens that forks and joins read on instead of computing them once more."""
        return sum(event.tokens_reused for event in self.events)

    def children(self, thread: int) -> Iterator[ThreadRecord]:
        """The records that follow a record, joins included."""
        return (other for other in self.threads if thread in other.parents)

    def events_of(self, *kinds: EventKind) -> list[Event]:
        """The events of some kinds, in order of time."""
        return [event for event in self.events if event.kind in kinds]

    def save(self, path: str | Path) -> None:
        """Writes the trace as JSON (`docs/trace.md`)."""
        from fork_attn.reason import trace_json

        Path(path).write_text(trace_json.dumps(self), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Trace:
        """The trace that `save` wrote.

        Raises:
            ValueError: not JSON, not a trace, or of another version.
        """
        from fork_attn.reason import trace_json

        return trace_json.loads(Path(path).read_text(encoding="utf-8"))

    def show(self, console: Console | None = None) -> None:
        """Prints the threads as a tree, with their text and how they ended, and the numbers.

        Raises:
            ModuleNotFoundError: rich is not installed.
        """
        from fork_attn.reason import trace_show

        trace_show.show(self, console)

    def plot(self, path: str | Path) -> None:
        """Draws the threads over the model's steps; the suffix says how.

        Args:
            path: `.svg`, `.html` (self-contained, with every token under the pointer) or `.png`
                (with matplotlib).

        Raises:
            ValueError: another suffix.
            ModuleNotFoundError: a PNG without matplotlib.
        """
        from fork_attn.reason import trace_plot

        trace_plot.plot(self, Path(path))

    def timeline(self, path: str | Path) -> None:
        """Writes a timeline for https://ui.perfetto.dev or chrome://tracing, as JSON."""
        from fork_attn.reason import trace_timeline

        Path(path).write_text(trace_timeline.timeline(self), encoding="utf-8")

    def training_example(
        self, trained: Callable[[ThreadRecord], bool] | None = None
    ) -> TrainingExample:
        """All threads as one flat sequence with its mask, positions and labels.

        Args:
            trained: which threads have a loss; None: all. What was injected never has one.
        """
        from fork_attn.reason import training

        return training.from_trace(self, trained)
