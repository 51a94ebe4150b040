"""Thread: what a protocol's script writes, forks and joins."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fork_attn.reason import records
from fork_attn.reason.detokenize import Detokenizer
from fork_attn.reason.sampling import Sampler
from fork_attn.reason.trace import Event, InjectionKind, Span, Status, Watching

if TYPE_CHECKING:
    import torch

    from fork_attn import Branch
    from fork_attn.reason.run import Run


@dataclass(frozen=True)
class Ended:
    """Why a thread stopped writing.

    Attributes:
        reason: "stop" at a stop token or text, "eos" at an end token, "limit".
        stop: the tag or text that it stopped at.
        token: the token that ended it; it is pending: the next feed begins with it.
        note: which limit.
    """

    reason: Literal["stop", "eos", "limit"]
    stop: str = ""
    token: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Together:
    """What a script yields to run several scripts at once; see `together`."""

    scripts: tuple[Script, ...]
    first: bool = False


Script = Generator["Thread | Together", Any, Any]
"""What drives threads: a generator whose steps are `yield from thread.write(...)` and the like."""


def together(scripts: Iterable[Script], *, first: bool = False) -> Script:
    """Runs scripts at once, their threads in the same forwards.

    Args:
        scripts: one or more.
        first: return as soon as one script has; the others are closed where they stand.

    Returns:
        What each script returned, in order; with `first` (index, what it returned).
    """
    return (yield Together(tuple(scripts), first))


class Thread:
    """One thread of reasoning: a branch of the cache, and the record of what it writes.

    Methods that return a `Script` are called with `yield from`. Tokens that were given or sampled
    and are not yet in the cache stand in a queue; the next forward feeds them.

    Attributes:
        run: the prompt's run, with its vocabulary, limits and sampler.
        branch: of the cache.
        label: for people.
        depth: forks above it.
        waiting: True from a fork until a join or select: it does not count as a writer.
    """

    def __init__(
        self,
        run: Run,
        branch: Branch,
        log: records.Log,
        parent: Thread | None,
        path: tuple[tuple[int, int], ...],
    ) -> None:
        self.run, self.branch, self.log, self.parent, self.path = run, branch, log, parent, path
        self.label = log.label
        self.depth = len(path)
        self.rng = random.Random(log.seed)
        self.segment = 0
        self.forks = 0
        self.waiting = False
        self.base = 0  # tokens that it saw when it was forked
        # What the engine works on.
        self.queue: list[int] = []
        self.position = branch.position
        self.goal: Literal["write", "flush"] | None = None
        self.stops: dict[int, str] = {}
        self.texts: tuple[str, ...] = ()
        self.left = 0
        self.limit_note = ""
        self.exhausted = ""  # the limit for which its queue was taken away
        self.sampler: Sampler = run.sampler
        self.task: Any = None
        self.logits: torch.Tensor | None = None
        self.logits_step: int | None = None
        self.tail = ""
        self.detokenizer: Detokenizer | None = None

    def __repr__(self) -> str:
        return f"Thread({self.log.id}, {self.label!r}, {self.branch!r})"

    # What it has

    @property
    def alive(self) -> bool:
        return self in self.run.threads

    @property
    def token_ids(self) -> list[int]:
        """What this thread has written or was given since its fork, join or rollback."""
        return self.log.token_ids

    @property
    def length(self) -> int:
        """Tokens that it sees; those of the queue not counted. A mark for `rollback`."""
        return self.branch.length

    def context_ids(self) -> list[int]:
        """All tokens that it sees, and its queue."""
        logs = self.run.logs
        seen = [t for s in self.visible() for t in logs[s.thread].token_ids[s.start : s.end]]
        return [*seen, *self.queue]

    def visible(self) -> tuple[Span, ...]:
        """What it sees, as spans of the trace."""
        return self.log.visible()

    def answer(self) -> tuple[Span, ...]:
        """What it sees and wrote without the prompt: an answer for `Protocol.run` to return."""
        tail = len(self.queue)
        spans = self.visible()
        if tail:
            end = len(self.log.token_ids)
            spans = records.union(spans, [Span(self.log.id, end - tail, end)])
        return self.run.without_prompt(spans)

    def text(self, start: int = 0, end: int | None = None) -> str:
        """The text of its own tokens [start, end)."""
        return self.run.vocabulary.decode(self.log.token_ids[start:end])

    # What it is given

    def inject(
        self,
        content: str | Sequence[int],
        kind: InjectionKind = "header",
        source: Thread | None = None,
    ) -> None:
        """Gives it text or tokens, which the next forward feeds."""
        ids = self.run.vocabulary.encode(content) if isinstance(content, str) else list(content)
        if ids:
            self.log.give(ids, kind, None if source is None else source.log.id)
            self.queue += ids
            self.logits = None

    def drop_pending(self) -> None:
        """Takes back what is queued: it stays in the record, but is never fed."""
        self.log.drop(len(self.queue))
        self.queue = []

    # What it does

    def write(
        self,
        stops: Sequence[str] = (),
        *,
        texts: Sequence[str] = (),
        max_tokens: int | None = None,
        sampler: Sampler | None = None,
    ) -> Script:
        """Samples tokens until one of `stops`, an end token, or a limit.

        Args:
            stops: tags that end it, each one token.
            texts: texts that end it wherever they appear in what it writes.
            max_tokens: of this call; then the reason is "limit" and the note "max_tokens".
            sampler: instead of the run's.

        Returns:
            `Ended`.
        """
        self.stops = self.run.vocabulary.stops(tuple(stops))
        self.texts = (*texts, *self.run.stop_texts)
        self.tail = ""
        if self.texts:
            self.detokenizer = Detokenizer(self.run.vocabulary.pieces)
        self._budget(max_tokens)
        self.sampler = self.run.sampler if sampler is None else sampler
        if not self.queue and self.logits is None and not self.exhausted:
            raise RuntimeError(f"write: {self!r} has no token to go on from; inject one first")
        self.goal = "write"
        return (yield self)

    def match(self, token: int) -> str:
        """The stop text that the last token completed, or nothing."""
        assert self.detokenizer is not None
        piece = self.detokenizer.push(token)
        longest = max(map(len, self.texts))
        self.tail = self.tail[-longest:] + piece
        return next((text for text in self.texts if text in self.tail), "")

    def new_pages(self) -> int:
        """Pages that its queue needs beyond those it holds."""
        own, size = self.length - self.base, self.run.cache.page_size
        return -(-(own + len(self.queue)) // size) - -(-own // size)

    def _budget(self, max_tokens: int | None) -> None:
        most = self.run.limits.max_thread_tokens
        left = None if most is None else most - self.log.num_sampled()
        if left is not None and (max_tokens is None or left < max_tokens):
            self.left, self.limit_note = max(left, 0), "max_thread_tokens"
        else:
            self.left, self.limit_note = max_tokens or -1, "max_tokens"

    def flush(self) -> Script:
        """Feeds the queue without sampling, so that forks and joins see all of it."""
        if self.queue:
            self.goal = "flush"
            yield self

    def fork(self, n: int, *, labels: Sequence[str] = (), detach: bool = False) -> Script:
        """`n` children that see all that it has written; feeds its queue first.

        A child that is given nothing begins with a token that follows this thread's last one.

        Args:
            n: children.
            labels: their names; "thread 1" and so on if empty.
            detach: the thread goes on beside its children instead of waiting for a join.

        Returns:
            The children, or an empty list where a limit refuses the fork.
        """
        yield from self.flush()
        return self.run.fork(self, n, labels, detach=detach)

    def join(
        self,
        children: Sequence[Thread],
        *,
        position: Literal["max", "sum"] | int = "max",
        how: Literal["union", "text", "message"] = "union",
        label: str = "",
    ) -> Script:
        """Goes on over its own context and the children's; feeds all queues first.

        Args:
            children: live threads of this run.
            position: where it goes on, see `Branch.join`.
            how: what the trace calls it: "union", "text" where only the first child's KV is taken
                and copies of the others' tokens follow, "message" where the children are dropped
                and only a message of theirs follows.
            label: of the record that goes on.
        """
        taken = {"text": children[:1], "message": ()}.get(how, children)
        busy = [thread.flush() for thread in (self, *taken) if thread.queue]
        if busy:
            yield Together(tuple(busy))
        self.run.join(self, list(children), position, how, label)

    def select(self, child: Thread, label: str = "") -> Script:
        """Goes on as `child`, a descendant, whose queue is fed first; its other descendants are
        pruned."""
        yield from child.flush()
        self.run.select(self, child, label)

    def rollback(self, length: int, label: str = "") -> None:
        """Forgets all but the first `length` tokens that it sees; its queue too."""
        self.run.rollback(self, length, label)

    def watch(self, other: Thread, lag: int = 0) -> None:
        """From now on sees what another thread writes (Hogwild!, GroupThink)."""
        self.branch.watch(other.branch, lag=lag)
        self.log.watches.append(Watching(other.log.id, lag))

    def prune(self, note: str = "", status: Status = "pruned") -> None:
        """Ends the thread and frees what only it sees."""
        self.run.free([self], status, note)
        self.run.event(Event(self.run.step, "prune", self.log.id, note=note))

    def malformed(self, note: str) -> None:
        """Records that the model wrote what the protocol cannot follow; nothing else happens."""
        self.run.event(Event(self.run.step, "malformed", self.log.id, note=note))
        self.log.note = self.log.note or note
        self.log.status = self.log.status or "malformed"
