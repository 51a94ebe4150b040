"""backend="triton" through the public functions, on CPU tensors under the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fork_attn as fa

HEADS, KV_HEADS, DIM, DIM_V = 6, 2, 16, 8
FP8 = torch.float8_e4m3fn


def make_cache(backend: str = "triton", **options: Any) -> fa.ForkedKVCache:
    sizes = {"num_q_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "head_dim_v": DIM_V}
    settings = {"num_layers": 1, "num_pages": 32, "page_size": 4, "dtype": torch.float32}
    return fa.ForkedKVCache(**(sizes | settings | options), backend=backend)  # type: ignore[arg-type]


def new_tokens(count: int) -> tuple[torch.Tensor, ...]:
    shapes = ((count, HEADS, DIM), (count, KV_HEADS, DIM), (count, KV_HEADS, DIM_V))
    return tuple(torch.randn(shape) for shape in shapes)


@pytest.fixture
def open_step() -> tuple[fa.ForkedKVCache, fa.Step, torch.Tensor]:
    """Three branches over one prefix in an open step whose K and V are stored, and its queries."""
    cache = make_cache()
    root = cache.new_branch()
    with cache.step({root: 9}) as step:
        cache.attend(0, *new_tokens(9), step)
    step = cache.step(dict.fromkeys(root.fork(3), 2))
    q, k, v = new_tokens(6)
    torch.ops.fork_attn.store_kv(k, v, *cache.layer(0), step.slot_mapping)
    return cache, step, q


def test_attend_equals_another_backend() -> None:
    caches = [make_cache(), make_cache("reference")]
    branches = [[cache.new_branch()] for cache in caches]
    for count in (9, 1, 1):
        tokens = new_tokens(count * len(branches[0]))
        results = []
        for cache, live in zip(caches, branches, strict=True):
            with cache.step(dict.fromkeys(live, count)) as step:
                results.append(cache.attend(0, *tokens, step, softcap=4.0))
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)
        branches = [live[0].fork(2) for live in branches]


@pytest.mark.parametrize("kv", ["same", "e4m3"])
def test_tree_attention_with_every_option(open_step: Any, kv: str) -> None:
    cache, step, q = open_step
    options: dict[str, Any] = {"softmax_scale": 0.3, "softcap": 3.0, "sinks": torch.randn(HEADS)}
    caches = cache.layer(0)
    if kv == "e4m3":
        q, caches = q.bfloat16(), tuple(x.to(FP8) for x in caches)
        options |= {"k_scale": torch.rand(KV_HEADS) + 1, "v_scale": torch.rand(KV_HEADS) + 1}
    arguments = (q, *caches, step.plan)
    got = fa.tree_attention(*arguments, **options, backend="triton")
    expected = fa.tree_attention(*arguments, **options, backend="reference")
    tolerance = 1e-5 if kv == "same" else 2e-2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_opcheck(open_step: Any) -> None:
    cache, step, q = open_step
    fa.tree_attention(q, *cache.layer(0), step.plan, backend="triton")

    (here,) = step.plan.launches.values()
    (work,) = here.workspaces.values()
    memory = (here.buffer, here.pages, work.partial_out, work.partial_lse, work.counters)
    sizes = (here.num_tokens, 2, here.max_block_tokens, here.window)
    caches = tuple(x.contiguous() for x in cache.layer(0))
    arguments = (q, *caches, *memory, *sizes, 0.25, 0.0, None, None, None)
    operator = torch.ops.fork_attn.tree_attention_triton.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_the_kernel_cannot_do_is_refused_by_name(open_step: Any) -> None:
    _, step, _ = open_step
    odd = torch.randn(6, HEADS, 12)
    k_cache, v_cache = (torch.zeros(32, 4, KV_HEADS, 12) for _ in range(2))
    with pytest.raises(
        fa.Unsupported, match=r"head_dim: backend 'triton' expected a multiple of 8"
    ):
        fa.tree_attention(odd, k_cache, v_cache, step.plan, backend="triton")
