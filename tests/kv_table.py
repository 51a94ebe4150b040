"""Random K and V by token identity, for a cache and its oracle alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fork_attn import Rope


@dataclass(frozen=True)
class Model:
    """What the cache holds KV for. Layers differ in their window and their RoPE only."""

    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 4
    head_dim_v: int | None = None
    windows: tuple[int | None, ...] = (None, 5)
    dtype: torch.dtype = torch.float32

    @property
    def ropes(self) -> list[Rope]:
        """Whole or half heads, of both layouts; none in every third layer."""
        half = self.head_dim // 4 * 2
        kinds = [
            Rope.from_base(self.head_dim // 2 * 2, 100.0),
            Rope.from_base(half, 1000.0, interleaved=True, start=self.head_dim - half),
            Rope.none(),
        ]
        return [kinds[i % 3] for i in range(len(self.windows))]


class KVTable:
    """Random K and V of token identities: any two tokens, layers or heads differ in their bytes."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._grow(4096)

    def kv(self, layer: int, identities: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """K (n, num_kv_heads, head_dim) and V of these tokens in one layer."""
        most = max(identities, default=0)
        if most >= len(self._layers[0][0]):
            self._grow(2 * most)
        k, v = self._layers[layer]
        at = torch.tensor(identities, dtype=torch.int64)
        return k[at], v[at]

    def _grow(self, rows: int) -> None:
        m = self.model
        k_shape, v_shape = ((m.num_kv_heads, d) for d in (m.head_dim, m.head_dim_v or m.head_dim))
        new = [(torch.randn(rows, *k_shape), torch.randn(rows, *v_shape)) for _ in m.windows]
        for (k, v), (old_k, old_v) in zip(new, self._layers, strict=False):
            k[: len(old_k)], v[: len(old_v)] = old_k, old_v
        self._layers = [(k.to(m.dtype), v.to(m.dtype)) for k, v in new]
