"""The flash_attn backend: its tables and calls, against a stand-in with flash-attn's signatures."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cache_pair import CachePair
from kv_table import Model
from torch import Tensor

from fork_attn import Draft, ForkedKVCache, NotDense, Unsupported, ops_flash, tree_attention
from fork_attn.reference import attention

MODEL = Model()


def paged_attention(
    q: Tensor, caches: tuple[Tensor, Tensor], table: Tensor, cu_q: Tensor, lengths: Tensor,
    softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    assert causal and table.dtype == cu_q.dtype == lengths.dtype == torch.int32
    outs = []
    for i, length in enumerate(lengths.tolist()):
        rows = q[int(cu_q[i]) : int(cu_q[i + 1])]
        k, v = (cache[table[i].long()].flatten(0, 1)[:length] for cache in caches)
        at = torch.arange(length - len(rows), length)[:, None]
        mask = torch.arange(length) <= at
        if window_size[0] >= 0:
            mask &= at - torch.arange(length) <= window_size[0]
        out, _ = attention(
            rows, k, v, mask, softmax_scale=softmax_scale, softcap=softcap or None,
            sinks=None, dtype=q.dtype,
        )  # fmt: skip
        outs.append(out)
    return torch.cat(outs)


def fa3(calls: list[str]) -> ModuleType:
    module = ModuleType("flash_attn_interface")

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, k: None = None, v: None = None,
        qv: None = None, rotary_cos: None = None, rotary_sin: None = None,
        cache_seqlens: Any = None, cache_batch_idx: None = None, cache_leftpad: None = None,
        page_table: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: None = None,
        max_seqlen_q: int | None = None, rotary_seqlens: None = None, q_descale: None = None,
        k_descale: None = None, v_descale: None = None, softmax_scale: Any = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0,
        softcap: float = 0.0, num_splits: int = 0, return_softmax_lse: bool = False,
    ) -> Tensor:  # fmt: skip
        calls.append("fa3")
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        scores = (softmax_scale, causal, window_size, softcap)
        caches = (k_cache, v_cache)
        return paged_attention(q, caches, page_table, cu_seqlens_q, cache_seqlens, *scores)

    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    return module


def fa2(calls: list[str]) -> ModuleType:
    module = ModuleType("flash_attn")

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: Any = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        alibi_slopes: None = None, deterministic: bool = False, return_attn_probs: bool = False,
        block_table: Any = None,
    ) -> Tensor:  # fmt: skip
        calls.append("fa2")
        lengths = cu_seqlens_k.diff()
        assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), lengths.max())
        scores = (softmax_scale, causal, window_size, softcap)
        return paged_attention(q, (k, v), block_table, cu_seqlens_q, lengths, *scores)

    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


@pytest.fixture(params=["fa3", "fa2"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    module = {"fa3": fa3, "fa2": fa2}[request.param](made)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__spec__ = SimpleNamespace(name=module.__name__)  # type: ignore[assignment]
    return made


def flash_pair(tail: str = "copy", page_size: int = 4) -> CachePair:
    """A cache on the CPU that attends by the stand-in."""
    pair = CachePair(MODEL, num_pages=80, page_size=page_size, tail=tail)
    pair.cache.backend = "flash_attn"
    return pair


def test_forks_with_dense_tables_equal_the_oracle(calls: list[str]) -> None:
    pair = flash_pair()
    root = pair.new_branch()
    pair.step({root: 10}, attend=True)
    a, b, c = pair.fork(root, 3)
    pair.step({a: 3, b: 1, c: 6}, attend=True)
    pair.step({c: 1, root: 2, a: 1}, attend=True, softcap=3.0)
    pair.crop(c, 5)
    pair.step({c: 2, b: 1}, attend=True)
    pair.check()
    assert len(calls) == 4 * len(MODEL.windows)


def test_what_it_cannot_do_is_refused_by_name(calls: list[str]) -> None:
    pair = flash_pair()
    root = pair.new_branch()
    pair.step({root: 6}, attend=True)
    a, b = pair.fork(root, 2)
    pair.step({a: 3, b: 3}, attend=True)

    def attend(branch: Any, count: Any, error: type[Exception], match: str, **options: Any) -> None:
        with pair.open({branch: count}) as step:
            with pytest.raises(error, match=match):
                pair.attend(pair.rows({branch: count}), step, **options)
            step.rollback()

    attend(a, Draft([-1, -1]), Unsupported, "no draft trees")
    attend(a, 1, Unsupported, "sinks: backend", sinks=torch.zeros(MODEL.num_q_heads))
    pair.join(root, [a, b])
    attend(root, 1, NotDense, "branch")
    lonely = pair.new_branch()
    pair.step({lonely: 4}, attend=True)
    pair.set_position(lonely, 9)
    attend(lonely, 1, Unsupported, "sliding_window: backend")
    sealed = flash_pair("seal")
    root = sealed.new_branch()
    sealed.step({root: 6}, attend=True)
    child, other = sealed.fork(root, 2)
    sealed.step({child: 1}, attend=True)
    pair = sealed
    attend(other, 1, NotDense, "its new token 6 lies in slot 0")


def test_where_it_cannot_run_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_layers": 1, "num_pages": 4, "num_q_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    with pytest.raises(Unsupported, match="neither is installed"):
        ForkedKVCache(**sizes, backend="flash_attn")  # type: ignore[arg-type]
    monkeypatch.setattr(ops_flash, "installed", lambda: 2)
    with pytest.raises(Unsupported, match="cannot attend on cpu"):
        ForkedKVCache(**sizes, backend="flash_attn")  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="multiples of 256 slots, got 16"):
        ops_flash.require_pages(16)
    ops_flash.require_pages(512)
    monkeypatch.setattr(ops_flash, "require", lambda device: None)
    pair = flash_pair()
    root = pair.new_branch()
    with pair.open({root: 1}) as step:
        q = torch.zeros(1, MODEL.num_q_heads, MODEL.head_dim)
        with pytest.raises(Unsupported, match="use ForkedKVCache"):
            tree_attention(q, *pair.cache.layer(0), step.plan, backend="flash_attn")
        step.rollback()
