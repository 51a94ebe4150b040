"""The suite's timing, of what a GPU would do, on stand-ins."""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from fork_attn.bench import timing


class FakeGraph:
    replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1


class FakeStream:
    def wait_stream(self, other: object) -> None:
        pass


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_counts_are_whole_and_above_0(text: str) -> None:
    assert timing.count("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="a whole number above 0"):
        timing.count(text)


def test_a_graph_keeps_the_tensors_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph owns what is allocated inside it, and nothing that was there before."""
    for name, fake in {
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "CUDAGraph": FakeGraph,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    class Query:
        pass

    def make() -> tuple[Any, weakref.ref[Query]]:
        q = Query()
        return timing.graphed(lambda: q), weakref.ref(q)

    replay, q = make()
    gc.collect()
    assert q() is not None
    replay()
    assert FakeGraph.replays == 1
    del replay
    gc.collect()
    assert q() is None


class Events:
    """Stands for a GPU: notes in which order the host asks it for what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        note = self.asked.append

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                note("event")

            def synchronize(self) -> None:
                note("wait")

            def elapsed_time(self, end: object) -> float:
                return 1.0

        class Flush:
            def zero_(self) -> None:
                note("flush")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: note("pause"))
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Flush())


TIMER = timing.Timer(torch.device("cuda"), 0.0, 2, 2)


def test_a_warm_call_follows_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Events(monkeypatch).asked
    calls = {name: (lambda name=name: asked.append(name)) for name in "ab"}
    times = TIMER.measure(calls, warm=True)
    one = "pause {0} event {0} event wait "
    expected = "a b " + "".join(one.format(name) for name in "abba")
    assert " ".join(asked) == expected.strip()
    assert times["a"].median == 1e-3


def test_a_cold_call_is_launched_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Events(monkeypatch).asked
    TIMER.measure({"a": lambda: asked.append("a")}, cold=True)
    assert asked[1:7] == ["flush", "pause", "event", "a", "event", "wait"]
    asked.clear()
    TIMER.measure({"a": lambda: asked.append("a")})
    assert asked[1:5] == ["event", "a", "event", "wait"]


def test_calls_far_from_the_fastest_are_left_out_once_the_seconds_are_spent() -> None:
    def run(seconds: float) -> dict[str, int]:
        order.clear()
        calls = {
            name: (lambda name=name, seconds=s: (order.append(name), time.sleep(seconds)))
            for name, s in (("fast", 0.004), ("near", 0.005), ("far", 0.02))
        }
        timer = timing.Timer(torch.device("cpu"), seconds, 7, 8, far_rounds=3, warm_up=False)
        return {name: times.rounds for name, times in timer.measure(calls).items()}

    order: list[str] = []
    assert run(0.0) == {"fast": 7, "near": 7, "far": 3}
    # In turn to the end: each of those left goes first in its round.
    assert order[9:] == ["near", "fast", "fast", "near"] * 2
    assert run(60.0) == {"fast": 8, "near": 8, "far": 8}


def test_on_a_cpu_each_round_is_one_call() -> None:
    calls: list[str] = []
    timer = timing.Timer(torch.device("cpu"), 0.0, 3, 3)
    for options in ({}, {"cold": True}, {"warm": True}):
        calls.clear()
        timer.measure({"a": lambda: calls.append("a")}, **options)
        assert len(calls) == 1 + 3
    calls.clear()
    times = replace(timer, warm_up=False).host({"a": lambda: calls.append("a")})
    assert len(calls) == 3 == times["a"].rounds


def test_a_call_that_raises_is_named() -> None:
    def broken() -> None:
        raise OSError("no")

    with pytest.raises(timing.CallFailed, match="b: OSError: no") as caught:
        timing.Timer(torch.device("cpu"), 0.0).measure({"a": list, "b": broken})
    assert caught.value.name == "b" and isinstance(caught.value.__cause__, OSError)
