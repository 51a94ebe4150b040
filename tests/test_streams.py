"""Pages that other streams may still read are not reused before those finish: with fake streams, on
any machine. Real ones: tests/gpu."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cache_pair import CachePair
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from small_pair import BYTES, make, root_of
from test_state_machine import CacheMachine

from fork_attn import ForkedKVCache, OutOfPages


class FakeEvent:
    def __init__(self) -> None:
        self.done = False
        self.waited = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = self.waited = True


class FakeStream:
    def __init__(self) -> None:
        self.events: list[FakeEvent] = []

    def record_event(self) -> FakeEvent:
        self.events.append(FakeEvent())
        return self.events[-1]

    def finish(self) -> None:
        for event in self.events:
            event.done = True


def with_stream(num_pages: int = 8) -> tuple[CachePair, FakeStream]:
    pair = make(num_pages=num_pages)
    stream = FakeStream()
    pair.cache._streams.add(stream)
    return pair, stream


def pages(pair: CachePair) -> tuple[int, int, int]:
    stats = pair.cache.stats()
    return stats.pages_free, stats.pages_live, stats.pages_pending


def test_freed_pages_wait_for_the_stream() -> None:
    pair, stream = with_stream()
    root = root_of(pair, 12)
    pair.free(root)
    assert pages(pair) == (5, 0, 3)
    pair.check()
    other = pair.new_branch()
    with pytest.raises(OutOfPages, match=r"wait for other streams.*wait=True") as caught:
        pair.step({other: 24})
    assert (caught.value.needed, caught.value.free, caught.value.pending) == (6, 5, 3)
    stream.finish()
    pair.step({other: 24})
    assert pages(pair) == (2, 6, 0)
    pair.check()


def test_without_other_streams_pages_are_reusable_at_once() -> None:
    pair = make(num_pages=8)
    pair.free(root_of(pair, 12))
    assert pages(pair) == (8, 0, 0)


def test_wait_waits_only_as_long_as_it_must() -> None:
    pair, stream = with_stream()
    first, second = root_of(pair, 8), root_of(pair, 8)
    pair.free(first)
    pair.free(second)
    assert pages(pair) == (4, 0, 4) and len(stream.events) == 2
    branch = pair.new_branch()
    pair.wait = True
    pair.step({branch: 16})  # fits: nothing to wait for
    assert not any(event.waited for event in stream.events)
    pair.step({branch: 8})
    assert [event.waited for event in stream.events] == [True, False]
    pair.check()


def test_wait_does_not_wait_where_waiting_would_not_do() -> None:
    pair, stream = with_stream()
    pair.free(root_of(pair, 8))
    pair.wait = True
    with pytest.raises(OutOfPages, match="free or crop branches"):
        pair.step({pair.new_branch(): 9 * 4})
    assert not stream.events[0].waited and pages(pair) == (6, 0, 2)


def test_every_stream_must_have_finished() -> None:
    pair, first = with_stream()
    second = FakeStream()
    pair.cache._streams.add(second)
    pair.free(root_of(pair, 4))
    first.finish()
    assert pages(pair) == (7, 0, 1)
    second.finish()
    assert pages(pair) == (8, 0, 0)


def test_every_verb_that_frees_marks_its_pages() -> None:
    pair, stream = with_stream(40)

    def marked() -> bool:
        before = len(stream.events)
        verb()
        return len(stream.events) == before + 1

    root = root_of(pair, 16)
    verb = lambda: pair.crop(root, 4)  # noqa: E731
    assert marked()
    pair.step({root: 12})
    verb = lambda: pair.excise(root, 4, 8)  # noqa: E731
    assert marked()
    a, b = pair.fork(root, 2)
    pair.step({a: 4, b: 4})
    verb = lambda: pair.reorder([a, b], [0, 0])  # noqa: E731
    assert marked()
    pair.step({a: 4, b: 4})
    verb = lambda: pair.select(root, a)  # noqa: E731
    assert marked()
    step = pair.open({root: 9})
    verb = step.rollback
    assert marked()
    verb = lambda: pair.free(root)  # noqa: E731
    assert marked()
    other = root_of(pair, 4)
    pair.drop(other)
    del other
    verb = pair.cache.stats
    assert marked()
    assert pages(pair)[2] == sum(pages(pair)) - pages(pair)[0]


def test_a_copying_join_takes_pages_that_streams_are_done_with() -> None:
    pair, stream = with_stream()
    root = root_of(pair, 4)
    kids = pair.fork(root, 2)
    pair.step(dict.fromkeys(kids, 4))
    pair.free(root_of(pair, 20))
    with pytest.raises(OutOfPages) as caught:
        kids[0].join([kids[1]], rebase="copy")
    assert (caught.value.needed, caught.value.free, caught.value.pending) == (1, 0, 5)
    stream.finish()
    pair.join(kids[0], [kids[1]], rebase="copy")
    pair.check()


def test_a_stream_that_is_none_is_refused() -> None:
    cache = ForkedKVCache(num_layers=1, num_pages=4, num_q_heads=1, num_kv_heads=1, head_dim=8)
    with pytest.raises(TypeError, match=r"stream: expected a torch\.cuda\.Stream, got FakeStream"):
        cache.record_stream(FakeStream())  # type: ignore[arg-type]
    assert not cache._streams


class StreamsMachine(CacheMachine):
    """The machine of random operations with two other streams, which finish in random order."""

    def streams(self) -> list[FakeStream]:
        return self.pair.cache._streams._streams  # type: ignore[return-value]

    @precondition(lambda self: len(self.streams()) < 2)
    @rule()
    def announce(self) -> None:
        self.pair.cache._streams.add(FakeStream())

    @precondition(lambda self: self.streams())
    @rule(picks=st.lists(st.integers(0, 99), min_size=1, max_size=9))
    def finish_some(self, picks: list[int]) -> None:
        self.counts["pending"] += self.pair.cache.stats().pages_pending
        events = [e for stream in self.streams() for e in stream.events if not e.done]
        for i in picks:
            if events:
                events.pop(i % len(events)).done = True
        self.pair.cache.stats()  # polls

    @rule(wait=st.booleans())
    def wait_or_not(self, wait: bool) -> None:
        self.pair.wait = wait

    def finish_all(self) -> None:
        for stream in self.streams():
            stream.finish()


@pytest.mark.parametrize("tail", ["seal", "copy"])
def test_random_operations_with_other_streams(tail: str) -> None:
    counts: Counter[str] = Counter()
    options = {"tail": tail, "page_size": 3, "counts": counts}
    machine = type("Machine", (StreamsMachine,), options)
    while counts["operations"] < 2000:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=20,
                stateful_step_count=50,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    assert counts["out of pages"] > 10 and counts["pending"] > 0


def test_pending_pages_keep_their_bytes_until_the_stream_is_done() -> None:
    pair, stream = with_stream()
    root = root_of(pair, 8)
    slots = pair.slots(root)
    k_cache, _ = pair.cache.layer(0)
    before = k_cache.reshape(-1, BYTES.head_dim)[slots].clone()
    pair.free(root)
    pair.step({pair.new_branch(): 24})
    assert torch.equal(k_cache.reshape(-1, BYTES.head_dim)[slots], before)
    stream.finish()
    pair.step({pair.new_branch(): 8})
    assert not torch.equal(k_cache.reshape(-1, BYTES.head_dim)[slots], before)
