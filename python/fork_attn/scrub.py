"""What is done to K and V that nobody sees any more: nothing, zeros, or NaN (for debugging)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fork_attn import _env
from fork_attn.storage import KVStorage

if TYPE_CHECKING:
    from fork_attn import _C

_E4M3_NAN = 0x7F


class Scrub(Protocol):
    """Runs after every call that may have freed pages, and before every step."""

    def run(self) -> None: ...


def make_scrub(core: _C.CacheCore, storage: KVStorage) -> Scrub | None:
    """What the environment asks for; a cache without memory of its own needs none.

    Raises:
        ValueError: a variable is off, or both are set.
    """
    poison, zero = _env.poison(), _env.zero_on_free()
    if poison and zero:
        raise ValueError("FORK_ATTN_DEBUG, FORK_ATTN_ZERO_ON_FREE: expected one of them, got both")
    if storage.device.type == "meta":
        return None
    if poison:
        return _Poison(core, storage)
    return _Zeros(core, storage) if zero else None


class _Zeros:
    """Zeros in pages that became reusable."""

    def __init__(self, core: _C.CacheCore, storage: KVStorage) -> None:
        self._core, self._storage = core, storage
        core.report_reusable()

    def run(self) -> None:
        pages = self._core.take_reusable()
        if not pages:
            return
        at = self._storage.sent(torch.tensor(pages))
        for cache in self._storage.caches():
            _bits(cache).index_fill_(0, at, 0)


class _Poison:
    """NaN in every slot that no branch sees. Takes time in proportion to the pool."""

    def __init__(self, core: _C.CacheCore, storage: KVStorage) -> None:
        self._core, self._storage = core, storage
        storage.fill_new = fill_with_nan
        for cache in storage.caches():
            fill_with_nan(cache)

    def run(self) -> None:
        slots = self._storage.sent(torch.tensor(self._core.unseen_slots(), dtype=torch.int64))
        size = self._storage.page_size
        for cache in self._storage.caches():
            fill_with_nan(cache, (slots // size, slots % size))


def fill_with_nan(cache: Tensor, at: tuple[Tensor, ...] | None = None) -> None:
    """NaN in a paged tensor, in all of it or at (pages, offsets)."""
    bits = cache.dtype.itemsize == 1
    target = cache.view(torch.uint8) if bits else cache
    value = torch.tensor(_E4M3_NAN if bits else torch.nan, dtype=target.dtype).to(cache.device)
    if at is None:
        target.copy_(value)
    else:
        target.index_put_(at, value)


def _bits(cache: Tensor) -> Tensor:
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
