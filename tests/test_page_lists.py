"""What queued attention of other streams reads, page lists included, is not written over: on the CPU,
with streams that are queues. By the Triton kernel: tests/triton_interpreter; on a card: tests/gpu."""

from __future__ import annotations

import device_bodies
import pytest
import stream_bodies as bodies
import torch
from queued_streams import QueuedDevice

from fork_attn.staging import PageLists

pytestmark = pytest.mark.usefixtures("one_thread")
WAYS = pytest.mark.parametrize("way", bodies.WAYS)


@WAYS
@pytest.mark.parametrize("verb", bodies.VERBS)
def test_what_queued_attention_reads_outlives(verb: str, way: str) -> None:
    bodies.what_queued_attention_reads_outlives("cpu", way, verb, opened_there=True)


@WAYS
def test_a_stream_that_is_not_announced_shows(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body above can fail."""
    monkeypatch.setattr(device_bodies.QueuedLane, "announce", lambda self, cache: None)
    with pytest.raises(AssertionError):
        bodies.what_queued_attention_reads_outlives("cpu", way, "growth", opened_there=True)


@WAYS
def test_streams_step_branches_of_their_own(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose streams, the own one and that of uploads too, run as late as they may."""
    seed = int(torch.randint(2**31, ()))
    for i in range(20):
        with monkeypatch.context() as patch:
            steps = bodies.QueuedSteps("cpu", way, num_pages=200)
            cache = steps.pair.cache
            if way == "step":  # lists outgrow their array on the way
                cache._lists = PageLists(cache._core, cache.device, 16)
            device = QueuedDevice(patch, cache)
            others = [device.Stream(cache.device) for _ in range(2)]
            bodies.streams_step_branches_of_their_own(steps, device.own, others, 60, seed + i)
        kept = {tensor.data_ptr() for tensor in device.kept}
        assert cache._page_lists.pages.data_ptr() in kept
