"""The suite's timing, of what a GPU would do, on stand-ins."""

from __future__ import annotations

import contextlib
import gc
import weakref
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
