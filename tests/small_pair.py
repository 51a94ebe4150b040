"""A one-layer cache beside its oracle, for tests of the verbs: pages of 4, every byte compared."""

from __future__ import annotations

from typing import Literal

from cache_pair import CachePair
from kv_table import Model

from fork_attn import Branch

Tail = Literal["seal", "copy"]
TAILS: tuple[Tail, ...] = ("seal", "copy")
BYTES = Model(num_q_heads=1, num_kv_heads=1, head_dim=2, windows=(None,))


def make(tail: Tail = "seal", page_size: int = 4, num_pages: int = 64) -> CachePair:
    return CachePair(BYTES, num_pages=num_pages, page_size=page_size, tail=tail)


def root_of(pair: CachePair, tokens: int) -> Branch:
    root = pair.new_branch()
    pair.step({root: tokens})
    pair.check()
    return root


def live_pages(pair: CachePair) -> int:
    return pair.cache.stats().pages_live
