"""Stepper: one ragged forward for all threads, and one token for each that writes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fork_attn.errors import OutOfPages
from fork_attn.reason.kv_bias import KVBias
from fork_attn.reason.script import Ended
from fork_attn.reason.thread import Thread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fork_attn import ForkedKVCache, Step
    from fork_attn.reason.run import Run


class Stepper:
    """Feeds what stands in threads' queues, and samples.

    Args:
        model, cache, forward, max_positions, bias, tell: see `Engine`.
        end: called with a thread whose goal is reached, and why.
        exhaust: called with a thread that cannot go on, and the limit.
        relieve: called with threads for none of which the pool has a page.

    Attributes:
        active: the threads with a goal, in the order in which they got it.
        times: per step: seconds since the step before it, in the model, in sampling; pages in use.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: ForkedKVCache,
        forward: Callable[..., torch.Tensor],
        max_positions: int | None,
        bias: KVBias | None,
        *,
        tell: Callable[[int, Any], None] | None,
        end: Callable[[Thread, Ended], None],
        exhaust: Callable[[Thread, str], None],
        relieve: Callable[[Sequence[Thread]], None],
    ) -> None:
        self._model, self._cache, self._forward, self._bias = model, cache, forward, bias
        self._max_positions = math.inf if max_positions is None else max_positions
        self._tell, self._end, self._exhaust, self._relieve = tell, end, exhaust, relieve
        self.active: dict[Thread, None] = {}
        self.times: list[tuple[float, float, float, int]] = []
        self.clock = time.perf_counter()
        layers = [(i, cache._layer(i)) for i in range(cache.num_layers)]
        kinds = {(layer.window, layer.plan_shape(cache.dtype)): i for i, layer in layers}
        self._planned_layers = sorted(kinds.values())

    def abort(self) -> None:
        """Rolls back the step that an interrupt left open."""
        step = self._cache._open_step
        if step is not None and any(thread.branch in step.branches for thread in self.active):
            step.rollback()

    def step(self) -> set[Run]:
        """One forward for every thread with something to feed, and one token for every writer.

        Returns:
            The prompts that have sampled all they may.
        """
        fed, step = self._open()
        kept = [t for t in self.active if t.logits is not None and t.goal == "write"]
        index = len(self.times)
        began = modelled = sampled = time.perf_counter()
        rows: torch.Tensor | None = None
        over: set[Run] = set()
        if step is not None:
            with step:
                for layer in self._planned_layers:
                    step.plan_for(layer)
                if self._bias is not None:
                    self._bias.set_rows([(t.segment, len(t.queue)) for t in fed])
                tokens = {thread.branch: thread.queue for thread in fed}
                began = time.perf_counter()
                rows = self._forward(self._model, tokens, step=step)
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
            pages = self._cache._core.stats()[2]
            self.times.append((now - self.clock, modelled - began, sampled - modelled, pages))
            self.clock = now
        return over

    def _open(self) -> tuple[list[Thread], Step | None]:
        """The step of all threads that have something to feed and find room; the youngest wait."""
        fed = self._rows()
        rows = fed
        while rows:
            try:
                return rows, self._cache.step({thread.branch: len(thread.queue) for thread in rows})
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
        for thread in tuple(self.active):
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
            elif thread.until is not None and thread.until(thread):
                self._end(thread, Ended("stop", token=token))
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
