"""What must hold on a GPU, written once: tests/gpu runs it there, tests/test_gpu_bodies.py on the
CPU, so that these are known to be correct programs before there is a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import pytest
import torch
from cache_pair import CachePair
from captured_pair import Captured
from kv_table import Model

import fork_attn as fa
from fork_attn import Draft, OutOfPages

SLEEP_CYCLES = 400_000_000  # a fifth of a second or more, and the host needs a few milliseconds
DTYPES = (torch.float32, torch.bfloat16)


# --- streams


class Lane(Protocol):
    """A stream beside the cache's own."""

    def announce(self, cache: fa.ForkedKVCache) -> None: ...
    def delay(self) -> None: ...
    def run(self, work: Callable[[], object]) -> None: ...
    def use(self) -> Any: ...
    def finish(self) -> None: ...


class CudaLane:
    """A real one; what runs there waits for what the current stream has queued."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def announce(self, cache: fa.ForkedKVCache) -> None:
        cache.record_stream(self.stream)

    def delay(self) -> None:
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(SLEEP_CYCLES)

    def run(self, work: Callable[[], object]) -> None:
        with self.use():
            work()

    @contextmanager
    def use(self) -> Iterator[None]:
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            yield

    def finish(self) -> None:
        self.stream.synchronize()


class QueuedLane:
    """Work on the CPU that runs in order once somebody waits for it, or at once before a delay."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.done = 0
        self.slow = False

    def announce(self, cache: fa.ForkedKVCache) -> None:
        cache._streams.add(self)

    def delay(self) -> None:
        self.slow = True

    def run(self, work: Callable[[], object]) -> None:
        self.queue.append(work)
        if not self.slow:
            self.work_until(len(self.queue))

    def use(self) -> Any:
        return nullcontext()

    def finish(self) -> None:
        self.work_until(len(self.queue))

    def work_until(self, end: int) -> None:
        while self.done < end:
            self.queue[self.done]()
            self.done += 1

    def record_event(self) -> QueuedEvent:
        return QueuedEvent(self, len(self.queue))


class QueuedEvent:
    def __init__(self, lane: QueuedLane, at: int) -> None:
        self.lane, self.at = lane, at

    def query(self) -> bool:
        return self.lane.done >= self.at

    def synchronize(self) -> None:
        self.lane.work_until(self.at)


def lanes(device: str, count: int) -> list[Lane]:
    return [CudaLane() if device == "cuda" else QueuedLane() for _ in range(count)]


def delay_own_stream(device: str) -> None:
    if device == "cuda":
        torch.cuda._sleep(SLEEP_CYCLES)


def small_cache(device: str) -> fa.ForkedKVCache:
    """8 pages of 4 slots."""
    return fa.ForkedKVCache(
        num_layers=1,
        num_pages=8,
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=8,
        page_size=4,
        dtype=torch.float32,
        device=device,
    )


def write(
    cache: fa.ForkedKVCache, branch: fa.Branch, tokens: int, value: float, wait: bool = False
) -> torch.Tensor:
    """Stores that value in a branch's next slots; returns the slots."""
    k = torch.full((tokens, 1, 8), value, device=cache.device)
    with cache.step({branch: tokens}, wait=wait) as step:
        torch.ops.fork_attn.store_kv(k, k, *cache.layer(0), step.slot_mapping)
        return step.slot_mapping


