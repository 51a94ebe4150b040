"""Shared-prefix decode: n branches, one query token each, over a common prefix and own suffixes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PAGE_SIZE = 16


@dataclass(frozen=True)
class Case:
    """Sizes of one shape. Lengths are in tokens; `prefix` is a multiple of the page size."""

    branches: int
    prefix: int
    suffix: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def name(self) -> str:
        return f"n{self.branches}_prefix{self.prefix}_suffix{self.suffix}"

    @property
    def length(self) -> int:
        """Context length of each branch."""
        return self.prefix + self.suffix

    @property
    def reuse(self) -> float:
        """Tokens that the branches see together over tokens that exist."""
        return self.branches * self.length / (self.prefix + self.branches * self.suffix)

    def unique_bytes(self, element_size: int) -> int:
        """Every visible KV slot once, the queries and the outputs."""
        slots = self.prefix + self.branches * self.suffix
        kv = 2 * slots * self.kv_heads * self.head_dim
        rows = 2 * self.branches * self.q_heads * self.head_dim
        return (kv + rows) * element_size


GPU_CASES = (
    Case(1, 8192, 256),
    Case(16, 0, 8192),
    Case(8, 8192, 256),
    Case(32, 4096, 128),
    Case(64, 16384, 512),
    Case(256, 8192, 128),
    Case(4, 65536, 1024),
    Case(32, 131072, 64),
)
DRY_CASES = (
    Case(4, 64, 20, q_heads=4, kv_heads=1, head_dim=32),
    Case(3, 0, 33, q_heads=4, kv_heads=2, head_dim=32),
)


class PagedInputs:
    """Queries and a paged cache that holds the prefix's pages once; physical pages are shuffled.

    `q` is (n, q_heads, head_dim), `k_cache` and `v_cache` are (num_pages, page_size, kv_heads,
    head_dim), `page_table` is (n, pages per branch) int32.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        if case.prefix % PAGE_SIZE:
            raise ValueError(f"prefix: expected a multiple of {PAGE_SIZE}, got {case.prefix}")
        self.case = case
        self.prefix_pages = case.prefix // PAGE_SIZE
        self.suffix_pages = -(-case.suffix // PAGE_SIZE)
        num_pages = self.prefix_pages + case.branches * self.suffix_pages
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.q = normal(case.branches, case.q_heads, case.head_dim)
        self.k_cache = normal(num_pages, PAGE_SIZE, case.kv_heads, case.head_dim)
        self.v_cache = normal(num_pages, PAGE_SIZE, case.kv_heads, case.head_dim)
        order = torch.randperm(num_pages, generator=generator, device=device).int()
        shared = order[: self.prefix_pages].expand(case.branches, -1)
        own = order[self.prefix_pages :].view(case.branches, self.suffix_pages)
        self.page_table = torch.cat([shared, own], 1).contiguous()

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """K and V gathered per branch, (n, kv_heads, length, head_dim): the prefix n times."""

        def gather(cache: Tensor) -> Tensor:
            slots = cache[self.page_table.long()].flatten(1, 2)[:, : self.case.length]
            return slots.transpose(1, 2).contiguous()

        return gather(self.k_cache), gather(self.v_cache)

    def oracle(self, branch: int) -> Tensor:
        """(q_heads, head_dim) in float64: softmax attention of one branch."""
        case = self.case
        pages = self.page_table[branch].long()

        def gather(cache: Tensor) -> Tensor:
            slots = cache[pages].flatten(0, 1)[: case.length].double()
            return slots.repeat_interleave(case.q_heads // case.kv_heads, 1)

        k, v = gather(self.k_cache), gather(self.v_cache)
        scores = torch.einsum("hd,lhd->hl", self.q[branch].double(), k) * case.head_dim**-0.5
        return torch.einsum("hl,lhd->hd", scores.softmax(-1), v)
