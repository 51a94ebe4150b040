"""Where one layer's K and V live."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fork_attn import _C


@dataclass
class Layer:
    """Shape and storage of one layer. Storage keeps one head's page contiguous: (num_pages, heads, page_size, dim)."""

    index: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    window: int | None
    k_cache: torch.Tensor | None = None  # (num_pages, page_size, num_kv_heads, head_dim) views of the storage
    v_cache: torch.Tensor | None = None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    def page_bytes(self, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of K and V in one page."""
        return page_size * self.num_kv_heads * (self.head_dim + self.head_dim_v) * dtype.itemsize

    def allocate(self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Reserves the layer's memory; its contents are undefined."""
        self.k_cache, self.v_cache = (
            torch.empty((num_pages, self.num_kv_heads, page_size, dim), dtype=dtype, device=device).transpose(1, 2)
            for dim in (self.head_dim, self.head_dim_v)
        )

    def copy_pages(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies pages src[i] to dst[i], (count,) int32 each (copy-on-write)."""
        for cache in self._caches():
            _C.copy_pages_cpu(
                *self._paged(cache), src.data_ptr(), dst.data_ptr(), len(src), *self._page_shape(cache)
            )

    def move_slots(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Moves slots src[i] to dst[i], (count,) int64 each; all are read before any is written."""
        for cache in self._caches():
            _C.move_slots_cpu(
                *self._paged(cache), src.data_ptr(), dst.data_ptr(), len(src), *self._page_shape(cache)
            )

    def _caches(self) -> list[torch.Tensor]:
        return [cache for cache in (self.k_cache, self.v_cache) if cache is not None]

    @staticmethod
    def _paged(cache: torch.Tensor) -> tuple[tuple[int, int, int, int]]:
        return ((cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)),)

    @staticmethod
    def _page_shape(cache: torch.Tensor) -> tuple[int, int, int, int]:
        return (cache.shape[1], cache.shape[2], cache.shape[3], cache.element_size())
