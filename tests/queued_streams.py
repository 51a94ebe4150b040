"""CUDA streams on the CPU, as far as a cache uses them: what is put on one runs, in order, once
somebody waits for it. So a wait that is missing shows as a wrong result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import pytest
import torch
from device_bodies import QueuedLane
from torch import Tensor

import fork_attn as fa
from fork_attn.staging import RING, PageLists, Staging
from fork_attn.streams import OtherStreams


class QueuedStream(QueuedLane):
    """One of a device's, that is as slow as it may be."""

    machine: QueuedDevice

    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        super().__init__()
        self.slow = True
        self.device = device

    def wait_stream(self, other: QueuedStream) -> None:
        end = len(other.queue)
        self.queue.append(lambda: other.work_until(end))

    def announce(self, cache: fa.ForkedKVCache) -> None:
        cache.record_stream(self)  # type: ignore[arg-type]

    @contextmanager
    def use(self) -> Iterator[None]:
        before, self.machine.current = self.machine.current, self
        yield
        self.machine.current = before


class QueuedDevice:
    """Makes a cache on the CPU believe that it has CUDA streams.

    Attributes:
        Stream: what `torch.cuda.Stream` is meanwhile.
        own: the cache's.
        kept: what was recorded to outlive the work of streams.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: fa.ForkedKVCache) -> None:
        self.Stream = type("Stream", (QueuedStream,), {"machine": self})
        self.own = self.current = self.Stream(cache.device)
        self.kept: list[Tensor] = []
        cache._streams._own = self.own
        patch = monkeypatch.setattr
        patch(torch.cuda, "Stream", self.Stream)
        patch(torch.cuda, "current_stream", lambda device: self.current)
        patch(torch.cuda, "stream", lambda stream: stream.use())
        patch(OtherStreams, "record", self._record())
        patch(Staging, "send", self._send())
        patch(PageLists, "apply", self._apply(PageLists.apply))
        patch(PageLists, "reserve", self._reserve())

    def _record(self) -> Callable[..., None]:
        def record(streams: OtherStreams, *tensors: Tensor) -> None:
            if streams:
                self.kept.extend(tensors)

        return record

    def _apply(self, method: Callable[..., None]) -> Callable[..., None]:
        def apply(lists: PageLists, *args: Any) -> None:
            lists = copy(lists)  # of these pages, whatever becomes of them until then
            self.current.queue.append(lambda: method(lists, *args))

        return apply

    def _send(self) -> Callable[[Staging, int, Tensor], None]:
        def send(staging: Staging, num_bytes: int, target: Tensor) -> None:
            host = staging._buffers[staging._next][:num_bytes].clone()
            staging._next = (staging._next + 1) % RING
            self.current.queue.append(lambda: target[:num_bytes].copy_(host))

        return send

    def _reserve(self) -> Callable[[PageLists, int], None]:
        def reserve(lists: PageLists, size: int) -> None:
            before = lists.pages
            if size > len(before):
                lists.pages = larger = before.new_zeros(max(size, 2 * len(before)))
                self.current.queue.append(lambda: larger[: len(before)].copy_(before))

        return reserve
