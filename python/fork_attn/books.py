"""Which branches of a cache live, and what follows when pages return to its pool."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fork_attn.errors import OutOfPages

if TYPE_CHECKING:
    from fork_attn import _C
    from fork_attn.branch import Branch
    from fork_attn.scrub import Scrub
    from fork_attn.streams import OtherStreams


class CacheStats(NamedTuple):
    """A snapshot of the pool. Pages are total = free + live + pending."""

    pages_total: int
    pages_free: int
    pages_live: int
    """Held by some branch, or reserved by the open step."""
    pages_shared: int
    """Seen by at least two branches."""
    pages_pending: int
    """Freed, but still in use by queued device work."""
    segments: int
    branches: int
    kv_bytes: int
    """Bytes of K and V in the live pages, all layers together."""


class Books:
    """The handles of a cache's branches, by which ones that are dropped are freed, and its core's
    verbs together with what streams and scrubbing ask for around them."""

    def __init__(self, core: _C.CacheCore, streams: OtherStreams, scrub: Scrub | None) -> None:
        self._core, self._streams, self._scrub = core, streams, scrub
        self._refs: dict[int, weakref.ref[Branch]] = {}
        self._dropped: list[int] = []

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The live branches, oldest first."""
        alive = (ref() for ref in self._refs.values())
        return tuple(branch for branch in alive if branch is not None)

    def add(self, handle: int, branch: Branch) -> None:
        """A handle of the core that a new branch stands for."""
        self._refs[handle] = weakref.ref(branch)

    def drop(self, handle: int) -> None:
        """The branch of a handle is gone; what it held is freed at the next verb."""
        if self._refs.pop(handle, None) is not None:
            self._dropped.append(handle)

    def forget(self, handles: Iterable[int]) -> None:
        """Handles that a verb freed."""
        for handle in handles:
            self._refs.pop(handle, None)

    def verb(self) -> Any:
        """The core, for a verb."""
        self.free_dropped()
        return self._core

    def free_dropped(self) -> None:
        """Frees what dropped branches held, unless a step is open."""
        if self._dropped and not self._core.step_open:
            dropped = list(self._dropped)
            # A select may have freed a branch in the moment before its last reference went.
            self._core.free([handle for handle in dropped if self._core.alive(handle)])
            del self._dropped[: len(dropped)]
            self.freed()

    def freed(self) -> None:
        """Follows every call of the core that may have freed pages."""
        if self._streams:
            self._streams.mark()
        if not self._core.step_open:
            self._run_scrub()

    def reclaim(self) -> None:
        """Before a verb that takes pages: gives back those that other streams are done with."""
        if self._streams:
            self._streams.poll()
        self._run_scrub()

    def open_step(self, tokens: Mapping[Any, Any], wait: bool, *types: Any) -> int:
        """Opens the core's step, as `ForkedKVCache.step` says, and returns its number of rows.

        Args:
            tokens: of each branch.
            wait: whether to wait for pages that other streams may still read.
            types: the cache, and the classes of a branch and a draft, for the core's checks.
        """
        core = self.verb()
        self.reclaim()
        try:
            return int(core.open_step(tokens, *types)[0])
        except OutOfPages as e:
            if not wait or e.needed > e.free + e.pending:
                raise
            self._streams.wait(e.needed - e.free)
        self._run_scrub()
        return int(core.open_step(tokens, *types)[0])

    def stats(self, page_bytes: int) -> CacheStats:
        """Counts as of now, for pages of so many bytes of K and V."""
        self.free_dropped()
        if self._streams:
            self._streams.poll()
        counts = self._core.stats()
        pages_live = counts[2]
        return CacheStats(*counts, pages_live * page_bytes)

    def _run_scrub(self) -> None:
        if self._scrub is not None:
            self._scrub.run()
