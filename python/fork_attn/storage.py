"""Where K and V live: one paged tensor each per layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fork_attn import _C, checks, kv_library  # noqa: F401 - defines the ops
from fork_attn.layers import Layer
from fork_attn.quantise import E4M3, calibrate, check_scale
from fork_attn.rope import Rope, turn_of


class KVStorage:
    """K and V of all layers.

    Args:
        layers: their shapes.
        num_pages, page_size, dtype, device: as in `ForkedKVCache`.
        lazy: a layer takes memory at its first write, in the shapes that arrive then (tensor
            parallel ranks know their share of the heads only there); otherwise at once.
    """

    def __init__(
        self,
        layers: list[Layer],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        lazy: bool,
    ) -> None:
        self.layers = layers
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.device = device
        self.record: Callable[[torch.Tensor], None] | None = None  # of new memory: `OtherStreams`
        self.fill_new: Callable[[torch.Tensor], None] | None = None  # of a layer's new memory
        if not lazy:
            for layer in layers:
                self._allocate(layer)

    @property
    def page_bytes(self) -> int:
        """Bytes of K and V in one page, all layers together."""
        widths = (x.num_kv_heads * (x.head_dim + x.head_dim_v) for x in self.layers)
        return self.page_size * self.dtype.itemsize * sum(widths)

    def row_dtype(self, q: torch.Tensor) -> torch.dtype:
        """What q, k and v have to be: the cache's dtype, or with an e4m3 cache that of q.

        Raises:
            TypeError: e4m3, and q is none of fp32, bf16 and fp16.
        """
        if self.dtype != E4M3:
            return self.dtype
        dtype = getattr(q, "dtype", None)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"q: expected dtype float32, bfloat16 or float16, got {dtype}")
        return dtype

    def fit(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Gives a layer its memory, in the shapes of its first q, k and v (T, heads, dim).

        Raises:
            ValueError, TypeError: not three such tensors, or another GQA group than was announced.
        """
        if layer.k_cache is not None:
            return
        for name, value in (("q", q), ("k", k), ("v", v)):
            shape = ("T", "num_heads", "head_dim")
            checks.tensor(name, value, shape=shape, dtype=self.row_dtype(q), device=self.device)
        group, rest = divmod(q.shape[1], k.shape[1])
        if rest or group != layer.group:
            raise ValueError(
                f"q: expected {layer.group} query heads per KV head in layer {layer.index}, "
                f"got {q.shape[1]} over {k.shape[1]}"
            )
        layer.num_q_heads, layer.num_kv_heads = q.shape[1], k.shape[1]
        layer.head_dim, layer.head_dim_v = k.shape[2], v.shape[2]
        self._allocate(layer)

    def check_rows(
        self, layer: Layer, rows: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Checks q, k and v of `rows` rows of a layer, which gets its memory if it has none yet.

        Raises:
            ValueError, TypeError: a shape, dtype, device or stride is off.
        """
        self.fit(layer, q, k, v)
        dtype, device = self.row_dtype(q), self.device
        for name, value, heads, dim in (
            ("q", q, layer.num_q_heads, layer.head_dim),
            ("k", k, layer.num_kv_heads, layer.head_dim),
            ("v", v, layer.num_kv_heads, layer.head_dim_v),
        ):
            checks.tensor(name, value, shape=(rows, heads, dim), dtype=dtype, device=device)

    def set_scales(
        self, layer: Layer, k_scale: torch.Tensor, v_scale: torch.Tensor, *, in_use: bool
    ) -> None:
        """`ForkedKVCache.set_scales`, unless some branch sees what the layer holds (`in_use`).

        Raises:
            ValueError, TypeError: as there.
        """
        if self.dtype != E4M3:
            raise ValueError(f"set_scales: expected a cache of {E4M3}, got one of {self.dtype}")
        scales = [
            check_scale(name, scale, layer.num_kv_heads, self.device)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        ]
        if in_use:
            raise ValueError(
                f"set_scales: layer {layer.index} holds K and V stored with other scales; set them "
                "before its first write, or free all branches and let other streams finish"
            )
        if layer.k_scale is None or layer.v_scale is None:
            layer.k_scale, layer.v_scale = scales
            return
        layer.k_scale.copy_(scales[0])  # where captured graphs read them
        layer.v_scale.copy_(scales[1])

    def store(
        self,
        layer: Layer,
        k: torch.Tensor,
        v: torch.Tensor,
        slot_mapping: torch.Tensor,
        num_tokens: int | None = None,
    ) -> None:
        """Writes rows of K and V, checked, to their slots; the first write of an e4m3 layer whose
        scales are not set sets them.

        Args:
            num_tokens: rows behind these are padding, stored nowhere; None: there are none.

        Raises:
            ValueError: there are no scales yet, and k or v is not finite.
        """
        if self.dtype == E4M3 and layer.k_scale is None:
            rows = slice(num_tokens)
            layer.k_scale, layer.v_scale = calibrate("k", k[rows]), calibrate("v", v[rows])
        layer.written = True
        torch.ops.fork_attn.store_kv(
            *(k, v, layer.k_cache, layer.v_cache, slot_mapping, layer.k_scale, layer.v_scale)
        )

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole pages (from, to) in every layer (copy-on-write)."""
        pages = self.sent(torch.tensor(copies, dtype=torch.int32).t().contiguous())
        torch.ops.fork_attn.copy_pages(self.caches(), *pages)

    def move_slots(self, moves: Sequence[tuple[int, int]]) -> None:
        """Moves slots (from, to) in every layer; all are read before any is written."""
        slots = self.sent(torch.tensor(moves, dtype=torch.int64).t().contiguous())
        torch.ops.fork_attn.move_slots(self.caches(), *slots)

    def sent(self, host: torch.Tensor) -> torch.Tensor:
        """On the device, without waiting for it."""
        if self.device.type == "cuda":
            host = host.pin_memory()  # torch keeps it until the copy is made
        return host.to(self.device, non_blocking=True)

    def copy_shifted(self, slots: Sequence[tuple[int, int, int]]) -> None:
        """Copies slots (from, to, positions to move on) in every layer, keys turned; no destination
        is a source."""
        src, dst, shifts = torch.tensor(slots, dtype=torch.int64).t().contiguous()
        distances, rows = shifts.unique(return_inverse=True)
        src, dst, rows = (self.sent(t) for t in (src, dst, rows))
        tables: dict[Rope, Sequence[torch.Tensor]] = {}
        for layer in self.layers:
            rope = layer.rope
            if layer.k_cache is None or self.device.type == "meta":
                continue
            assert rope is not None
            if rope not in tables:
                tables[rope] = [self.sent(t.float()) for t in turn_of(rope, distances)]
            torch.ops.fork_attn.shift_rope(
                *(layer.k_cache, layer.v_cache, src, dst, *tables[rope], rows),
                *(rope.interleaved, rope.start),
            )

    def _allocate(self, layer: Layer) -> None:
        layer.k_cache, layer.v_cache = (
            torch.empty(
                (self.num_pages, layer.num_kv_heads, self.page_size, dim),
                dtype=self.dtype,
                device=self.device,
            ).transpose(1, 2)
            for dim in (layer.head_dim, layer.head_dim_v)
        )
        for cache in layer.caches():
            if self.device.type == "cpu":
                _C.advise_huge_pages(cache.data_ptr(), cache.numel() * cache.element_size())
            if self.fill_new is not None:
                self.fill_new(cache)
            if self.record is not None:
                self.record(cache)

    def caches(self) -> list[torch.Tensor]:
        if self.device.type == "meta":
            return []
        return [cache for layer in self.layers for cache in layer.caches()]
