"""Tree attention of steps on several streams, over page lists that stay on the device: nothing that
is queued is written over. Streams are queues here."""

from __future__ import annotations

import pytest
import stream_bodies as bodies
import torch
from queued_streams import QueuedDevice

from fork_attn.staging import PageLists


def test_what_queued_attention_reads_outlives() -> None:
    bodies.what_queued_attention_reads_outlives("cpu", "step", "free", opened_there=False)


def test_streams_step_branches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = bodies.QueuedSteps("cpu", "step", num_pages=200)
    cache = steps.pair.cache
    cache._lists = PageLists(cache._core, cache.device, 16)
    device = QueuedDevice(monkeypatch, cache)
    others = [device.Stream(cache.device) for _ in range(2)]
    seed = int(torch.randint(2**31, ()))
    bodies.streams_step_branches_of_their_own(steps, device.own, others, 10, seed)
