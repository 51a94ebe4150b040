"""batch_invariant=True on a card: what the interpreter cannot show. Tensor cores treat rows alike,
copies of a loop round alike, and a value times a probability of 0 leaves no trace."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from invariant_crowd import (
    Crowd,
    Row,
    Setting,
    Token,
    alone,
    check_against_oracle,
    check_buffers,
    random_tokens,
    run,
    same_bits,
    store,
)

import fork_attn as fa

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SETTING = Setting(
    backend="triton",
    device="cuda",
    groups=(1, 3, 4, 8, 16),
    head_dims=(64, 128),
    head_dims_v=(64, 128),
    workers=(1, 7, 40, 132),
    counts=(1, 2, 30, 100, 1500),
    last_counts=(1, 1, 1, 2, 30, 100, 700),
    num_pages=40000,
    page_sizes=(16, 64),  # a kernel is compiled for each, slowly
)


def fixed(dtype: torch.dtype, **options: object) -> Setting:
    """One shape: 32 query heads over 8 of 128, pages of 16, no window."""
    sizes = {"groups": (4,), "head_dims": (128,), "head_dims_v": (128,), "windows": (None,)}
    return replace(SETTING, dtypes=(dtype,), page_sizes=(16,), **sizes, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("seed", range(4))
def test_a_row_has_the_same_bits_alone_and_in_a_crowd(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    crowd = Crowd(rng, replace(SETTING, dtypes=(dtype,)))
    for _ in range(rng.randint(5, 14)):
        crowd.act()
    check_buffers(crowd)
    rows = crowd.step()
    check_against_oracle(crowd, rows)
    for row in rng.sample(rows, min(12, len(rows))):
        for new in {1, rng.randint(1, len(row.context))}:
            out, lse = alone(crowd, row, new)
            assert same_bits(out, row.out)
            assert same_bits(lse, row.lse)


def grow(crowd: Crowd, branch: fa.Branch, count: int) -> list[Token]:
    with crowd.cache.step({branch: count}) as step:
        tokens = random_tokens(crowd.cache, step.position_ids.tolist())
        store(crowd.cache, step, tokens)
    return tokens


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", [1, 7, 100])
def test_every_place_in_a_tile_gives_the_same_bits(width: int, dtype: torch.dtype) -> None:
    """Forks that add one and the same token with one and the same query, among others."""
    torch.manual_seed(0)
    crowd = Crowd(random.Random(0), fixed(dtype))
    (root,) = crowd.contexts
    context = grow(crowd, root, 1700)
    layer = crowd.cache._layer(0)
    branches = root.fork(width)
    with crowd.cache.step(dict.fromkeys(branches, 1)) as step:
        q = torch.randn(1, layer.num_q_heads, layer.head_dim).to(dtype).expand(width, -1, -1)
        q = q.clone()
        q[1::3] = torch.randn_like(q[1::3].float()).to(dtype)
        (token,) = random_tokens(crowd.cache, step.position_ids.tolist()[:1])
        results = [run(crowd.cache, step, q, [token] * width, crowd.options) for _ in range(100)]
    out, lse = results[0]
    for again in results[1:]:
        assert same_bits(again[0], out) and same_bits(again[1], lse)
    row = Row(q[0], [*context, token], out[0], lse[0])
    own_out, own_lse = alone(crowd, row, 1)
    for i in range(width):
        if i % 3 != 1:
            assert same_bits(out[i], own_out) and same_bits(lse[i], own_lse)


@pytest.mark.parametrize(
    ("dtype", "value"), [(FP16, 6e4), (BF16, 1e38), (BF16, float("inf")), (FP32, 1e38)]
)
def test_what_a_row_does_not_see_leaves_no_trace(dtype: torch.dtype, value: float) -> None:
    """Later tokens of a prompt hold huge or infinite V: rows before them have their own bits."""
    torch.manual_seed(1)
    crowd = Crowd(random.Random(1), fixed(dtype))
    (branch,) = crowd.contexts
    context = grow(crowd, branch, 600)
    layer = crowd.cache._layer(0)
    with crowd.cache.step({branch: 30}) as step:
        q = torch.randn(30, layer.num_q_heads, layer.head_dim).to(dtype)
        tokens = random_tokens(crowd.cache, step.position_ids.tolist())
        for token in tokens[12:]:
            token.v.copy_(value * torch.sign(token.v.float()))
        out, lse = run(crowd.cache, step, q, tokens, crowd.options)
    for i in (0, 5, 11):
        row = Row(q[i], [*context, *tokens[: i + 1]], out[i], lse[i])
        own_out, own_lse = alone(crowd, row, 1)
        assert same_bits(own_out, row.out) and same_bits(own_lse, row.lse)
