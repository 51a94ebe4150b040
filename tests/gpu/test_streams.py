"""What queued work of other streams still reads, pages and page lists, is not reused: with a kernel
that delays."""

from __future__ import annotations

import device_bodies as bodies
import pytest
import stream_bodies
import torch

DTYPES = pytest.mark.parametrize("dtype", bodies.DTYPES, ids=str)


@pytest.mark.parametrize("own_is_slow", [False, True], ids=["", "own"])
@pytest.mark.parametrize("slow", [(), (0,), (1,), (0, 1)], ids=str)
def test_freed_pages_wait_for_every_stream(slow: tuple[int, ...], own_is_slow: bool) -> None:
    bodies.freed_pages_wait_for_every_stream("cuda", slow, own_is_slow)


def test_the_own_stream_waits_for_nothing() -> None:
    bodies.the_own_stream_waits_for_nothing("cuda")


@DTYPES
def test_steps_on_two_streams_are_those_on_one(dtype: torch.dtype) -> None:
    bodies.steps_on_two_streams_are_those_on_one("cuda", dtype)


def test_a_stream_that_was_not_announced_is_refused() -> None:
    cache = bodies.small_cache("cuda")
    root = cache.new_branch()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), pytest.raises(ValueError, match="one announced by"):
        cache.step({root: 1})
    cache.record_stream(stream)
    with torch.cuda.stream(stream):
        bodies.write(cache, root, 1, 1.0)
    torch.cuda.synchronize()
    cache.check()


@pytest.mark.parametrize("opened_there", [True, False], ids=["", "opened on the own stream"])
@pytest.mark.parametrize("way", stream_bodies.WAYS)
@pytest.mark.parametrize("verb", stream_bodies.VERBS)
def test_what_queued_attention_reads_outlives(verb: str, way: str, opened_there: bool) -> None:
    stream_bodies.what_queued_attention_reads_outlives("cuda", way, verb, opened_there)


@pytest.mark.parametrize("way", stream_bodies.WAYS)
def test_streams_step_branches_of_their_own(way: str) -> None:
    steps = stream_bodies.QueuedSteps("cuda", way, num_pages=200)
    others = [bodies.CudaLane() for _ in range(2)]
    seed = int(torch.randint(2**31, ()))
    stream_bodies.streams_step_branches_of_their_own(steps, None, others, 60, seed)