def reader(cache: fa.ForkedKVCache, slots: torch.Tensor) -> tuple[torch.Tensor, Callable[[], Any]]:
    """Where the K of those slots goes, and what reads it there."""
    out = torch.zeros(len(slots), 1, 8, device=cache.device)
    k_cache, _ = cache.layer(0)
    return out, lambda: out.copy_(k_cache[slots // 4, slots % 4])


def freed_pages_wait_for_every_stream(device: str, slow: Sequence[int], own_is_slow: bool) -> None:
    """Two streams read pages that are freed meanwhile; those in `slow` are behind a delay."""
    cache = small_cache(device)
    others = lanes(device, 2)
    for lane in others:
        lane.announce(cache)
    root = cache.new_branch()
    if own_is_slow:
        delay_own_stream(device)
    slots = write(cache, root, 16, 1.0)
    outs = []
    for index, lane in enumerate(others):
        if index in slow:
            lane.delay()
        out, read = reader(cache, slots)
        outs.append(out)
        lane.run(read)
    root.free()
    other = cache.new_branch()
    write(cache, other, 16, 2.0)  # the other half of the pool
    if slow or own_is_slow:  # the streams are behind the own one
        assert cache.stats().pages_pending == 4
        with pytest.raises(OutOfPages, match="wait=True") as caught:
            cache.step({other: 4})
        assert (caught.value.free, caught.value.pending) == (0, 4)
    write(cache, other, 16, 3.0, wait=True)
    assert cache.stats().pages_pending == 0
    for lane in others:
        lane.finish()
    for out in outs:
        assert bool((out == 1.0).all()), "a page was written while a stream still read it"
    k_cache, _ = cache.layer(0)
    assert sorted(k_cache.flatten().unique().tolist()) == [2.0, 3.0]
    cache.check()


def the_own_stream_waits_for_nothing(device: str) -> None:
    cache = small_cache(device)
    root = cache.new_branch()
    delay_own_stream(device)
    slots = write(cache, root, 32, 1.0)
    out, read = reader(cache, slots)
    read()
    root.free()
    assert cache.stats().pages_pending == 0
    write(cache, cache.new_branch(), 32, 2.0)
    assert bool((out == 1.0).all())
    assert bool((cache.layer(0)[0] == 2.0).all())


def steps_on_two_streams_are_those_on_one(device: str, dtype: torch.dtype) -> None:
    """Steps go back and forth between the own stream and an announced one."""
    outs = []
    for use_two in (False, True):
        torch.manual_seed(1)
        cache = decode_cache(device, dtype)
        lane = lanes(device, 1)[0]
        if use_two:
            lane.announce(cache)
        kids, rows = grown(cache), []
        for turn in range(6):
            tokens = dict.fromkeys(kids, 1)
            inputs = random_inputs(cache, len(kids))
            where = lane.use() if use_two and turn % 2 else nullcontext()
            with where, cache.step(tokens) as step:
                rows.append([cache.attend(i, *inputs, step) for i in range(cache.num_layers)])
            if device == "cuda" and use_two:
                torch.cuda.current_stream().wait_stream(lane.stream)  # type: ignore[attr-defined]
        lane.finish()
        outs.append(torch.stack([out for row in rows for out in row]))
    assert torch.equal(*outs) and bool(outs[0].isfinite().all())


# --- attention


def decode_cache(device: str, dtype: torch.dtype = torch.bfloat16) -> fa.ForkedKVCache:
    return fa.ForkedKVCache(
        num_layers=3,
        num_pages=400,
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        sliding_window=[None, 40, None],
        page_size=16,
        dtype=dtype,
        device=device,
        rope=fa.Rope.from_base(64),
    )


def random_inputs(cache: fa.ForkedKVCache, tokens: int) -> list[torch.Tensor]:
    return [
        torch.randn(tokens, heads, 64, device=cache.device).to(cache.dtype) for heads in (8, 2, 2)
    ]


def decode(cache: fa.ForkedKVCache, tokens: dict[fa.Branch, int]) -> list[torch.Tensor]:
    """One step, all layers on the same rows."""
    inputs = random_inputs(cache, sum(tokens.values()))
    with cache.step(tokens) as step:
        return [cache.attend(i, *inputs, step) for i in range(cache.num_layers)]


def grown(cache: fa.ForkedKVCache) -> list[fa.Branch]:
    """A prefix of 300 tokens, 3 nodes of 70 and 12 leaves of 5."""
    root = cache.new_branch()
    decode(cache, {root: 300})
    nodes = root.fork(3)
    decode(cache, dict.fromkeys(nodes, 70))
    leaves = [leaf for node in nodes for leaf in node.fork(4)]
    decode(cache, dict.fromkeys(leaves, 5))
    return leaves


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    """An operation of torch that waits for the GPU raises inside."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def decoding_never_waits(device: str, announced: bool = False) -> None:
    """Steps, attention, forks, joins, crops and frees stay asynchronous; one upload a step."""
    cache = decode_cache(device)
    if announced:
        lanes(device, 1)[0].announce(cache)
    kids = grown(cache)
    for _ in range(2):
        decode(cache, dict.fromkeys(kids, 1))
    outs = []
    with no_synchronisation(device):
        for turn in range(40):  # beyond the ends of pages
            before = cache._staging.uploads
            outs += decode(cache, dict.fromkeys(kids, 1))
            if cache._resident:
                assert cache._staging.uploads == before + 1
            if turn == 10:
                kids += kids[0].fork(3)
            if turn == 20:
                kids[5].crop(350)
                cache.free([kids.pop(), kids.pop(2)])
            if turn == 30:
                kids[1].join([kids.pop(), kids.pop()])
                kids[1].join([kids.pop()], rebase="copy")
                with cache._streams.uploading():
                    cache._page_lists.reserve(2 * len(cache._page_lists.pages))
    assert all(bool(out.isfinite().all()) for out in outs)
    cache.check()


def a_hundred_runs_give_the_same_bits(device: str, dtype: torch.dtype) -> None:
    cache = decode_cache(device, dtype)
    kids = grown(cache)
    inputs = random_inputs(cache, len(kids))
    with cache.step(dict.fromkeys(kids, 1)) as step:
        first = [cache.attend(i, *inputs, step) for i in range(cache.num_layers)]
        for _ in range(100):
            for i, out in enumerate(first):
                assert torch.equal(cache.attend(i, *inputs, step), out)


def what_nobody_sees_is_nan(device: str, dtype: torch.dtype, tail: str) -> None:
    """Random verbs and steps over poisoned memory, against the oracle. FORK_ATTN_DEBUG=poison is
    set by the test."""
    pair = device_pair(device, dtype, tail)
    assert pair.cache._books._scrub is not None
    root = pair.new_branch()
    pair.step({root: 11}, attend=True)
    kids = pair.fork(root, 4)
    pair.step(dict.fromkeys(kids, 2), attend=True)
    pair.step({kids[0]: 1, kids[1]: Draft([-1, 0, 0, 1])}, {kids[1]: [0, 1]}, attend=True)
    pair.check()
    pair.crop(kids[2], 9)
    pair.join(kids[0], [kids[2], kids[3]])
    pair.free(root)
    pair.step({kids[0]: 5, kids[1]: 1}, attend=True)
    pair.check()
    pair.assert_precise()


# --- graphs


def device_pair(device: str, dtype: torch.dtype, tail: str, num_pages: int = 60) -> CachePair:
    model = Model(num_q_heads=4, num_kv_heads=2, head_dim=16, dtype=dtype)
    return CachePair(model, num_pages=num_pages, page_size=3, tail=tail, device=device)  # type: ignore[arg-type]


def one_captured_step_serves_every_topology(
    device: str, capture: bool, dtype: torch.dtype, tail: str
) -> None:
    """Growth, forks, joins, drafts, frees and crops; widths that shrink and grow."""
    pair = device_pair(device, dtype, tail)
    captured = Captured(pair, capture=capture)
    root = pair.new_branch()
    captured.step({root: 10})
    kids = pair.fork(root, 5)
    captured.step(dict.fromkeys(kids, 2))
    captured.step({kids[0]: 1})
    captured.step({kids[1]: Draft([-1, 0, 0]), kids[2]: 1}, {kids[1]: [0, 2]})
    pair.join(kids[0], kids[1:3])
    captured.step({kids[0]: 3, kids[3]: 1})
    pair.free(kids[3])
    more = pair.fork(kids[4], 6)
    captured.step(dict.fromkeys([kids[4], root, *more], 3))
    pair.crop(root, 5)
    pair.step({root: 2}, attend=True)  # an ordinary step in between
    for _ in range(8):
        captured.step(dict.fromkeys([root, *more], 1))
    pair.free(*more)
    captured.step({root: 9, kids[4]: 1})


def padding_touches_nothing(device: str, capture: bool, dtype: torch.dtype) -> None:
    """Rows beyond a step's hold finite numbers, and no slot but the step's own is written."""
    pair = device_pair(device, dtype, "seal")
    captured = Captured(pair, capture=capture, padding=7.0)
    root = pair.new_branch()
    captured.step({root: 20})
    kids = pair.fork(root, 3)
    for count in (6, 1, 2):
        step = pair.open(dict.fromkeys(kids, count))
        with step:
            captured.buffers.update(step)
            written = torch.zeros(60 * 3, dtype=torch.bool)
            written[step.slot_mapping.cpu()] = True
            for branch in pair.ids:
                written[torch.tensor(pair.slots(branch))] = True
            before = [c.cpu().clone() for i in (0, 1) for c in pair.cache.layer(i)]
            captured.replay()
            after = [c.cpu() for i in (0, 1) for c in pair.cache.layer(i)]
            for old, new in zip(before, after, strict=True):
                hidden = ~written.view(60, 3)
                assert bool(new[hidden].isnan().all()) and bool(old[hidden].isnan().all())
                changed = torch.zeros_like(hidden)
                changed.view(-1)[step.slot_mapping.cpu()] = True
                assert torch.equal(new[~changed & ~hidden], old[~changed & ~hidden])
            step.rollback()
        pair.check()
