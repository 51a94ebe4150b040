"""The custom ops: schemas, fakes, argument checks, backends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fork_attn as fa

HEADS, KV_HEADS, DIM, DIM_V = 6, 2, 8, 4


def make_cache(**kwargs: Any) -> fa.ForkedKVCache:
    settings: dict[str, Any] = {
        "num_layers": 1,
        "num_pages": 32,
        "num_q_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "head_dim_v": DIM_V,
        "page_size": 4,
        "dtype": torch.float32,
    }
    return fa.ForkedKVCache(**(settings | kwargs))


def new_tokens(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(num_tokens, HEADS, DIM),
        torch.randn(num_tokens, KV_HEADS, DIM),
        torch.randn(num_tokens, KV_HEADS, DIM_V),
    )


@pytest.fixture
def open_step() -> tuple[fa.ForkedKVCache, fa.Step, torch.Tensor]:
    """Three branches over one prefix in an open step whose K and V are stored, and its queries."""
    torch.manual_seed(0)
    cache = make_cache()
    root = cache.new_branch()
    with cache.step({root: 9}) as step:
        cache.attend(0, *new_tokens(9), step)
    children = root.fork(3)
    root.free()
    step = cache.step(dict.fromkeys(children, 2))
    q, k, v = new_tokens(6)
    torch.ops.fork_attn.store_kv(k, v, *cache.layer(0), step.slot_mapping)
    return cache, step, q


def test_opcheck_of_tree_attention(open_step: Any) -> None:
    cache, step, q = open_step
    arguments = (q, *cache.layer(0), step.plan.buffer, DIM**-0.5, 0.0, None)
    torch.library.opcheck(torch.ops.fork_attn.tree_attention.default, arguments)


def test_opcheck_of_store_kv(open_step: Any) -> None:
    cache, step, _ = open_step
    _, k, v = new_tokens(6)
    k_cache, v_cache = (x.contiguous() for x in cache.layer(0))
    torch.library.opcheck(
        torch.ops.fork_attn.store_kv.default, (k, v, k_cache, v_cache, step.slot_mapping)
    )


def test_opcheck_of_merge_states() -> None:
    torch.library.opcheck(
        torch.ops.fork_attn.merge_states.default, (torch.randn(3, 5, 2, 4), torch.randn(3, 5, 2))
    )


def test_fakes_have_the_shapes_and_dtypes_of_the_kernels(open_step: Any) -> None:
    cache, step, q = open_step
    arguments = (q, *cache.layer(0), step.plan.buffer, 1.0, 0.0, None)
    real = torch.ops.fork_attn.tree_attention(*arguments)
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    fake = torch.ops.fork_attn.tree_attention(*meta)
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_cpu_backend_equals_the_reference_backend(
    open_step: Any, softcap: float | None, with_sinks: bool
) -> None:
    cache, step, q = open_step
    sinks = torch.randn(HEADS) if with_sinks else None
    results = [
        fa.tree_attention(
            q, *cache.layer(0), step.plan, softcap=softcap, sinks=sinks, backend=backend
        )
        for backend in ("cpu", "reference")
    ]
    (out, lse), (expected_out, expected_lse) = results
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-5)


def test_merge_states_of_a_split_softmax() -> None:
    torch.manual_seed(0)
    scores = torch.randn(7, 3, 40, dtype=torch.float64)
    values = torch.randn(40, 5, dtype=torch.float64)
    parts = [slice(0, 1), slice(1, 23), slice(23, 40)]
    out = torch.stack([scores[..., s].softmax(-1) @ values[s] for s in parts]).float()
    lse = torch.stack([scores[..., s].logsumexp(-1) for s in parts]).float()
    merged, merged_lse = fa.merge_states(out, lse)
    torch.testing.assert_close(merged.double(), scores.softmax(-1) @ values, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged_lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)


def test_merge_states_ignores_empty_states_and_keeps_all_empty_ones_empty() -> None:
    out = torch.randn(2, 2, 1, 3)
    lse = torch.tensor([[[0.5], [-math.inf]], [[-math.inf], [-math.inf]]])
    out[1] = math.nan  # an empty state's output has no meaning
    out[0, 1] = math.nan
    merged, merged_lse = fa.merge_states(out, lse)
    torch.testing.assert_close(merged[0], out[0, 0])
    assert merged[1].eq(0).all()
    assert merged_lse.flatten().tolist() == [0.5, -math.inf]


@pytest.mark.parametrize("backend", ["triton", "cuda", "flash_attn"])
def test_absent_backends_are_refused_by_name(open_step: Any, backend: Any) -> None:
    cache, step, q = open_step
    with pytest.raises(fa.Unsupported, match=backend):
        fa.tree_attention(q, *cache.layer(0), step.plan, backend=backend)
    with pytest.raises(fa.Unsupported, match=backend):
        make_cache(backend=backend)


def test_the_environment_sets_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORK_ATTN_BACKEND", "reference")
    assert make_cache().backend == "reference"
    assert make_cache(backend="cpu").backend == "cpu"
    monkeypatch.setenv("FORK_ATTN_BACKEND", "abacus")
    with pytest.raises(ValueError, match="FORK_ATTN_BACKEND"):
        make_cache()


def _arguments(open_step: Any) -> dict[str, Any]:
    cache, step, q = open_step
    k_cache, v_cache = cache.layer(0)
    return {"q": q, "k_cache": k_cache, "v_cache": v_cache, "plan": step.plan}


BAD_ARGUMENTS = [
    ("q", lambda a: a["q"][:-1], ValueError, r"q: expected shape \(6, "),
    ("q", lambda a: a["q"].double(), TypeError, "q: expected dtype"),
    ("q", lambda a: a["q"][:, :5], ValueError, "group"),
    ("q", lambda a: a["q"].transpose(1, 2).contiguous().transpose(1, 2), ValueError, "contiguous"),
    ("k_cache", lambda a: a["k_cache"].bfloat16(), TypeError, "k_cache: expected dtype"),
    ("k_cache", lambda a: a["k_cache"][..., :4], ValueError, "k_cache: expected shape"),
    ("v_cache", lambda a: a["v_cache"][:1], ValueError, "pages"),
    ("v_cache", lambda a: a["v_cache"].flatten(2), ValueError, "v_cache: expected shape"),
    ("k_cache", lambda a: a["k_cache"].to("meta"), ValueError, "k_cache: expected device"),
    ("plan", lambda a: a["plan"].buffer, TypeError, "plan: expected a Plan"),
    ("softcap", lambda a: 0.0, ValueError, "softcap"),
    ("softcap", lambda a: -1.0, ValueError, "softcap"),
    ("sinks", lambda a: torch.zeros(HEADS + 1), ValueError, "sinks: expected shape"),
    ("sinks", lambda a: torch.zeros(HEADS).double(), TypeError, "sinks: expected dtype"),
    ("backend", lambda a: "gpu", ValueError, "backend: expected one of"),
]


@pytest.mark.parametrize(("name", "make", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    open_step: Any, name: str, make: Any, error: type[Exception], message: str
) -> None:
    arguments = _arguments(open_step)
    arguments[name] = make(arguments)
    with pytest.raises(error, match=message):
        fa.tree_attention(**arguments)
