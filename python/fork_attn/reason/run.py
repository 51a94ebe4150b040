"""Run: one prompt on its way through a protocol. Its threads, its books, its limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fork_attn.reason import records
from fork_attn.reason.limits import Limits
from fork_attn.reason.sampling import Sampler, thread_seed
from fork_attn.reason.thread import Thread
from fork_attn.reason.trace_records import Event, JoinKind, Span, Status
from fork_attn.reason.vocabulary import Vocabulary

if TYPE_CHECKING:
    from fork_attn import ForkedKVCache
    from fork_attn.reason.drafts import Drafter
    from fork_attn.reason.engine import Engine
    from fork_attn.reason.protocol import Protocol


class Run:
    """One prompt on its way.

    Attributes:
        index: of the prompt.
        threads: the live ones, as a dict for its order.
        logs: all records, dead threads' too.
        left: tokens that may still be sampled.
        finish: None while it runs.
    """

    def __init__(
        self,
        engine: Engine,
        index: int,
        prompt: str,
        prompt_ids: Sequence[int],
        protocol: Protocol,
        vocabulary: Vocabulary,
        sampler: Sampler,
        limits: Limits,
        seed: int,
        end_tokens: frozenset[int],
        stop_texts: tuple[str, ...],
    ) -> None:
        self.engine, self.index, self.prompt, self.prompt_ids = engine, index, prompt, prompt_ids
        self.protocol, self.vocabulary, self.sampler = protocol, vocabulary, sampler
        self.limits, self.seed = limits, seed
        self.end_tokens, self.stop_texts = end_tokens, stop_texts
        self._samplers: dict[str, Sampler] = {}
        self.reset()

    def reset(self) -> None:
        """Back to the start; the cache holds nothing of it."""
        self.threads: dict[Thread, None] = {}
        self.logs: list[records.Log] = []
        self.events: list[Event] = []
        self.left = self.limits.max_new_tokens
        self.finish: Literal["done", "limit", "cancelled"] | None = None
        self.answer: tuple[Span, ...] = ()
        self.final = 0
        self.first_step = 0
        self.pages_shared = 0
        self.drafted: dict[int, tuple[int, int]] = {}  # per step: threads with a draft, its tokens
        self.stalled = 0  # threads that a limit ended since the last one that was fed

    @property
    def cache(self) -> ForkedKVCache:
        return self.engine.cache

    @property
    def drafter(self) -> Drafter:
        return self.engine.drafter

    @property
    def step(self) -> int:
        """Index of the next step."""
        return self.engine.num_steps

    def start(self) -> Thread:
        """The root, with the prompt in its queue."""
        self.first_step = self.step
        log = self._log("root", "root", (), (), 0, thread_seed(self.seed, ()))
        root = Thread(self, self.cache.new_branch(), log, None, ())
        self.threads[root] = None
        self.drafter.begin(root)
        root.inject(self.prompt_ids, "prompt")
        return root

    def sampler_with(self, options: dict[str, Any]) -> Sampler:
        """The run's sampler with other options; the same object for the same options."""
        if not options:
            return self.sampler
        key = repr(sorted(options.items()))
        if key not in self._samplers:
            self._samplers[key] = self.sampler.changed(**options)
        return self._samplers[key]

    def event(self, event: Event) -> None:
        self.events.append(event)
        self.engine.tell(self.index, event)

    def without_prompt(self, spans: Iterable[Span]) -> tuple[Span, ...]:
        prompt = len(self.prompt_ids)
        cut = (
            Span(0, max(s.start, prompt), s.end) if s.thread == 0 and s.start < prompt else s
            for s in spans
        )
        return tuple(span for span in cut if span.start < span.end)

    # Verbs of threads

    def fork(
        self,
        thread: Thread,
        n: int,
        labels: Sequence[str],
        *,
        detach: bool = False,
        fresh: bool = False,
    ) -> list[Thread]:
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        refusal = self._refusal(thread, n)
        if refusal:
            self.event(Event(self.step, "refuse", thread.log.id, note=refusal))
            return []
        seen, length = ((), 0) if fresh else (thread.visible(), thread.length)
        new = self.cache.new_branch
        branches = [new() for _ in range(n)] if fresh else thread.branch.fork(n)
        thread.forks += 1
        thread.waiting = not detach
        parent = thread.log.id
        children = []
        for i, branch in enumerate(branches):
            path = (*thread.path, (thread.forks, i))
            label = labels[i] if labels else f"thread {i + 1}"
            seed = thread_seed(self.seed, path)
            log = self._log("thread", label, (parent,), seen, len(path), seed)
            child = Thread(self, branch, log, thread, path)
            child.base, child.segment, child.sampler = length, thread.segment, thread.sampler
            if not fresh:
                child.logits, child.logits_step = thread.logits, thread.logits_step
            self.threads[child] = None
            children.append(child)
            if fresh:
                self.drafter.begin(child)
        if not fresh:
            self.drafter.fork(thread, children)
        ids = tuple(child.log.id for child in children)
        self.event(Event(self.step, "fork", parent, ids, tokens_reused=n * length))
        if detach:
            logits = thread.logits
            self._go_on(thread, thread.label, (parent,), seen)
            thread.logits = logits
        self._count_shared()
        return children

    def _refusal(self, thread: Thread, n: int) -> str:
        """Which limit forbids a fork, or nothing."""
        limits = self.limits
        if n > limits.max_fanout:
            return f"max_fanout: {n} children, at most {limits.max_fanout}"
        if len(thread.path) + 1 > limits.max_depth:
            return f"max_depth: already {len(thread.path)} deep, at most {limits.max_depth}"
        width = sum(not other.waiting for other in self.threads if other is not thread) + n
        if width > limits.max_width:
            return f"max_width: {width} threads at once, at most {limits.max_width}"
        if limits.max_pages is not None and self.num_pages() + n > limits.max_pages:
            return f"max_pages: {self.num_pages()} and {n} more, at most {limits.max_pages}"
        return ""

    def num_pages(self) -> int:
        """Pages of this prompt: each thread's own tokens, rounded up to whole pages."""
        size = self.cache.page_size
        return sum(-(-(thread.length - thread.base) // size) for thread in self.threads)

    def join(
        self,
        parent: Thread,
        children: list[Thread],
        position: Literal["max", "sum"] | int,
        how: JoinKind,
        label: str,
        keep: int | None,
    ) -> None:
        taken = children if how in ("union", "rebase") else children[:1] if how == "text" else []
        before = parent.visible()
        seen = before
        for child in taken:
            seen = records.union(seen, child.visible())
        if taken:
            self.drafter.join(parent, taken, position, how == "rebase")
            branches = [child.branch for child in taken]
            parent.branch.join(branches, position=position, rebase=how == "rebase")
        self._end(taken, "joined")
        self.free([child for child in children if child not in taken], "joined")
        if keep is not None:
            self.drafter.crop(parent, keep)
            parent.branch.crop(keep)
            before = seen = records.prefix(seen, keep)
            parent.base = min(parent.base, keep)
        old = parent.log.id
        parents = (old, *(child.log.id for child in children))
        self._go_on(parent, label or parent.label, parents, seen)
        parent.waiting = False
        self.event(
            Event(
                self.step,
                "join",
                old,
                parents[1:],
                into=parent.log.id,
                join=how,
                position=position if how == "union" else None,
                tokens_reused=records.num_tokens(seen) - records.num_tokens(before),
            )
        )
        self._count_shared()

    def select(self, parent: Thread, child: Thread, label: str) -> None:
        losers = [t for t in self.threads if t is not child and _descends(t, parent)]
        old, seen = parent.log.id, child.visible()
        parents = (child.log.id, *(loser.log.id for loser in losers))
        self.drafter.select(parent, child)
        parent.branch.select(child.branch)
        self._end([child], "joined")
        self._end(losers, "pruned", "not selected")
        self._go_on(parent, label or child.label, parents, seen)
        parent.waiting = False
        into = parent.log.id
        self.event(Event(self.step, "select", old, (child.log.id,), into=into))

    def rollback(self, thread: Thread, length: int, label: str) -> None:
        old = thread.log
        thread.drop_pending()
        seen = records.prefix(thread.visible(), length)
        self.drafter.crop(thread, length)
        thread.branch.crop(length)
        thread.base = min(thread.base, length)
        self._go_on(thread, label or thread.label, (old.id,), seen)
        self.event(Event(self.step, "rollback", old.id, into=thread.log.id))

    def free(self, threads: Sequence[Thread], status: Status, note: str = "") -> None:
        """Ends threads and gives back what only they see."""
        self.cache.free([thread.branch for thread in threads])
        self._end(threads, status, note)

    def _end(self, threads: Iterable[Thread], status: Status, note: str = "") -> None:
        """Ends threads whose branches are gone."""
        for thread in threads:
            del self.threads[thread]
            self.drafter.forget(thread)
            thread.log.drop(len(thread.queue))
            thread.queue = []
            thread.log.status = thread.log.status or status
            thread.log.note = thread.log.note or note
            self.engine.forget(thread)

    def _go_on(
        self, thread: Thread, label: str, parents: tuple[int, ...], seen: tuple[Span, ...]
    ) -> None:
        """The thread's next record."""
        old = thread.log
        thread.log = self._log("continuation", label, parents, seen, old.depth, old.seed)
        thread.log.watches = list(old.watches)
        thread.log.take_queue(old, len(thread.queue))
        thread.position = thread.branch.position
        thread.logits = None
        thread.exhausted = ""

    def _log(
        self,
        kind: Literal["root", "thread", "continuation"],
        label: str,
        parents: tuple[int, ...],
        context: tuple[Span, ...],
        depth: int,
        seed: int,
    ) -> records.Log:
        log = records.Log(len(self.logs), kind, label, parents, context, depth, seed)
        self.logs.append(log)
        return log

    def _count_shared(self) -> None:
        self.pages_shared = max(self.pages_shared, self.cache.stats().pages_shared)

    # The end

    def complete(
        self,
        finish: Literal["done", "limit", "cancelled"],
        answer: tuple[Span, ...] | None = None,
        note: str = "",
    ) -> None:
        """Ends the run: all its branches go, the records stay.

        Args:
            finish: how it ended.
            answer: from its script; None takes what its live threads see.
            note: which limit.
        """
        if note and self.threads:
            kind: Literal["limit", "cancel"] = "limit" if finish == "limit" else "cancel"
            self.event(Event(self.step, kind, next(iter(self.threads)).log.id, note=note))
        if answer is None:
            answer = self.protocol.cut_off(list(self.threads)) if self.threads else ()
        self.answer = answer
        self.final = answer[-1].thread if answer else 0
        cut = finish == "done" and self.logs[self.final].status == "limit"
        self.finish = "limit" if cut else finish
        chosen = {span.thread for span in answer}
        for thread in list(self.threads):
            if finish != "done":
                self.free([thread], finish, note)
            elif thread.log.id in chosen:
                self.free([thread], "done")
            else:
                self.free([thread], "pruned", "not part of the answer")


def _descends(thread: Thread, ancestor: Thread) -> bool:
    above = thread.parent
    while above is not None and above is not ancestor:
        above = above.parent
    return above is ancestor
