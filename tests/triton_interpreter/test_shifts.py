"""Rotated copies of queries under the interpreter: eager, and from buffers at fixed addresses."""

from __future__ import annotations

import pytest
import torch
from test_backend import DIM, make_cache, new_tokens

import fork_attn as fa
from fork_attn.plan_buffers import PlanBuffers

WIDTH = 10


class Three:
    """One history in three caches: the reference, this backend, this backend's buffers."""

    def __init__(self) -> None:
        rope = fa.Rope.from_base(DIM, 100.0)
        self.caches = [make_cache(name, rope=rope) for name in ("reference", "triton", "triton")]
        self.branches = [[cache.new_branch()] for cache in self.caches]
        self.buffers = PlanBuffers(self.caches[2], max_tokens=WIDTH)

    def fork(self, n: int) -> None:
        self.branches = [live[0].fork(n) for live in self.branches]

    def step(self, counts: list[int]) -> None:
        total = sum(counts)
        rows = new_tokens(total)
        results = []
        for cache, live in zip(self.caches, self.branches, strict=True):
            with cache.step(dict(zip(live, counts, strict=True))) as step:
                if cache is not self.buffers.cache:
                    results.append(cache.attend(0, *rows, step))
                    continue
                self.buffers.update(step)
                padded = [x.new_full((WIDTH, *x.shape[1:]), torch.nan) for x in rows]
                for wide, x in zip(padded, rows, strict=True):
                    wide[:total] = x
                out = self.buffers.attend(0, *padded)
                assert not out[total:].any()
                results.append(out[:total])
        for got in results[1:]:
            torch.testing.assert_close(got, results[0], rtol=0, atol=1e-5)


def test_joins_end_to_end() -> None:
    three = Three()
    three.step([7])
    three.fork(4)
    three.step([2, 3, 1, 2])
    for live in three.branches:
        live[0].join(live[1:3], rebase=True)
        del live[1:3]
    three.step([1, 2])
    assert three.buffers.shifted
    three.fork(3)
    three.step([3, 1, 1])


@pytest.mark.parametrize("lag", [0, 1])
def test_branches_that_watch_each_other(lag: int) -> None:
    three = Three()
    three.step([7])
    three.fork(3)
    for live in three.branches:
        for a in live:
            for b in live:
                if a is not b:
                    a.watch(b, lag=lag)
    for counts in ([1, 1, 1], [2, 1, 3], [1, 1, 1], [1, 2, 1]):
        three.step(counts)
    assert three.buffers.shifted
