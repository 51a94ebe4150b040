"""The host's share of a decode step, part by part: what a GPU waits for between two replays.

pytest benchmarks/test_decode_host.py --benchmark-columns=min,median,max

The books are those of a Llama-3-8B-shaped cache with one layer's K and V, planned for an H200
(`sm_90`, 132 workers); buffers are host memory, so that the copy to the device is a copy here, and
pinning and the launch of a graph are not in it. `make gpu` measures the whole on a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import fork_attn as fa
from fork_attn.plan import plan_data
from fork_attn.plan_buffers import PlanBuffers
from fork_attn.staging import Layout, News

WIDTHS = pytest.mark.parametrize("width", [1, 64, 256])
PREFIX, OWN = 2048, 40
ROUNDS = {"rounds": 300, "warmup_rounds": 10}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What is copied is too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Decoding:
    """`width` branches over one prefix, and buffers for their steps."""

    def __init__(self, width: int) -> None:
        self.cache = fa.ForkedKVCache(
            num_layers=1,
            num_pages=20_000,
            num_q_heads=32,
            num_kv_heads=8,
            head_dim=1,  # books do not know it, and the pool stays small
            num_workers=132,
        )
        self.cache._target = "sm_90"
        root = self.cache.new_branch()
        self.cache.step({root: PREFIX}).commit()
        self.tokens = dict.fromkeys(root.fork(width), 1)
        self.cache.step(dict.fromkeys(self.tokens, OWN)).commit()
        self.ids = list(range(width))
        self.buffers = PlanBuffers(self.cache, max_tokens=width)
        self.shape = self.cache._layer(0).plan_shape(torch.bfloat16)
        self.step: fa.Step | None = None
        self.turns = 0

    def open(self) -> None:
        """A fresh step; every 64 steps contexts go back to their length."""
        self.close()
        self.turns += 1
        if self.turns % 64 == 0:
            for branch in self.tokens:
                branch.crop(PREFIX + OWN)
        self.step = self.cache.step(self.tokens)

    def close(self) -> None:
        if self.step is not None and self.step.state == "open":
            self.step.commit()

    def plan(self) -> object:
        workers = self.cache.num_workers
        return plan_data(self.cache._core, None, self.shape, "sm_90", workers, resident=True)


def timed(
    benchmark: BenchmarkFixture, call: Callable[[], object], setup: Callable[[], None]
) -> None:
    benchmark.pedantic(call, setup=setup, **ROUNDS)


@WIDTHS
def test_whole(benchmark: BenchmarkFixture, width: int) -> None:
    """Reserve, plan, fill, stage and commit: all that `DecodeGraph` does beside checking tokens and
    the replay."""
    d = Decoding(width)

    def decode() -> None:
        with d.cache.step(d.tokens) as step:
            d.buffers.update(step, d.ids)

    def setup() -> None:
        d.open()
        d.close()

    timed(benchmark, decode, setup)
    assert d.buffers.num_tokens == width


@WIDTHS
def test_reserve_and_commit(benchmark: BenchmarkFixture, width: int) -> None:
    d = Decoding(width)

    def setup() -> None:
        d.open()
        d.close()

    timed(benchmark, lambda: d.cache.step(d.tokens).commit(), setup)


@WIDTHS
def test_plan(benchmark: BenchmarkFixture, width: int) -> None:
    """The plan of one kind of layer; blocks are those that the step before chose."""
    d = Decoding(width)
    timed(benchmark, d.plan, d.open)
    d.close()


@WIDTHS
def test_update(benchmark: BenchmarkFixture, width: int) -> None:
    """Plan, fill and stage."""
    d = Decoding(width)

    def update() -> None:
        assert d.step is not None
        d.buffers.update(d.step, d.ids)

    timed(benchmark, update, d.open)
    d.close()
    assert d.buffers.uploads == ROUNDS["rounds"] + ROUNDS["warmup_rounds"]


@WIDTHS
def test_fill(benchmark: BenchmarkFixture, width: int) -> None:
    """Positions, slots and last rows into a staging buffer."""
    d = Decoding(width)
    host = torch.zeros(3 * width, dtype=torch.int64)
    positions, slots, last = (host.data_ptr() + 8 * width * i for i in range(3))

    def fill() -> None:
        d.cache._core.fill_padded_step(positions, slots, last, width)

    timed(benchmark, fill, d.open)
    d.close()


@WIDTHS
def test_page_lists(benchmark: BenchmarkFixture, width: int) -> None:
    """What is new in page lists, into a staging buffer."""
    d = Decoding(width)
    host = torch.zeros(1 << 20, dtype=torch.uint8)

    def fill() -> None:
        News(d.cache._core, Layout()).fill(d.cache._core, host)

    timed(benchmark, fill, d.open)
    d.close()
