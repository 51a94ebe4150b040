"""Engine: all threads of all prompts, one ragged forward a step."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fork_attn.errors import OutOfPages
from fork_attn.hf import forward as hf_forward
from fork_attn.reason.kv_bias import KVBias
from fork_attn.reason.run import Run
from fork_attn.reason.thread import Ended, Script, Thread, Together
from fork_attn.reason.trace import Event, StepRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fork_attn import ForkedKVCache, Step


class Task:
    """A script that runs, and what it waits for: a thread, or other tasks."""

    __slots__ = ("children", "done", "first", "left", "parent", "results", "run", "script", "slot")

    def __init__(self, run: Run, script: Script, parent: Task | None = None, slot: int = 0) -> None:
        self.run, self.script, self.parent, self.slot = run, script, parent, slot
        self.children: list[Task] = []
        self.results: list[Any] = []
        self.left = 0
        self.first = self.done = False


class Engine:
    """Runs prompts to their ends.

    Args:
        model: attached to `cache`.
        cache: its cache; other branches in it are left alone.
        forward: `fork_attn.hf.forward`, or what stands in for it.
        max_positions: the model's; a thread ends there. None: no end.
        deadline: of `time.perf_counter`; None: no end.
        bias: vectors that are added to the keys and values of threads, by segment.
        tell: told of events and tokens: (prompt, Event or (thread, token, logprob)).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: ForkedKVCache,
        *,
        forward: Callable[..., torch.Tensor] = hf_forward,
        max_positions: int | None = None,
        deadline: float | None = None,
        bias: KVBias | None = None,
        tell: Callable[[int, Any], None] | None = None,
    ) -> None:
        self.model, self.cache, self._forward, self._bias = model, cache, forward, bias
        self._max_positions = math.inf if max_positions is None else max_positions
        self._deadline = math.inf if deadline is None else deadline
        self._tell = tell
        self.steps: list[tuple[float, float, float, int]] = []
        self.runs: list[Run] = []
        self._waiting: deque[Run] = deque()
        self._live: dict[Run, Task] = {}
        self._active: dict[Thread, None] = {}
        self._ready: deque[tuple[Task, Any]] = deque()
        self._preempted = False
        self._clock = 0.0
        layers = [(i, cache._layer(i)) for i in range(cache.num_layers)]
        kinds = {(layer.window, layer.plan_shape(cache.dtype)): i for i, layer in layers}
        self._planned_layers = sorted(kinds.values())

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self._waiting.append(run)

    def tell(self, prompt: int, what: Any) -> None:
        if self._tell is not None:
            self._tell(prompt, what)

    def run(self) -> Iterator[None]:
        """Steps until every prompt is done; yields after each step. However it is left (to its end,
        by an error, by closing it), no branch of it remains."""
        self._clock = time.perf_counter()
        try:
            while self._waiting or self._live:
                self._admit()
                self._advance()
                if time.perf_counter() > self._deadline:
                    self._cut_off("max_seconds")
                if self._active:
                    self._step()
                    yield
        finally:
            for run in list(self._live):
                self._close(run, "cancelled", "cancelled from outside")
            for run in self._waiting:
                run.complete("cancelled")

    def records(self, first: int = 0) -> list[StepRecord]:
        return [
            StepRecord(seconds, model, sampling, 0, 0, pages)
            for seconds, model, sampling, pages in self.steps[first:]
        ]

    # Prompts

    def _admit(self) -> None:
        """Starts prompts while the pool has room for them; a lone one starts anyway."""
        while self._waiting:
            run = self._waiting[0]
            if self._live:
                pages = -(-len(run.prompt_ids) // self.cache.page_size)
                free = self.cache.stats().pages_free - pages
                if self._preempted or free < self.cache.num_pages // 8:
                    return
            self._waiting.popleft()
            task = Task(run, run.protocol.run(run.start()))
            self._live[run] = task
            self._ready.append((task, None))

    def _close(self, run: Run, finish: Any, note: str = "", answer: Any = None) -> None:
        """Ends a run whose script may still be at work."""
        task = self._live.pop(run, None)
        if task is not None:
            self._cancel(task)
        run.complete(finish, answer, note)
        self._preempted = False

    def _cut_off(self, note: str) -> None:
        for run in list(self._live):
            self._close(run, "limit", note)
        while self._waiting:
            self._waiting.popleft().complete("limit", note=note)

    def _preempt(self, run: Run) -> None:
        """Sends a run back to the start, so that older ones find pages; it repeats itself later."""
        self._cancel(self._live.pop(run))
        self.cache.free([thread.branch for thread in run.threads])
        for thread in run.threads:
            self.forget(thread)
        run.reset()
        self._waiting.appendleft(run)
        self._preempted = True
        self.tell(run.index, Event(0, "rollback", 0, note="starts again: the pool is full"))

    # Scripts

    def _advance(self) -> None:
        """Resumes scripts until all of them wait for threads."""
        ready = self._ready
        while ready:
            task, value = ready.popleft()
            if task.done:
                continue
            try:
                command = task.script.send(value)
            except StopIteration as stop:
                self._finish(task, stop.value)
                continue
            if isinstance(command, Thread):
                command.task = task
                if command.goal == "write" and command.left == 0:
                    self._end(command, command.at_limit())
                elif command.goal == "write" and not command.queue and command.logits is None:
                    self._end(command, Ended("limit", note=command.exhausted))
                else:
                    self._active[command] = None
            elif isinstance(command, Together):
                self._spawn(task, command)
            else:
                raise TypeError(f"script: expected to yield a Thread or Together, got {command!r}")

    def _spawn(self, task: Task, command: Together) -> None:
        if not command.scripts:
            raise ValueError("together: expected at least one script, got none")
        task.children = [
            Task(task.run, script, task, slot) for slot, script in enumerate(command.scripts)
        ]
        task.results = [None] * len(task.children)
        task.left, task.first = len(task.children), command.first
        self._ready.extend((child, None) for child in task.children)

    def _finish(self, task: Task, value: Any) -> None:
        task.done = True
        parent = task.parent
        if parent is None:
            run = task.run
            root = next(iter(run.threads))
            self._close(run, "done", answer=root.answer() if value is None else value)
            return
        parent.results[task.slot] = value
        parent.left -= 1
        if parent.first:
            for child in parent.children:
                self._cancel(child)
            self._ready.append((parent, (task.slot, value)))
            parent.first = False
        elif parent.left == 0:
            self._ready.append((parent, parent.results))

    def _cancel(self, task: Task) -> None:
        """Closes a script and all that it waits for."""
        if task.done:
            return
        task.done = True
        for child in task.children:
            self._cancel(child)
        for thread in [t for t in self._active if t.task is task]:
            self.forget(thread)
        task.script.close()

    def forget(self, thread: Thread) -> None:
        """The thread takes part in no further step."""
        self._active.pop(thread, None)
        thread.goal = thread.task = None

    def _end(self, thread: Thread, ended: Ended) -> None:
        """A thread's goal is reached: its script goes on."""
        task = thread.task
        self.forget(thread)
        self._ready.append((task, ended))

    # Steps

    def _step(self) -> None:
        """One forward for every thread with something to feed, and one token for every writer."""
        fed, step = self._open()
        kept = [t for t in self._active if t.logits is not None and t.goal == "write"]
        index = len(self.steps)
        began = modelled = sampled = time.perf_counter()
        rows: torch.Tensor | None = None
        if step is not None:
            with step:
                for layer in self._planned_layers:
                    step.plan_for(layer)
                if self._bias is not None:
                    self._bias.set_rows([(t.segment, len(t.queue)) for t in fed])
                tokens = {thread.branch: thread.queue for thread in fed}
                began = time.perf_counter()
                rows = self._forward(self.model, tokens, step=step)
                if self._bias is not None:
                    self._bias.clear()
                modelled = sampled = time.perf_counter()
            for thread in fed:
                self._record_fed(thread, index)
        writers, logits = _writers(fed, rows, kept)
        if writers:
            ids, logprobs = _pick(writers, logits)
            sampled = time.perf_counter()
            over = self._record_sampled(writers, ids, logprobs, index)
        for thread in fed:
            if thread.goal == "flush":
                self._end(thread, Ended("stop"))
        if step is not None:
            now = time.perf_counter()
            pages = self.cache._core.stats()[2]
            self.steps.append((now - self._clock, modelled - began, sampled - modelled, pages))
            self._clock = now
        if writers and over:
            self._advance()
            for run in over & self._live.keys():
                self._close(run, "limit", "max_new_tokens")

    def _open(self) -> tuple[list[Thread], Step | None]:
        """The step of all threads that have something to feed and find room; the youngest wait."""
        fed = self._rows()
        rows = fed
        while rows:
            try:
                return rows, self.cache.step({thread.branch: len(thread.queue) for thread in rows})
            except OutOfPages:
                if rows is fed:
                    rows = sorted(fed, key=lambda t: (t.run.index, t.log.id))
                rows = rows[:-1]
        if fed:
            self._relieve(fed)
        return [], None

    def _rows(self) -> list[Thread]:
        """Active threads with something to feed; those at a limit end here."""
        rows: list[Thread] = []
        pages: dict[Run, int] = {}
        for thread in tuple(self._active):
            if not thread.queue:
                continue
            if thread.position + len(thread.queue) > self._max_positions:
                self._exhaust(thread, f"positions: the model has {self._max_positions}")
                continue
            run = thread.run
            if run.limits.max_pages is not None:
                used = pages.get(run)
                used = run.num_pages() if used is None else used
                pages[run] = used + thread.new_pages()
                if pages[run] > run.limits.max_pages and pages[run] > used:
                    pages[run] = used
                    self._exhaust(thread, f"max_pages: {run.limits.max_pages}")
                    continue
            rows.append(thread)
        return rows

    def _relieve(self, fed: Sequence[Thread]) -> None:
        """Not one thread finds a page: the youngest prompt starts again later; a lone one gives up
        its youngest thread."""
        if len(self._live) > 1:
            self._preempt(max(self._live, key=lambda run: run.index))
        else:
            youngest = max(fed, key=lambda thread: thread.log.id)
            self._exhaust(youngest, f"pool: all {self.cache.num_pages} pages are in use")

    def _exhaust(self, thread: Thread, note: str) -> None:
        """Ends a thread that cannot go on, and a prompt whose threads do nothing else."""
        run = thread.run
        run.event(Event(run.step, "limit", thread.log.id, note=note))
        thread.log.status, thread.log.note = "limit", note
        thread.drop_pending()
        thread.exhausted = note
        run.stalled += 1
        if run.stalled > 2 * len(run.threads) + 2:
            self._close(run, "limit", note)
        else:
            self._end(thread, Ended("limit", note=note))

    def _record_fed(self, thread: Thread, index: int) -> None:
        log, n = thread.log, len(thread.queue)
        if n == 1:
            log.positions.append(thread.position)
            log.fed_steps.append(index)
        else:
            log.positions += range(thread.position, thread.position + n)
            log.fed_steps += [index] * n
        thread.position += n
        thread.queue = []
        thread.run.stalled = 0

    def _record_sampled(
        self, writers: list[Thread], ids: list[int], logprobs: list[float], index: int
    ) -> set[Run]:
        """Appends each writer's token and ends those that it stops.

        Returns:
            The prompts that have sampled all they may.
        """
        over: set[Run] = set()
        for thread, token, logprob in zip(writers, ids, logprobs, strict=True):
            log, run = thread.log, thread.run
            log.token_ids.append(token)
            log.logprobs.append(logprob)
            log.sampled_steps.append(index if thread.logits is None else thread.logits_step)
            thread.logits = None
            thread.queue = [token]
            thread.left -= 1
            run.left -= 1
            if self._tell is not None:
                self._tell(run.index, (thread, token, logprob))
            if token in thread.stops:
                self._end(thread, Ended("stop", thread.stops[token], token))
            elif token in run.end_tokens:
                self._end(thread, Ended("eos", token=token))
            elif thread.texts and (text := thread.match(token)):
                self._end(thread, Ended("stop", text, token))
            elif thread.left == 0:
                self._end(thread, thread.at_limit(token))
            if run.left <= 0:
                over.add(run)
        return over


def _writers(
    fed: list[Thread], rows: torch.Tensor | None, kept: list[Thread]
) -> tuple[list[Thread], torch.Tensor]:
    """The threads that sample now, and their logits (n, vocab)."""
    writing = [i for i, thread in enumerate(fed) if thread.goal == "write"]
    parts = []
    if rows is not None:
        for i, thread in enumerate(fed):
            if thread.goal == "flush":  # for children, or for itself where a fork is refused
                thread.logits, thread.logits_step = rows[i].clone(), thread.log.fed_steps[-1]
        if writing:
            parts.append(rows if len(writing) == len(fed) else rows[writing])
    parts += [thread.logits[None] for thread in kept if thread.logits is not None]
    writers = [*(fed[i] for i in writing), *kept]
    return writers, torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.empty(0)


def _pick(writers: list[Thread], logits: torch.Tensor) -> tuple[list[int], list[float]]:
    """A token for each writer; those with the same sampler together."""
    first = writers[0].sampler
    if all(thread.sampler is first for thread in writers):
        return first.pick(logits, writers)
    ids, logprobs = [0] * len(writers), [0.0] * len(writers)
    for sampler in dict.fromkeys(thread.sampler for thread in writers):
        rows = [i for i, thread in enumerate(writers) if thread.sampler is sampler]
        picked = sampler.pick(logits[rows], [writers[i] for i in rows])
        for i, token, logprob in zip(rows, *picked, strict=True):
            ids[i], logprobs[i] = token, logprob
    return ids, logprobs
