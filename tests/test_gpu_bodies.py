"""What tests/gpu runs on a card, on the CPU: the same bodies, without streams and graphs."""

from __future__ import annotations

import device_bodies as bodies
import pytest
import torch
from hf_twins import Twins

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = pytest.mark.parametrize("dtype", bodies.DTYPES, ids=str)


@pytest.mark.parametrize("slow", [(), (0,), (1,), (0, 1)], ids=str)
def test_freed_pages_wait_for_every_stream(slow: tuple[int, ...]) -> None:
    bodies.freed_pages_wait_for_every_stream("cpu", slow, own_is_slow=False)


def test_a_stream_that_is_not_announced_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The body above can fail: without the announcement the pages are reused at once."""
    monkeypatch.setattr(bodies.QueuedLane, "announce", lambda self, cache: None)
    with pytest.raises(AssertionError):
        bodies.freed_pages_wait_for_every_stream("cpu", (0,), own_is_slow=False)


def test_the_own_stream_waits_for_nothing() -> None:
    bodies.the_own_stream_waits_for_nothing("cpu")


@DTYPES
def test_steps_on_two_streams_are_those_on_one(dtype: torch.dtype) -> None:
    bodies.steps_on_two_streams_are_those_on_one("cpu", dtype)


@pytest.mark.parametrize("announced", [False, True])
def test_decoding_never_waits(announced: bool) -> None:
    bodies.decoding_never_waits("cpu", announced)


@DTYPES
def test_a_hundred_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    bodies.a_hundred_runs_give_the_same_bits("cpu", dtype)


@DTYPES
@pytest.mark.parametrize("tail", ["seal", "copy"])
def test_what_nobody_sees_is_nan(
    dtype: torch.dtype, tail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORK_ATTN_DEBUG", "poison")
    bodies.what_nobody_sees_is_nan("cpu", dtype, tail)


@DTYPES
@pytest.mark.parametrize("tail", ["seal", "copy"])
def test_one_step_serves_every_topology(dtype: torch.dtype, tail: str) -> None:
    bodies.one_captured_step_serves_every_topology("cpu", False, dtype, tail)


@DTYPES
def test_padding_touches_nothing(dtype: torch.dtype) -> None:
    bodies.padding_touches_nothing("cpu", False, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_decode_graph_at_half_precision(name: str, dtype: torch.dtype) -> None:
    Twins(name, dtype=dtype).live()
