"""Drafting with a small model whose branches do what the threads do."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fork_attn.errors import OutOfPages
from fork_attn.hf import forward
from fork_attn.reason.drafts import Drafter, DraftTree
from fork_attn.reason.sampling import likeliest, pick_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fork_attn import Branch, ForkedKVCache
    from fork_attn.reason.thread import Thread


class ModelDrafter(Drafter):
    """See `DraftModel`.

    Each thread has a branch here that holds the first tokens of what the thread sees, at the same
    positions; what is missing is fed before the branch is used. Between a proposal and `settle` it
    holds the thread's queue and drafts too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: ForkedKVCache,
        max_positions: int | None,
        num_tokens: int,
        candidates: int,
    ) -> None:
        self._model, self._cache = model, cache
        self._max_positions = math.inf if max_positions is None else max_positions
        self._num_tokens, self._candidates = num_tokens, candidates
        self._branches: dict[Thread, Branch] = {}
        self._fed: dict[Thread, int] = {}  # nodes of the last tree that the branch holds

    # Proposals

    def propose(self, wanted: Mapping[Thread, int]) -> dict[Thread, DraftTree]:
        wanted = {t: min(n, self._num_tokens) for t, n in wanted.items() if t in self._branches}
        threads, logits = self._feed({thread: self._missing(thread, True) for thread in wanted})
        trees = {thread: DraftTree() for thread in threads}
        ahead = {thread: _Ahead(thread) for thread in threads}
        others: dict[Thread, list[tuple[int, int]]] = {thread: [] for thread in threads}
        self._fed.update(dict.fromkeys(threads, 0))
        while threads:
            behind: Any = [ahead[thread] for thread in threads]
            tops: list[list[int]] = [[] for _ in threads]
            if self._candidates > 1:
                tops = likeliest(behind, logits, self._candidates)
            picked, _ = pick_all(behind, logits)
            for thread, token, top in zip(threads, picked, tops, strict=True):
                parent = len(trees[thread]) - 1
                rest = [other for other in top if other != token][: self._candidates - 1]
                others[thread] += [(other, parent) for other in rest]
                trees[thread].add(token, parent)
                ahead[thread].chain.append(token)
            more = {t: [trees[t].tokens[-1]] for t in threads if len(trees[t]) < wanted[t]}
            threads, logits = self._feed(more)
            for thread in threads:
                self._fed[thread] += 1
        for thread, tree in trees.items():  # the chain lies in place where it is accepted
            for token, parent in others[thread]:
                tree.add(token, parent)
        return trees

    def settle(self, thread: Thread, path: Sequence[int]) -> None:
        branch, fed = self._branches.get(thread), self._fed.pop(thread, 0)
        if branch is not None and fed:
            kept = 0
            while kept < min(fed, len(path)) and path[kept] == kept:
                kept += 1
            if kept < fed:
                branch.crop(branch.length - fed + kept)

    def _missing(self, thread: Thread, queue: bool) -> list[int]:
        """What a thread sees, and with `queue` what stands in its queue, and its branch does not
        hold."""
        branch, log = self._branches[thread], thread.log
        if branch.length > thread.length:  # left over from a proposal whose step did not come
            branch.crop(thread.length)
        if branch.length == thread.length and branch.position != thread.branch.position:
            branch.position = thread.branch.position
        end = thread.length + (len(thread.queue) if queue else 0)
        stop = len(log.token_ids) - (0 if queue else len(thread.queue))
        missing = end - branch.length
        if log.dropped or missing > stop:
            return thread.context_ids()[branch.length : end]
        return log.token_ids[stop - missing : stop]

    def _feed(self, tokens: dict[Thread, list[int]]) -> tuple[list[Thread], torch.Tensor]:
        """Feeds tokens to threads' branches; the youngest for which there is no room are dropped.

        Returns:
            The threads that are left, and their logits (n, vocab).
        """
        for thread in [
            t for t, ids in tokens.items()
            if self._branches[t].position + len(ids) > self._max_positions
        ]:  # fmt: skip
            self._drop(
                thread, f"no more drafts: the draft model has {self._max_positions} positions"
            )
            del tokens[thread]
        while tokens:
            try:
                rows = {self._branches[thread]: ids for thread, ids in tokens.items()}
                return list(tokens), forward(self._model, rows)
            except OutOfPages:
                youngest = max(tokens, key=lambda thread: (thread.run.index, thread.log.id))
                self._drop(youngest, "no more drafts: the draft model's pool is full")
                del tokens[youngest]
        return [], torch.empty(0)

    def _catch_up(self, threads: Sequence[Thread]) -> bool:
        """Feeds all that threads see; False where one of them has no branch."""
        tokens = {t: self._missing(t, False) for t in threads if t in self._branches}
        self._feed({thread: ids for thread, ids in tokens.items() if ids})
        for thread in threads:
            if thread in self._branches and tokens[thread]:
                self._missing(thread, False)  # a position that was set
        return all(thread in self._branches for thread in threads)

    def _drop(self, thread: Thread, note: str = "") -> None:
        branch = self._branches.pop(thread, None)
        self._fed.pop(thread, None)
        if branch is not None:
            branch.free()
            thread.log.note = thread.log.note or note

    # What threads do

    def begin(self, thread: Thread) -> None:
        self._branches[thread] = self._cache.new_branch()

    def fork(self, thread: Thread, children: Sequence[Thread]) -> None:
        if self._catch_up([thread]):
            branches = self._branches[thread].fork(len(children))
            self._branches.update(zip(children, branches, strict=True))

    def join(self, parent: Thread, taken: Sequence[Thread], position: Any, rebase: bool) -> None:
        if taken and self._catch_up([parent, *taken]):
            branches = [self._branches.pop(child) for child in taken]
            self._branches[parent].join(branches, position=position, rebase=rebase)
        elif taken:
            self._drop(parent)

    def select(self, parent: Thread, child: Thread) -> None:
        self._drop(parent)
        if child in self._branches:
            self._branches[parent] = self._branches.pop(child)

    def crop(self, thread: Thread, length: int) -> None:
        branch = self._branches.get(thread)
        if branch is not None and branch.length > length:
            branch.crop(length)

    def move(self, thread: Thread) -> None:
        self._catch_up([thread])

    def forget(self, thread: Thread) -> None:
        self._drop(thread)

    def abort(self) -> None:
        step = self._cache._open_step
        if step is not None and any(b in step.branches for b in self._branches.values()):
            step.rollback()

    def close(self) -> None:
        self._cache.free(list(self._branches.values()))
        self._branches.clear()
        self._fed.clear()


class _Ahead:
    """A thread as it would be behind its draft: its next random numbers, without using them up."""

    def __init__(self, thread: Thread) -> None:
        self._thread, self.sampler = thread, thread.sampler
        self.chain: list[int] = []
        self.rng = random.Random()
        self.rng.setstate(thread.rng.getstate())

    def context_ids(self) -> list[int]:
        return [*self._thread.context_ids(), *self.chain]
