"""Attention kernels to compare with, each over the same physical pages.

A rival is a function from inputs to a `Ready` call, or it raises `Absent` with the reason. One that
is not installed, or cannot do a shape, is named in the results and never left out in silence.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from cases import PAGE_SIZE, PagedInputs
from torch import Tensor

WORKSPACE_BYTES = 256 << 20


class Absent(Exception):
    """Why a rival does not run here."""


@dataclass(frozen=True)
class Ready:
    run: Callable[[], Tensor]  # -> (n, q_heads, head_dim)
    plan: Callable[[], None] | None = None  # what it computes on the host once per step


def _load(name: str, inputs: PagedInputs) -> ModuleType:
    if inputs.q.device.type != "cuda":
        raise Absent(f"{name} needs a CUDA device")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken wheel fails with anything at all; the reason is recorded
        raise Absent(f"import {name}: {type(error).__name__}: {error}") from error


def sdpa(inputs: PagedInputs) -> Ready:
    """torch SDPA over K and V gathered beforehand: reads the prefix once per branch."""
    if inputs.q.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        case = inputs.case
        needed = 4 * case.branches * case.length * case.kv_heads * case.head_dim * 2
        if needed > free:
            raise Absent(f"gathering needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    k, v = inputs.dense
    q = inputs.q.unsqueeze(2)
    return Ready(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True).squeeze(2))


def fa3(inputs: PagedInputs) -> Ready:
    """FlashAttention-3 over the page table: no sharing."""
    module = _load("flash_attn_interface", inputs)
    q = inputs.q.unsqueeze(1)
    lengths = torch.full((len(q),), inputs.case.length, dtype=torch.int32, device=q.device)

    def run() -> Tensor:
        out: Tensor = module.flash_attn_with_kvcache(
            q, inputs.k_cache, inputs.v_cache, cache_seqlens=lengths, page_table=inputs.page_table
        )
        return out.squeeze(1)

    return Ready(run)


def _last_page(length: int, count: int) -> Tensor:
    return torch.full((count,), (length - 1) % PAGE_SIZE + 1, dtype=torch.int32)


def _indptr(count: int, each: int) -> Tensor:
    return torch.arange(count + 1, dtype=torch.int32) * each


def _workspace(inputs: PagedInputs) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device)


def flashinfer_decode(inputs: PagedInputs, tensor_cores: bool) -> Ready:
    """FlashInfer's batch decode: no sharing."""
    flashinfer = _load("flashinfer", inputs)
    case = inputs.case
    pages = inputs.page_table.shape[1]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(inputs), "NHD", use_tensor_cores=tensor_cores
    )
    arguments = (
        _indptr(case.branches, pages),
        inputs.page_table.flatten(),
        _last_page(case.suffix, case.branches),
    )
    heads = (case.q_heads, case.kv_heads, case.head_dim, PAGE_SIZE)
    types: dict[str, Any] = {"q_data_type": inputs.q.dtype, "kv_data_type": inputs.k_cache.dtype}
    return Ready(
        run=lambda: wrapper.run(inputs.q, (inputs.k_cache, inputs.v_cache)),
        plan=lambda: wrapper.plan(*arguments, *heads, **types),
    )


def flashinfer_cascade(inputs: PagedInputs) -> Ready:
    """FlashInfer's two-level cascade: the prefix once for all branches, then the suffixes."""
    flashinfer = _load("flashinfer", inputs)
    case = inputs.case
    if not inputs.prefix_pages:
        raise Absent("no shared prefix in this shape")
    n, device = case.branches, inputs.q.device
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(inputs), "NHD")

    def both(prefix: Tensor, suffix: Tensor) -> list[Tensor]:
        return [prefix.to(device), suffix.to(device)]

    arguments = (
        both(_indptr(1, n), _indptr(n, 1)),
        both(_indptr(1, inputs.prefix_pages), _indptr(n, inputs.suffix_pages)),
        both(
            inputs.page_table[0, : inputs.prefix_pages],
            inputs.page_table[:, inputs.prefix_pages :].flatten(),
        ),
        both(_last_page(case.prefix, 1), _last_page(case.suffix, n)),
    )
    heads = (case.q_heads, case.kv_heads, case.head_dim, PAGE_SIZE)
    return Ready(
        run=lambda: wrapper.run(inputs.q, (inputs.k_cache, inputs.v_cache)),
        plan=lambda: wrapper.plan(*arguments, *heads, q_data_type=inputs.q.dtype),
    )


def flashinfer_batch_attention(inputs: PagedInputs) -> Ready:
    """FlashInfer's persistent BatchAttention: no sharing."""
    flashinfer = _load("flashinfer", inputs)
    case = inputs.case
    n, device = case.branches, inputs.q.device
    wrapper = flashinfer.BatchAttention("NHD", str(device))
    arguments = (
        _indptr(n, 1).to(device),
        _indptr(n, inputs.page_table.shape[1]).to(device),
        inputs.page_table.flatten(),
        torch.full((n,), case.length, dtype=torch.int32, device=device),
        case.q_heads,
        case.kv_heads,
        case.head_dim,
        case.head_dim,
        PAGE_SIZE,
    )
    types: dict[str, Any] = {"q_data_type": inputs.q.dtype, "kv_data_type": inputs.k_cache.dtype}
    return Ready(
        run=lambda: wrapper.run(inputs.q, (inputs.k_cache, inputs.v_cache))[0],
        plan=lambda: wrapper.plan(*arguments, **types),
    )


RIVALS: dict[str, Callable[[PagedInputs], Ready]] = {
    "sdpa_dense": sdpa,
    "fa3_paged": fa3,
    "flashinfer_decode": lambda inputs: flashinfer_decode(inputs, tensor_cores=False),
    "flashinfer_decode_tensor_cores": lambda inputs: flashinfer_decode(inputs, tensor_cores=True),
    "flashinfer_batch_attention": flashinfer_batch_attention,
    "flashinfer_cascade": flashinfer_cascade,
}


def prepare(name: str, inputs: PagedInputs) -> tuple[Ready, float | None]:
    """A rival with its plan made, and the median seconds that planning took on the host.

    Raises:
        Absent: it is not here, or it failed on this shape, or its output is wrong.
    """
    ready = RIVALS[name](inputs)
    try:
        seconds = _time_plan(ready.plan)
        out = ready.run()
        if inputs.q.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # one rival's failure must not cost the others' numbers
        raise Absent(f"failed: {type(error).__name__}: {error}") from error
    _check(out, inputs)
    return ready, seconds


def _time_plan(plan: Callable[[], None] | None, rounds: int = 10) -> float | None:
    if plan is None:
        return None
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        plan()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[rounds // 2]


def _check(out: Tensor, inputs: PagedInputs) -> None:
    """First and last branch against float64. The bound leaves room for 16-bit probabilities."""
    for branch in (0, inputs.case.branches - 1):
        expected = inputs.oracle(branch)
        error = (out[branch].double() - expected).abs().max().item()
        bound = 0.02 * expected.abs().max().item()
        if not error <= bound:
            raise Absent(f"wrong: branch {branch} is off by {error:.2e}, the bound is {bound:.2e}")
