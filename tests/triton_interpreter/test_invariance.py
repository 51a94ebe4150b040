"""batch_invariant=True on the Triton backend: what of it the interpreter can show.

Here products are sums over k in one order, and nothing fuses a multiplication with an addition: so
these tests show that plan, tiles, chunks, masks and merging give a row the same operations in the
same order. That tensor cores treat rows alike is shown on a card (tests/gpu), that instructions are
not fused in tests/triton_compile.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from invariant_crowd import (
    Crowd,
    Row,
    Setting,
    alone,
    check_against_oracle,
    check_buffers,
    random_tokens,
    run,
    same_bits,
    store,
)

import fork_attn as fa
from fork_attn.plan_format import header, sections
from fork_attn.testing.triton_interpreter import row_independent_products

SETTING = Setting(
    backend="triton",
    groups=(1, 3, 4, 8),
    head_dims=(8, 24),
    head_dims_v=(8, 16),
    counts=(1, 2, 30, 100, 300),
    last_counts=(1, 1, 1, 2, 20),
    num_pages=20000,
)


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    with row_independent_products():
        yield


@pytest.mark.parametrize("seed", range(24))
def test_a_row_has_the_same_bits_alone_and_in_a_crowd(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    crowd = Crowd(rng, SETTING)
    for _ in range(rng.randint(5, 14)):
        crowd.act()
    check_buffers(crowd)
    rows = crowd.step()
    check_against_oracle(crowd, rows)
    for row in rng.sample(rows, min(3, len(rows))):
        for new in {1, rng.randint(1, min(20, len(row.context)))}:
            out, lse = alone(crowd, row, new)
            assert same_bits(out, row.out)
            assert same_bits(lse, row.lse)


def tree(
    counts: list[int], *, own: int, num_workers: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Crowd, list[fa.Branch]]:
    """A root of `counts[0]` tokens and children with so many more each; `own` workers."""
    rng = random.Random(own)
    torch.manual_seed(own)
    sizes = {"groups": (4,), "head_dims": (16,), "head_dims_v": (16,), "dtypes": (dtype,)}
    one = {"workers": (num_workers,), "page_sizes": (16,), "windows": (None,)}
    setting = replace(SETTING, **sizes, **one)  # type: ignore[arg-type]
    crowd = Crowd(rng, setting)
    (root,) = crowd.contexts
    grow(crowd, {root: counts[0]})
    children = root.fork(len(counts) - 1)
    crowd.contexts |= {child: list(crowd.contexts[root]) for child in children}
    del crowd.contexts[root]
    grow(crowd, dict(zip(children, counts[1:], strict=True)))
    return crowd, children


def grow(crowd: Crowd, counts: dict[fa.Branch, int]) -> None:
    with crowd.cache.step(counts) as step:
        tokens = random_tokens(crowd.cache, step.position_ids.tolist())
        store(crowd.cache, step, tokens)
    for branch, count in counts.items():
        crowd.contexts[branch] += tokens[:count]
        tokens = tokens[count:]


def attend(crowd: Crowd) -> tuple[list[Row], fa.Plan]:
    """One more token of every branch."""
    layer = crowd.cache._layer(0)
    branches = list(crowd.contexts)
    with crowd.cache.step(dict.fromkeys(branches, 1)) as step:
        q = torch.randn(len(branches), layer.num_q_heads, layer.head_dim).to(crowd.cache.dtype)
        tokens = random_tokens(crowd.cache, step.position_ids.tolist())
        out, lse = run(crowd.cache, step, q, tokens, crowd.options)
        plan = step.plan
    rows = []
    for i, branch in enumerate(branches):
        crowd.contexts[branch].append(tokens[i])
        rows.append(Row(q[i], list(crowd.contexts[branch]), out[i], lse[i]))
    return rows, plan


@pytest.mark.parametrize("num_workers", [1, 3, 200])
def test_chunks_of_one_item_and_of_many(num_workers: int) -> None:
    """Chunks from the root's beginning on lie in one item; with 200 workers, in one each."""
    crowd, _ = tree([1100, 30, 200, 5], own=1, num_workers=num_workers)
    rows, plan = attend(crowd)
    s = sections(plan.buffer)
    chunks = [len(set(s.runs[a:b, 9].tolist())) for a, b in s.items[:, 1:3].tolist()]
    assert (max(chunks) > 1) == (num_workers < 200)
    assert header(plan.buffer).num_partial_rows > 0
    for row in rows:
        for workers in (1, 7, 200):
            crowd.setting = replace(crowd.setting, workers=(workers,))
            out, lse = alone(crowd, row, 1)
            assert same_bits(out, row.out) and same_bits(lse, row.lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_overflows_elsewhere_changes_no_bits(dtype: torch.dtype) -> None:
    """One branch's infinite V, in the tile of a prompt whose earlier rows do not see it."""
    crowd, (branch, _) = tree([200, 7, 30], own=2, num_workers=2, dtype=dtype)
    context = list(crowd.contexts[branch])
    layer = crowd.cache._layer(0)
    with crowd.cache.step({branch: 9}) as step:
        q = torch.randn(9, layer.num_q_heads, layer.head_dim).to(dtype)
        tokens = random_tokens(crowd.cache, step.position_ids.tolist())
        tokens[5].v[:, 3] = torch.inf
        out, lse = run(crowd.cache, step, q, tokens, crowd.options)
    for i in range(9):
        row = Row(q[i], [*context, *tokens[: i + 1]], out[i], lse[i])
        own_out, own_lse = alone(crowd, row, 1)
        assert same_bits(own_lse, row.lse)
        assert same_bits(own_out, row.out) or i >= 5
        assert row.out.isfinite().all() == (i < 5) == own_out.isfinite().all()


def test_products_of_the_interpreter_treat_rows_alike() -> None:
    """What these tests rest on: a row's bits, wherever it stands and whatever the others are."""
    left, right = torch.randn(128, 64), torch.randn(64, 64)
    results = [product(left, right), product(left[:64].flip(0), right)]
    assert torch.equal(results[0][:64], results[1].flip(0))


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    out = torch.empty(left.shape[0], right.shape[1])
    _product[(1,)](left, right, out, *left.shape, right.shape[1])
    return out


@triton.jit
def _product(left, right, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    a = tl.load(left + m[:, None] * K + k[None, :])
    b = tl.load(right + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(a, b))
