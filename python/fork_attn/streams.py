"""Streams besides the cache's own: pages that their queued work may still read are not reused."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from fork_attn import _C


class Event(Protocol):
    """What is used of `torch.cuda.Event`."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Stream(Protocol):
    """What is used of `torch.cuda.Stream`."""

    def record_event(self) -> Event: ...


class OtherStreams:
    """The announced streams of one cache, and the events that pages freed so far wait for.

    A verb that freed pages is followed by `mark`, which records an event on every stream: work
    queued later cannot name those pages. `poll` gives back what the events have passed, without
    waiting. In the core, pages freed between two marks are one epoch.
    """

    def __init__(self, core: _C.CacheCore, device: torch.device) -> None:
        self._core = core
        self._device = device
        cuda = device.type == "cuda"
        self._own = torch.cuda.current_stream(device) if cuda else None  # the cache's
        self._streams: list[Stream] = []
        self._epochs: deque[tuple[int, list[Event]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._streams)

    def __contains__(self, stream: object) -> bool:
        return stream in self._streams

    def announce(self, stream: torch.cuda.Stream) -> bool:
        """Checks a stream and adds it; False for the cache's own, which needs no care.

        Raises:
            TypeError, ValueError: not a CUDA stream of the cache's device.
        """
        if not isinstance(stream, torch.cuda.Stream):
            raise TypeError(f"stream: expected a torch.cuda.Stream, got {type(stream).__name__}")
        if stream.device != self._device:
            raise ValueError(f"stream: expected one of {self._device}, got one of {stream.device}")
        if stream == self._own:
            return False
        self.add(stream)
        return True

    def require_current(self) -> None:
        """Raises ValueError unless the current stream is the cache's own or an announced one."""
        if self._own is None:
            return
        stream = torch.cuda.current_stream(self._device)
        if stream != self._own and stream not in self._streams:
            raise ValueError(
                f"step: expected the cache's own stream {self._own} or one announced by "
                f"record_stream, got {stream}"
            )

    def add(self, stream: Stream) -> None:
        """Announces a stream, once and for all."""
        if stream not in self._streams:
            self._core.defer_frees()
            self._streams.append(stream)

    def mark(self) -> None:
        """Closes the epoch of the pages that were freed since the last mark, if any."""
        epoch = self._core.close_epoch()
        if epoch:
            self._epochs.append((epoch, [stream.record_event() for stream in self._streams]))

    def poll(self) -> None:
        """Makes pages reusable whose events have all passed. Never waits."""
        self.mark()
        for _ in range(len(self._epochs)):
            epoch, events = self._epochs.popleft()
            if all(event.query() for event in events):
                self._core.end_epoch(epoch)
            else:
                self._epochs.append((epoch, events))

    def wait(self, pages: int) -> None:
        """Waits, oldest epoch first, until that many pages became reusable or none is pending."""
        while pages > 0 and self._epochs:
            epoch, events = self._epochs[0]
            for event in events:
                event.synchronize()
            self._epochs.popleft()
            pages -= self._core.end_epoch(epoch)
