"""The CPU kernels that move K and V, and merge_states."""

from __future__ import annotations

import pytest
import torch
from plan_cases import DTYPES, NAN, Shape, paged_arg, paged_tensor, rows_arg

from fork_attn import _C
from fork_attn.testing.tolerance import assert_close_to_oracle


@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 7, 900])
def test_store_kv(num_rows: int, dtype: torch.dtype, heads_inside: bool) -> None:
    shape = Shape(page_size=3, dtype=dtype)
    cache = paged_tensor(400, shape, 10, heads_inside=heads_inside)
    src = torch.randn(num_rows, 5, 12).to(dtype)[:, 1:3, 2:]
    slots = torch.randperm(1200)[:num_rows]
    slots[::4] = -1
    expected = cache.clone()
    kept = slots >= 0
    expected[slots[kept] // 3, slots[kept] % 3] = src[kept]
    args = (rows_arg(src), paged_arg(cache), slots.data_ptr(), num_rows, 2, 10, 3)
    _C.store_kv_cpu(*args, cache.element_size())
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 90])
def test_copy_pages(count: int, dtype: torch.dtype, heads_inside: bool) -> None:
    shape = Shape(page_size=16, dtype=dtype)
    cache = paged_tensor(200, shape, 64, heads_inside=heads_inside)
    pages = torch.randperm(200).to(torch.int32)
    src, dst = pages[:count], pages[100 : 100 + count]
    expected = cache.clone()
    expected[dst.long()] = cache[src.long()]
    args = (paged_arg(cache), src.data_ptr(), dst.data_ptr(), count, 16, 2, 64)
    _C.copy_pages_cpu(*args, cache.element_size())
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_move_slots_reads_before_it_writes(dtype: torch.dtype, heads_inside: bool) -> None:
    shape = Shape(page_size=3, dtype=dtype)
    cache = paged_tensor(8, shape, 5, heads_inside=heads_inside)
    src = torch.tensor([1, 2, 3, 9, 0])
    dst = torch.tensor([0, 1, 2, 3, 20])
    expected = cache.clone()
    expected[dst // 3, dst % 3] = cache[src // 3, src % 3]
    args = (paged_arg(cache), src.data_ptr(), dst.data_ptr(), 5, 3, 2, 5)
    _C.move_slots_cpu(*args, cache.element_size())
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("num_states", [1, 2, 9])
def test_merge_states(num_states: int) -> None:
    torch.manual_seed(num_states)
    out = torch.randn(num_states, 50, 3, 40)
    lse = 20 * torch.randn(num_states, 50, 3)
    lse[torch.rand_like(lse) < 0.3] = -torch.inf
    lse[:, 0] = -torch.inf
    out[lse == -torch.inf] = 0
    merged, merged_lse = torch.full((50, 3, 40), NAN), torch.full((50, 3), NAN)
    pointers = (merged.data_ptr(), merged_lse.data_ptr())
    _C.merge_states_cpu(out.data_ptr(), lse.data_ptr(), num_states, 50, 3, 40, *pointers)

    def dense(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.logsumexp(lse.to(dtype), 0)
        weights = torch.exp(lse.to(dtype) - torch.where(total == -torch.inf, 0, total))
        return (weights[..., None] * out.to(dtype)).sum(0), total

    oracle, reference = dense(torch.float64), dense(torch.float32)
    assert_close_to_oracle(merged, oracle[0], reference[0])
    assert_close_to_oracle(merged_lse, oracle[1], reference[1], name="lse")
