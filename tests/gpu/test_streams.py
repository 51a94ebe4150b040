"""Pages that queued work of other streams still reads are not reused: with a kernel that delays."""

from __future__ import annotations

import device_bodies as bodies
import pytest
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
