"""Prompt lookup: what followed the last few tokens where they occurred before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fork_attn.reason.drafts import Drafter, DraftTree

if TYPE_CHECKING:
    from fork_attn.reason.records import Log
    from fork_attn.reason.run import Run
    from fork_attn.reason.thread import Thread

_LOOK_BACK = 16  # occurrences of one n-gram that are looked at


class LookupDrafter(Drafter):
    """Finds n-grams in all that a prompt's threads have written, see `PromptLookup`."""

    def __init__(self, num_tokens: int, candidates: int, max_ngram: int, min_ngram: int) -> None:
        self._num_tokens, self._candidates = num_tokens, candidates
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._indices: dict[Run, _Index] = {}

    def propose(self, wanted: Mapping[Thread, int]) -> dict[Thread, DraftTree]:
        trees = {}
        for run in dict.fromkeys(thread.run for thread in wanted):
            index = self._indices.get(run)
            if index is None or index.logs is not run.logs:  # new, or it started again
                index = self._indices[run] = _Index(run.logs, self._sizes)
            index.read()
        for thread, most in wanted.items():
            tree = self._tree(self._indices[thread.run], thread, min(most, self._num_tokens))
            if len(tree):
                trees[thread] = tree
        return trees

    def _tree(self, index: _Index, thread: Thread, most: int) -> DraftTree:
        """Continuations of the longest n-grams first, and of each the latest first."""
        tree, left = DraftTree(), self._candidates
        for ids in index.continuations(thread.log, most):
            if tree.add_path(ids):
                left -= 1
                if left == 0:
                    break
        return tree

    def close(self) -> None:
        self._indices.clear()


class _Index:
    """Where each n-gram of a run's records ends."""

    def __init__(self, logs: list[Log], sizes: range) -> None:
        self.logs, self._sizes = logs, sizes
        self._longest = sizes[0]
        self._before: list[list[int]] = []  # for each record the last tokens of its context
        self._read: list[int] = []
        self._ends: dict[tuple[int, ...], list[tuple[Log, int]]] = {}

    def read(self) -> None:
        """Takes in what was written since."""
        for i, log in enumerate(self.logs):
            if i == len(self._read):
                self._before.append(self._context_end(log))
                self._read.append(0)
            if len(log.token_ids) > self._read[i]:
                self._read_log(i, log)

    def _read_log(self, i: int, log: Log) -> None:
        before, start = self._before[i], self._read[i]
        shift = len(before)  # the line is counted from there
        kept = max(0, shift + start - self._longest)
        line = [*before[kept:], *log.token_ids[max(0, kept - shift) :]]
        first = len(line) - (len(log.token_ids) - start)
        for end in range(first + 1, len(line) + 1):
            place = (log, start + end - first)
            for size in self._sizes:
                if size <= end:
                    self._ends.setdefault(tuple(line[end - size : end]), []).append(place)
        self._read[i] = len(log.token_ids)

    def continuations(self, log: Log, most: int) -> Iterator[list[int]]:
        """What followed the record's last tokens elsewhere, at most `most` tokens each."""
        tail = [*self._before[log.id], *log.token_ids[-self._longest :]]
        for size in self._sizes:
            if size > len(tail):
                continue
            for where, end in reversed(self._ends.get(tuple(tail[-size:]), ())[-_LOOK_BACK:]):
                ids = where.token_ids[end : end + most]
                if not ids:
                    continue
                if where is log:  # it repeats itself, and may go on to
                    period = len(ids)
                    ids += [ids[k % period] for k in range(period, most)]
                yield ids

    def _context_end(self, log: Log) -> list[int]:
        ids: list[int] = []
        for span in reversed(log.context):
            missing = self._longest - len(ids)
            if missing <= 0:
                break
            start = max(span.start, span.end - missing)
            ids = [*self.logs[span.thread].token_ids[start : span.end], *ids]
        return ids
