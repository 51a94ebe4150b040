"""Streams besides the cache's own: what their queued work may still read is not reused."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


_NOTHING = nullcontext()


class OtherStreams:
    """The announced streams of one cache, and the events that what was freed so far waits for.

    A verb that freed pages, or places of page lists, is followed by `mark`, which records an event
    on every stream: work queued later cannot name those. `poll` gives back what the events have
    passed, without waiting. In the core, what is freed between two marks is one epoch.

    Page lists are written on a stream of their own (`uploading`), as all streams read them: one
    that steps then waits for uploads, and for nothing that another one computes.
    """

    def __init__(self, core: _C.CacheCore, device: torch.device) -> None:
        self._core = core
        self._device = device
        cuda = device.type == "cuda"
        self._own = torch.cuda.current_stream(device) if cuda else None  # the cache's
        self._streams: list[Stream] = []
        self._uploads: torch.cuda.Stream | None = None  # made with the first announcement
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
        if self._own is None or stream == self._own:
            return False
        # What was freed before anything was kept for this stream is free behind the own one only.
        stream.wait_stream(self._own)
        self.add(stream)
        return True

    @property
    def known(self) -> list[Stream]:
        """All whose work may use pages: the announced ones, and the own one, since what it reads
        may be taken and written by a step on another."""
        return self._streams if self._own is None else [self._own, *self._streams]

    def require_current(self, verb: str) -> None:
        """Raises ValueError unless the current stream is the cache's own or an announced one."""
        if self._own is None:
            return
        stream = torch.cuda.current_stream(self._device)
        if stream != self._own and stream not in self._streams:
            raise ValueError(
                f"{verb}: expected the cache's own stream {self._own} or one announced by "
                f"record_stream, got {stream}"
            )

    def add(self, stream: Stream) -> None:
        """Announces a stream, once and for all."""
        if stream in self._streams:
            return
        if self._own is not None and self._uploads is None:
            self._uploads = torch.cuda.Stream(self._device, priority=-1)
            self._uploads.wait_stream(self._own)
        self._core.defer_frees()
        self._streams.append(stream)

    def uploading(self) -> AbstractContextManager[None]:
        """Where page lists are written: inside, the stream for that is current; behind, the stream
        that was current has waited for it. Nothing happens where no stream is announced."""
        return _NOTHING if self._uploads is None else self._switched(self._uploads)

    @contextmanager
    def _switched(self, uploads: torch.cuda.Stream) -> Iterator[None]:
        here = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(uploads):
            yield
        here.wait_stream(uploads)

    def record(self, *tensors: torch.Tensor) -> None:
        """The memory of tensors, once they are gone, outlives what is queued on any stream of the
        cache. Nothing happens where no stream is announced."""
        if self._uploads is None:
            return
        for tensor in tensors:
            for stream in (*self.known, self._uploads):
                tensor.record_stream(stream)  # type: ignore[arg-type]

    def mark(self) -> None:
        """Closes the epoch of what was freed since the last mark, if anything was."""
        epoch = self._core.close_epoch()
        if epoch:
            self._epochs.append((epoch, [stream.record_event() for stream in self.known]))

    def poll(self) -> None:
        """Makes reusable what all events of its epoch have passed. Never waits."""
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
