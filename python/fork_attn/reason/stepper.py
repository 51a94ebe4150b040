"""Stepper: one ragged forward for all threads, and one token for each that writes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fork_attn.errors import OutOfPages
from fork_attn.reason.drafts import Drafter, DraftTree
from fork_attn.reason.kv_bias import KVBias
from fork_attn.reason.sampling import pick_all
from fork_attn.reason.script import Ended
from fork_attn.reason.thread import Thread
from fork_attn.reason.verify import Verification, propose
from fork_attn.step import Draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fork_attn import ForkedKVCache, Step
    from fork_attn.reason.run import Run


class Stepper:
    """Feeds what stands in threads' queues, and samples.

    Args:
        model, cache, forward, max_positions, bias, drafter, tell: see `Engine`.
        end: called with a thread whose goal is reached, and why.
        exhaust: called with a thread that cannot go on, and the limit.
        relieve: called with threads for none of which the pool has a page.

    Attributes:
        active: the threads with a goal, in the order in which they got it.
        times: per step: seconds since the step before it, in the model, in sampling; pages in use;
            seconds in drafting.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: ForkedKVCache,
        forward: Callable[..., torch.Tensor],
        max_positions: int | None,
        bias: KVBias | None,
        drafter: Drafter | None = None,
        *,
        tell: Callable[[int, Any], None] | None,
        end: Callable[[Thread, Ended], None],
        exhaust: Callable[[Thread, str], None],
        relieve: Callable[[Sequence[Thread]], None],
    ) -> None:
        self._model, self._cache, self._forward, self._bias = model, cache, forward, bias
        self._max_positions = math.inf if max_positions is None else max_positions
        self._drafter, self._drafting = drafter, 0.0
        self._pages: dict[Run, int] = {}  # of prompts with a limit, with what this step feeds
        self._tell, self._end, self._exhaust, self._relieve = tell, end, exhaust, relieve
        self.active: dict[Thread, None] = {}
        self.times: list[tuple[float, float, float, int, float]] = []
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
        fed, trees, step = self._open()
        kept = [t for t in self.active if t.logits is not None and t.goal == "write"]
        index = len(self.times)
        began = modelled = time.perf_counter()
        walk = Verification(fed, trees, self.active) if trees else None
        rows: torch.Tensor | None = None
        over: set[Run] = set()
        if step is not None:
            with step:
                rows, began = self._run_model(fed, trees, walk, step)
                modelled = time.perf_counter()
                if walk is not None:
                    over = self._sample(fed, kept, rows, walk, index)
                    for thread in trees:
                        step.accept(walk.accepted(thread), thread.branch)
        if walk is None:
            over = self._sample(fed, kept, rows, None, index)
        else:
            self._settle(fed, trees, walk, index)
        sampled = time.perf_counter()
        for thread in fed:
            if thread.goal == "flush":
                self._end(thread, Ended("stop"))
        if step is not None:
            now = time.perf_counter()
            pages = self._cache._core.stats()[2]
            seconds = (now - self.clock, modelled - began, sampled - modelled, pages)
            self.times.append((*seconds, self._drafting))
            self.clock, self._drafting = now, 0.0
        return over

    def _run_model(
        self,
        fed: list[Thread],
        trees: dict[Thread, DraftTree],
        walk: Verification | None,
        step: Step,
    ) -> tuple[torch.Tensor, float]:
        """The logits of each thread's last token and of its tree, and when the model began."""
        for layer in self._planned_layers:
            step.plan_for(layer)
        tokens = {thread.branch: thread.queue for thread in fed}
        for thread, tree in trees.items():
            tokens[thread.branch] = thread.queue + tree.tokens
        if self._bias is not None:
            self._bias.set_rows([(t.segment, len(tokens[t.branch])) for t in fed])
        began = time.perf_counter()
        if walk is None:
            rows = self._forward(self._model, tokens, step=step)
        else:
            rows = self._forward(self._model, tokens, step=step, logits=walk.rows)
        if self._bias is not None:
            self._bias.clear()
        return rows, began

    def _sample(
        self,
        fed: list[Thread],
        kept: list[Thread],
        rows: torch.Tensor | None,
        walk: Verification | None,
        index: int,
    ) -> set[Run]:
        """Records what was fed, and picks a token for each writer; behind accepted draft tokens
        another one.

        Returns:
            The prompts that have sampled all they may.
        """
        over: set[Run] = set()
        for thread in fed:
            self._record_fed(thread, index, walk is not None)
        writers, logits = _writers(fed, rows, kept, None if walk is None else walk.first)
        while writers:
            ids, logprobs = pick_all(writers, logits)
            over |= self._record_sampled(writers, ids, logprobs, index)
            if walk is None or rows is None:
                break
            writers, places = walk.follow(writers, over)
            for thread in writers:
                self._record_fed(thread, index, True)
            logits = rows[places]
        return over

    def _settle(
        self,
        fed: list[Thread],
        trees: dict[Thread, DraftTree],
        walk: Verification,
        index: int,
    ) -> None:
        """After a step with drafts was committed."""
        for thread in fed:
            thread.ahead = 0
        assert self._drafter is not None
        for thread, path in walk.paths.items():
            self._drafter.settle(thread, path)
            drafts, tokens = thread.run.drafted.get(index, (0, 0))
            thread.run.drafted[index] = (drafts + 1, tokens + len(trees[thread]))

    def _open(self) -> tuple[list[Thread], dict[Thread, DraftTree], Step | None]:
        """The step of all threads that have something to feed and find room; the youngest wait.
        Drafts take only room that is left."""
        fed = self._rows()
        trees = self._propose(fed)
        rows = fed
        while rows:
            try:
                return rows, trees, self._cache.step({t.branch: _request(t, trees) for t in rows})
            except OutOfPages:
                if self._drafter is not None and trees:
                    for thread in trees:
                        self._drafter.settle(thread, ())
                    trees = {}
                    continue
                if rows is fed:
                    rows = sorted(fed, key=lambda t: (t.run.index, t.log.id))
                rows = rows[:-1]
        if fed:
            self._relieve(fed)
        return [], {}, None

    def _propose(self, fed: list[Thread]) -> dict[Thread, DraftTree]:
        """Draft trees for writers, within all limits."""
        if self._drafter is None:
            return {}
        began = time.perf_counter()
        trees = propose(self._drafter, fed, self._max_positions, self._pages)
        self._drafting += time.perf_counter() - began
        return trees

    def _rows(self) -> list[Thread]:
        """Active threads with something to feed; those at a limit end here."""
        rows: list[Thread] = []
        pages = self._pages = {}
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

    def _record_fed(self, thread: Thread, index: int, is_open: bool) -> None:
        log, n = thread.log, len(thread.queue)
        if n == 1:
            log.positions.append(thread.position)
            log.fed_steps.append(index)
        else:
            log.positions += range(thread.position, thread.position + n)
            log.fed_steps += [index] * n
        thread.position += n
        if is_open:
            thread.ahead += n
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


def _request(thread: Thread, trees: Mapping[Thread, DraftTree]) -> int | Draft:
    """What a thread asks of the step: its queue, with its draft tree behind it."""
    tree = trees.get(thread)
    return len(thread.queue) if tree is None else Draft(tree.behind(len(thread.queue)))


def _writers(
    fed: list[Thread], rows: torch.Tensor | None, kept: list[Thread], places: list[int] | None
) -> tuple[list[Thread], torch.Tensor]:
    """The threads that sample now, and their logits (n, vocab).

    Args:
        fed, kept: threads that were fed, and those that have logits already.
        rows: logits; places: of the fed threads in them, None where each has one row.
    """
    if rows is not None and places is not None:
        rows = rows[places]
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
