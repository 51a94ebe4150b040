"""Trace: the record of a whole generation. Who forked, wrote and joined, when, at which positions.

Plain data, without tensors, without a model and without a tokenizer. `docs/trace.md` is the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fork_attn.reason.trace_records import Event, EventKind, Span, StepRecord, ThreadRecord

if TYPE_CHECKING:
    from rich.console import Console

    from fork_attn.reason.training import TrainingExample


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
