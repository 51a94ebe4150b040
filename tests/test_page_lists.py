"""What queued attention of other streams reads, page lists included, is not written over.

On the CPU, with streams that are queues; by the Triton kernel: tests/triton_interpreter; on a card:
tests/gpu."""

from __future__ import annotations

import device_bodies
import pytest
import stream_bodies as bodies
import torch
from queued_streams import QueuedDevice

from fork_attn.plan_buffers import PlanBuffers
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


def churned(announced: bool) -> int:
    """The size of the page lists' array after branches came and went."""
    steps = bodies.QueuedSteps("cpu", "step")
    cache = steps.pair.cache
    if announced:
        (lane,) = device_bodies.lanes("cpu", 1)
        lane.announce(cache)
        lane.delay()
        lane.run(lambda: None)
    for _ in range(20):
        branch = steps.pair.new_branch()
        steps.step(None, {branch: 9})
        steps.pair.free(branch)
    return cache._core.arena_news()[0]


def test_places_of_page_lists_are_reusable_at_once_without_other_streams() -> None:
    assert churned(announced=False) == 4
    assert churned(announced=True) == 4 * 20


@pytest.mark.parametrize("announced_first", [True, False])
def test_what_a_step_has_on_the_device_is_recorded(
    announced_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = bodies.QueuedSteps("cpu", "step")
    cache = steps.pair.cache
    device = QueuedDevice(monkeypatch, cache)
    stream = device.Stream(cache.device)
    if announced_first:
        stream.announce(cache)
    with cache.step({steps.pair.new_branch(): 3}) as step:
        plan = step.plan
        if not announced_first:
            assert not device.kept
            stream.announce(cache)
        held = [step.slot_mapping, step.seqlens_k, cache._page_lists.pages]
        (work,) = plan.launches[cache.device].workspaces.values()
        held += [plan.launches[cache.device].buffer, work.partial_out, work.counters]
        kept = {(tensor.data_ptr(), tensor.shape) for tensor in device.kept}
        assert all((tensor.data_ptr(), tensor.shape) in kept for tensor in held)
        step.rollback()


def test_what_plan_buffers_have_on_the_device_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = bodies.QueuedSteps("cpu", "buffers")
    device = QueuedDevice(monkeypatch, steps.pair.cache)
    stream = device.Stream(steps.pair.cache.device)
    buffers = PlanBuffers(steps.pair.cache, max_tokens=4)
    stream.announce(steps.pair.cache)
    with stream.use(), steps.pair.open({steps.pair.new_branch(): 3}) as step:
        buffers.update(step)
        step.rollback()
    kept = {tensor.data_ptr() for tensor in device.kept}
    held = [buffers._block, *buffers._plans.values(), buffers._rotations._where]
    assert all(tensor.data_ptr() in kept for tensor in held)


def test_a_copying_join_needs_a_known_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = bodies.QueuedSteps("cpu", "step").pair
    device = QueuedDevice(monkeypatch, pair.cache)
    root, child = pair.new_branch(), pair.new_branch()
    with device.Stream(pair.cache.device).use(), pytest.raises(ValueError, match="join: expected"):
        root.join([child], rebase="copy")
    assert child.alive


def test_an_announced_stream_begins_behind_the_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was freed before may be taken by its first step, or copying join."""
    pair = bodies.QueuedSteps("cpu", "step").pair
    device = QueuedDevice(monkeypatch, pair.cache)
    device.own.run(lambda: None)
    stream = device.Stream(pair.cache.device)
    stream.announce(pair.cache)
    stream.finish()
    assert device.own.done == 1
