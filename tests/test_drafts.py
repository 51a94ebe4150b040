"""Draft trees larger than a row block: verified in one pass, one path accepted."""

from __future__ import annotations

import random

import pytest
import torch

import fork_attn as fa
from fork_attn.reference import attention, step_mask
from fork_attn.testing.tolerance import assert_close_to_oracle

HEADS, KV_HEADS, DIM = 4, 2, 16


def tokens(count: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(count, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shape", ["chain", "bushy", "wide"])
def test_draft_of_256_nodes(shape: str, window: int | None) -> None:
    """Blocks have 64 tokens here, so most tokens have ancestors in other blocks."""
    rng = random.Random(shape)
    back = {"chain": 1, "bushy": 9, "wide": 200}[shape]
    parents = [rng.randint(max(-1, i - back), i - 1) if i else -1 for i in range(256)]
    cache = fa.ForkedKVCache(
        num_layers=1, num_pages=64, num_q_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM,
        sliding_window=window, dtype=torch.float32,
    )  # fmt: skip
    branch, other = cache.new_branch(), cache.new_branch()
    context = tokens(37)
    with cache.step({branch: 37}) as step:
        cache.attend(0, *context, step)
    draft = tokens(256)
    path = [255]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    q, k, v = (torch.cat([x, y]) for x, y in zip(draft, tokens(3), strict=True))
    with cache.step({branch: fa.Draft(parents), other: 3}) as step:
        out = cache.attend(0, q, k, v, step)
        assert step.plan.num_row_blocks > 4
        positions = step.position_ids[:256].tolist()
        step.accept(path, branch)
    mask = step_mask(range(37), positions, parents=parents, window=window)
    keys, values = (torch.cat([context[i], draft[i]]) for i in (1, 2))
    oracle, _ = attention(draft[0], keys, values, mask)
    reference, _ = attention(draft[0], keys, values, mask, dtype=torch.float32)
    assert_close_to_oracle(out[:256], oracle, reference)
    assert branch.length == 37 + len(path)
    slots = torch.tensor(cache._core.slots(branch._handle))[37:]
    assert torch.equal(cache.layer(0)[0].flatten(0, 1)[slots], draft[1][path])
