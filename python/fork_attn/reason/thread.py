"""Thread: what a protocol's script writes, forks and joins."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fork_attn.errors import Unsupported
from fork_attn.reason import records
from fork_attn.reason.detokenize import Detokenizer, text_of
from fork_attn.reason.sampling import Sampler
from fork_attn.reason.script import Ended, Script, Together
from fork_attn.reason.trace_records import Event, InjectionKind, JoinKind, Span, Status, Watching

if TYPE_CHECKING:
    import torch

    from fork_attn import Branch
    from fork_attn.reason.run import Run


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
        self.ahead = 0  # tokens fed in the step that is still open
        self.position = branch.position
        self.goal: Literal["write", "flush"] | None = None
        self.stops: dict[int, str] = {}
        self.texts: tuple[str, ...] = ()
        self.until: Callable[[Thread], bool] | None = None
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
        return self.branch.length + self.ahead

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

    def said(self) -> tuple[str, list[float]]:
        """What was sampled in `answer`, without end tokens: its text, and log-probabilities."""
        ids, logprobs = [], []
        for span in self.answer():
            log = self.run.logs[span.thread]
            for i in range(span.start, span.end):
                if (logprob := log.logprobs[i]) is not None:
                    logprobs.append(logprob)
                    ids.append(log.token_ids[i])
        while ids and ids[-1] in self.run.end_tokens:
            ids.pop()
        return self.run.vocabulary.decode(ids), logprobs

    def before(self, text: str, *, last: bool = False) -> tuple[int, str] | None:
        """Where a text begins in what it has written since its last record began.

        Returns:
            How many tokens it saw before that, for `rollback`, and what the token in which the text
            begins says before it; None where the text does not occur.
        """
        own, ends = text_of(self.run.vocabulary.pieces, self.log.token_ids)
        at = own.rfind(text) if last else own.find(text)
        if at < 0:
            return None
        token = next(i for i, end in enumerate(ends) if end > at)
        start = ends[token - 1] if token else 0
        fed = [span for span in self.log.own() if span.start < token]
        length = records.num_tokens(self.log.context)
        length += sum(min(span.end, token) - span.start for span in fed)
        return length, own[start:at]

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
        until: Callable[[Thread], bool] | None = None,
        max_tokens: int | None = None,
        sampler: Sampler | None = None,
    ) -> Script:
        """Samples tokens until one of `stops`, an end token, or a limit.

        Args:
            stops: tags that end it, each one token.
            texts: texts that end it wherever they appear in what it writes.
            until: called after each token; true ends it.
            max_tokens: of this call; then the reason is "limit" and the note "max_tokens".
            sampler: instead of the run's.

        Returns:
            `Ended`.
        """
        self.stops = self.run.vocabulary.stops(tuple(stops))
        self.texts = (*texts, *self.run.stop_texts)
        self.until = until
        self.tail = ""
        if self.texts:
            self.detokenizer = Detokenizer(self.run.vocabulary.pieces)
        self._budget(max_tokens)
        self.sampler = self.run.sampler if sampler is None else sampler
        if not self.queue and self.logits is None and not self.exhausted:
            raise RuntimeError(f"write: {self!r} has no token to go on from; inject one first")
        self.goal = "write"
        return (yield self)

    def at_limit(self, token: int | None = None) -> Ended:
        """Its budget is spent."""
        if self.limit_note == "max_thread_tokens":
            self.log.status = self.log.status or "limit"
            self.log.note = self.log.note or self.limit_note
        return Ended("limit", token=token, note=self.limit_note)

    def match(self, token: int) -> str:
        """The stop text that the last token completed, or nothing."""
        assert self.detokenizer is not None
        piece = self.detokenizer.push(token)
        longest = max(map(len, self.texts))
        self.tail = self.tail[-longest:] + piece
        return next((text for text in self.texts if text in self.tail), "")

    def new_pages(self, drafted: int = 0) -> int:
        """Pages that its queue, and so many draft tokens behind it, need beyond those it holds."""
        own, size = self.length - self.base, self.run.cache.page_size
        return -(-(own + len(self.queue) + drafted) // size) - -(-own // size)

    def slots(self, pages: int) -> int:
        """Draft tokens that fit behind its queue, in the queue's last page and so many more."""
        own, size = self.length - self.base, self.run.cache.page_size
        end = own + len(self.queue)
        return (-(-end // size) + pages) * size - end

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

    def spawn(self, n: int, *, labels: Sequence[str] = ()) -> Script:
        """`n` children that see nothing until they are given something; the thread waits.

        Returns:
            The children, or an empty list where a limit refuses them.
        """
        yield from self.flush()
        return self.run.fork(self, n, labels, fresh=True)

    def join(
        self,
        children: Sequence[Thread],
        *,
        position: Literal["max", "sum"] | int = "max",
        how: JoinKind = "union",
        label: str = "",
        keep: int | None = None,
        hold: bool = False,
    ) -> Script:
        """Goes on over its own context and the children's; feeds all queues first.

        Args:
            children: live threads of this run.
            position: where it goes on, see `Branch.join`.
            how: "union" takes the children's KV at the positions at which it was written;
                "rebase" lays it end to end; "text" takes the first child's alone, and copies of the
                others' tokens should follow; "message" takes none.
            label: of the record that goes on.
            hold: its own queue is fed after the join, so that what is in it sees the children.
            keep: with "message", how many of the first tokens that it sees it keeps.
        """
        taken = {"text": children[:1], "message": ()}.get(how, children)
        first = taken if hold else (self, *taken)
        busy = [thread.flush() for thread in first if thread.queue]
        if busy:
            yield Together(tuple(busy))
        self.run.join(self, list(children), position, how, label, keep)

    def select(self, child: Thread, label: str = "") -> Script:
        """Goes on as `child`, a descendant, whose queue is fed first; its other descendants are
        pruned."""
        yield from child.flush()
        self.run.select(self, child, label)

    def rollback(self, length: int, label: str = "") -> None:
        """Forgets all but the first `length` tokens that it sees; its queue too."""
        self.run.rollback(self, length, label)

    def move(self, position: int) -> None:
        """Its next token stands at `position`."""
        self.run.drafter.move(self)
        self.branch.position = self.position = position

    def watch(self, other: Thread, *, lag: int = 0, rebase: bool = True) -> None:
        """From now on sees what another thread writes, see `Branch.watch`.

        Raises:
            Unsupported: threads draft tokens.
        """
        if self.run.engine.speculates:
            raise Unsupported(
                "watch: a thread that drafts tokens cannot be watched while it writes; expected "
                "speculation=None"
            )
        self.branch.watch(other.branch, lag=lag, rebase=rebase)
        self.log.watches.append(Watching(other.log.id, lag, rebase, self.length))

    def prune(self, note: str = "", status: Status = "pruned") -> None:
        """Ends the thread and frees what only it sees."""
        self.run.free([self], status, note)
        self.run.event(Event(self.run.step, "prune", self.log.id, note=note))

    def malformed(self, note: str) -> None:
        """Records that the model wrote what the protocol cannot follow; nothing else happens."""
        self.run.event(Event(self.run.step, "malformed", self.log.id, note=note))
        self.log.note = self.log.note or note
        self.log.status = self.log.status or "malformed"
