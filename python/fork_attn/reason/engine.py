"""Engine: all threads of all prompts, one ragged forward a step."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fork_attn.hf import forward as hf_forward
from fork_attn.reason.drafts import Drafter
from fork_attn.reason.interrupts import Deferred
from fork_attn.reason.kv_bias import KVBias
from fork_attn.reason.run import Run
from fork_attn.reason.script import Ended, Script, Together
from fork_attn.reason.stepper import Stepper
from fork_attn.reason.thread import Thread
from fork_attn.reason.trace_records import Event, StepRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fork_attn import ForkedKVCache


class Task:
    """A script that runs, and what it waits for: a thread, or other tasks."""

    __slots__ = ("children", "done", "first", "left", "parent", "results", "run", "script", "slot")

    def __init__(self, run: Run, script: Script, parent: Task | None = None, slot: int = 0) -> None:
        self.run, self.script, self.parent, self.slot = run, script, parent, slot
        self.children: list[Task] = []
        self.results: list[Any] = []
        self.left = 0
        self.first = self.done = False

    def race(self) -> Task | None:
        """The outermost task around it whose scripts race: the first that ends them ends all."""
        found, task = None, self.parent
        while task is not None:
            found, task = task if task.first else found, task.parent
        return found


class Engine:
    """Runs prompts to their ends.

    Args:
        model: attached to `cache`.
        cache: its cache; other branches in it are left alone.
        forward: `fork_attn.hf.forward`, or what stands in for it.
        max_positions: the model's; a thread ends there. None: no end.
        deadline: of `time.perf_counter`; None: no end.
        bias: vectors that are added to the keys and values of threads, by segment.
        drafter: proposes draft tokens; None: nothing is drafted.
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
        drafter: Drafter | None = None,
        tell: Callable[[int, Any], None] | None = None,
    ) -> None:
        self.cache = cache
        self.speculates = drafter is not None
        self.drafter = drafter or Drafter()
        self._deadline = math.inf if deadline is None else deadline
        self._tell = tell
        self.runs: list[Run] = []
        self._waiting: deque[Run] = deque()
        self._live: dict[Run, Task] = {}
        self._ready: deque[tuple[Task, Any]] = deque()
        self._preempted = False
        self._stepper = Stepper(
            model,
            cache,
            forward,
            max_positions,
            bias,
            drafter,
            tell=tell,
            end=self._end,
            exhaust=self._exhaust,
            relieve=self._relieve,
        )

    @property
    def num_steps(self) -> int:
        return len(self._stepper.times)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self._waiting.append(run)

    def tell(self, prompt: int, what: Any) -> None:
        if self._tell is not None:
            self._tell(prompt, what)

    def run(self) -> Generator[None, None, None]:
        """Steps until every prompt is done; yields after each step. However it is left (to its end,
        by an error, by closing it), no branch of it remains."""
        self._stepper.clock = time.perf_counter()
        try:
            while self._waiting or self._live:
                with Deferred():
                    stepped = self._turn()
                if stepped:
                    yield
        finally:
            with Deferred():
                self._stepper.abort()
                self.drafter.abort()
                for run in list(self._live):
                    self._close(run, "cancelled", "cancelled from outside")
                for run in self._waiting:
                    run.complete("cancelled")
                self.drafter.close()

    def _turn(self) -> bool:
        """Lets all scripts go on as far as they can, then makes a step, if there is one to make."""
        self._admit()
        self._advance()
        if time.perf_counter() > self._deadline:
            self._cut_off("max_seconds")
        if not self._stepper.active:
            return False
        over = self._stepper.step()
        if over:
            self._advance()  # a prompt may have ended with its last token
            for run in over & self._live.keys():
                self._close(run, "limit", "max_new_tokens")
        return True

    def records(self, first: int = 0) -> list[StepRecord]:
        return [
            StepRecord(seconds, model, sampling, 0, 0, pages, drafting_seconds=drafting)
            for seconds, model, sampling, pages, drafting in self._stepper.times[first:]
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
            self.drafter.forget(thread)
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
                    self._stepper.active[command] = None
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
        for thread in [t for t in self._stepper.active if t.task is task]:
            self.forget(thread)
        task.script.close()

    def forget(self, thread: Thread) -> None:
        """The thread takes part in no further step."""
        self._stepper.active.pop(thread, None)
        thread.goal = thread.task = None

    def _end(self, thread: Thread, ended: Ended) -> None:
        """A thread's goal is reached: its script goes on."""
        task = thread.task
        self.forget(thread)
        self._ready.append((task, ended))

    # Full pools

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
