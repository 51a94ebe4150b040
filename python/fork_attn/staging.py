"""From the host's books to a device: a ring of pinned buffers, one copy an upload; and the page
lists that stay on the device.

Nothing here waits for the device, but for one case: a ring whose buffers are all still being
copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fork_attn import _C

RING = 4
_ALIGNMENT = 64


class Layout:
    """Arrays laid one behind the other, each on a multiple of 8 bytes."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def add(self, count: int, itemsize: int) -> slice:
        """The bytes of `count` items."""
        begin = self.num_bytes
        end = begin + count * itemsize
        self.num_bytes = (end + 7) // 8 * 8
        return slice(begin, end)


class Staging:
    """Buffers in host memory that are filled and copied to a device in turn.

    Attributes:
        uploads, num_bytes: copies so far, and their bytes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._buffers: list[Tensor] = []
        self._events: list[torch.cuda.Event | None] = [None] * RING
        self._next = 0
        self._capacity = 0
        self.uploads = 0
        self.num_bytes = 0

    def buffer(self, num_bytes: int) -> Tensor:
        """(at least num_bytes,) uint8 to fill and `send`; its last copy has been made."""
        if num_bytes > self._capacity:
            # Pinned memory returns to torch's allocator, which waits for copies that still read it.
            self._capacity = max(2 * self._capacity, -(-num_bytes // _ALIGNMENT) * _ALIGNMENT)
            self._buffers = [
                torch.empty(self._capacity, dtype=torch.uint8, pin_memory=self._on_gpu)
                for _ in range(RING)
            ]
            self._events = [None] * RING
        event = self._events[self._next]
        if event is not None:
            event.synchronize()
        return self._buffers[self._next]

    def send(self, num_bytes: int, target: Tensor) -> None:
        """Copies the buffer's first bytes to those of `target`, uint8, on the current stream."""
        target[:num_bytes].copy_(self._buffers[self._next][:num_bytes], non_blocking=True)
        if self._on_gpu:
            event = self._events[self._next] or torch.cuda.Event()
            event.record(torch.cuda.current_stream(target.device))
            self._events[self._next] = event
        self._next = (self._next + 1) % RING
        self.uploads += 1
        self.num_bytes += num_bytes


class News:
    """What the device does not know yet of page lists: new entries, and lists that moved.

    In a buffer, int32: where (n,), moves (m, 3), pages (n,).
    """

    def __init__(self, core: _C.CacheCore, layout: Layout) -> None:
        self.arena_size, entries, moves = core.arena_news()
        self.where = layout.add(entries, 4)
        self.moves = layout.add(3 * moves, 4)
        self.pages = layout.add(entries, 4)
        self.count, self.num_moves = entries, moves

    def fill(self, core: _C.CacheCore, host: Tensor) -> int:
        """Writes them into the host's buffer. Returns the number of entries that moves move."""
        if self.count == 0 and self.num_moves == 0:
            return 0
        at = host.data_ptr()
        core.take_arena_news(at + self.where.start, at + self.pages.start, at + self.moves.start)
        if self.num_moves == 0:
            return 0
        return int(host[self.moves].view(torch.int32).view(-1, 3)[:, 2].sum())


class PageLists:
    """The page lists of a cache's segments on its device; the core says where each lies.

    Attributes:
        pages: (n,) int32, which the runs of plans index.
    """

    def __init__(self, core: _C.CacheCore, device: torch.device, capacity: int) -> None:
        self._core = core
        self.pages = torch.zeros(capacity, dtype=torch.int32, device=device)

    def reserve(self, size: int) -> None:
        """Makes room for `size` entries; what is there stays."""
        if size <= len(self.pages):
            return
        more = max(size, 2 * len(self.pages)) - len(self.pages)
        self.pages = torch.cat([self.pages, self.pages.new_zeros(more)])

    def apply(self, news: News, device_bytes: Tensor, num_moved: int) -> None:
        """Makes the news of an upload, that `device_bytes` holds, part of the lists."""
        if news.num_moves:
            self._move(device_bytes[news.moves].view(torch.int32).view(-1, 3), num_moved)
        if news.count:
            where = device_bytes[news.where].view(torch.int32).long()
            self.pages.index_copy_(0, where, device_bytes[news.pages].view(torch.int32))

    def _move(self, moves: Tensor, total: int) -> None:
        """Moves lists, rows (from, to, count); all are read before any is written."""
        begin, to, count = moves.long().unbind(1)
        # The size is given, so that the device need not be asked for it.
        which = torch.repeat_interleave(count, output_size=total)
        first = count.cumsum(0) - count
        within = torch.arange(total, device=moves.device) - first[which]
        self.pages[to[which] + within] = self.pages[begin[which] + within]
