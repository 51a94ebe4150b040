"""Attention over a plan, as torch custom ops with an explicit choice of backend."""

from __future__ import annotations

import math
from typing import Literal

import torch

from fork_attn import _C, _env, checks, ops_flash, ops_triton
from fork_attn.errors import Unsupported
from fork_attn.kv_library import DTYPE_CODES, paged_argument, pointer, rows_argument, where
from fork_attn.plan import Plan

Backend = Literal["auto", "cpu", "triton", "cuda", "flash_attn", "reference"]
BACKENDS: tuple[str, ...] = ("auto", "cpu", "triton", "cuda", "flash_attn", "reference")
AVAILABLE: tuple[str, ...] = ("cpu", "triton", "flash_attn", "reference")

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_library = torch.library.Library("fork_attn", "DEF")
_library.define(
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor plan, float softmax_scale, "
    "float softcap, Tensor? sinks, Tensor? k_scale=None, Tensor? v_scale=None) -> (Tensor, Tensor)"
)
_library.define("merge_states(Tensor out, Tensor lse) -> (Tensor, Tensor)")


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that will run: `backend` itself, or what "auto" means here.

    Raises:
        ValueError: no such backend.
        Unsupported: this version has no such backend, or it cannot work on `device`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = _env.default_backend()
        if backend not in BACKENDS:
            raise ValueError(
                f"FORK_ATTN_BACKEND: expected one of {', '.join(BACKENDS)}, got {backend!r}"
            )
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "cpu"
    if backend not in AVAILABLE:
        raise Unsupported(
            f"backend {backend!r} is not part of this version; it has {', '.join(AVAILABLE)}"
        )
    if backend == "cpu" and device.type not in ("cpu", "meta"):
        raise Unsupported(f"backend 'cpu' cannot attend on {device}")
    if backend == "triton":
        ops_triton.require_triton(device)
    if backend == "flash_attn":
        ops_flash.require(device)
    return backend


def backend_states() -> dict[str, str]:
    """Of every backend "available", or why it cannot run on any device that is here."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    return {name: _state(name, devices) for name in BACKENDS if name != "auto"}


def _state(backend: str, devices: list[torch.device]) -> str:
    why = ""
    for device in devices:
        try:
            resolve_backend(backend, device)
        except Unsupported as error:
            why = str(error).removeprefix(f"backend {backend!r} ").removeprefix("is ")
        else:
            return "available"
    return why


def _tree_attention_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: torch.Tensor,
    softmax_scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_q_heads, head_dim = q.shape
    _, _, num_kv_heads, head_dim_v = v_cache.shape
    out = q.new_empty((num_tokens, num_q_heads, head_dim_v))
    lse = q.new_empty((num_tokens, num_q_heads), dtype=torch.float32)
    _C.tree_attention_cpu(
        plan.data_ptr(),
        rows_argument(q),
        paged_argument(k_cache),
        paged_argument(v_cache),
        rows_argument(out),
        lse.data_ptr(),
        pointer(sinks),
        pointer(k_scale),
        pointer(v_scale),
        _DTYPES[q.dtype],
        DTYPE_CODES[k_cache.dtype],
        num_q_heads,
        num_kv_heads,
        head_dim,
        head_dim_v,
        softmax_scale,
        softcap,
    )
    return out, lse


def _tree_attention_fake(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: torch.Tensor,
    softmax_scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty((q.shape[0], q.shape[1], v_cache.shape[3]))
    return out, q.new_empty((q.shape[0], q.shape[1]), dtype=torch.float32)


def _merge_states_cpu(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    states, lses = out.float().contiguous(), lse.contiguous()
    num_states, rows, num_heads, dim = states.shape
    merged = states.new_empty((rows, num_heads, dim))
    merged_lse = states.new_empty((rows, num_heads))
    _C.merge_states_cpu(
        states.data_ptr(),
        lses.data_ptr(),
        num_states,
        rows,
        num_heads,
        dim,
        merged.data_ptr(),
        merged_lse.data_ptr(),
    )
    return merged.to(out.dtype), merged_lse


def _merge_states_cuda(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    states, lses = out.contiguous(), lse.contiguous()
    num_states, rows, num_heads, dim = states.shape
    merged = states.new_empty((rows, num_heads, dim))
    merged_lse = lses.new_empty((rows, num_heads))
    _C.merge_states_cuda(
        where(states),
        states.data_ptr(),
        lses.data_ptr(),
        _DTYPES[states.dtype],
        num_states,
        rows,
        num_heads,
        dim,
        merged.data_ptr(),
        merged_lse.data_ptr(),
    )
    return merged, merged_lse


def _merge_states_fake(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return out.new_empty(out.shape[1:]), lse.new_empty(lse.shape[1:])


_library.impl("tree_attention", _tree_attention_cpu, "CPU")
_library.impl("merge_states", _merge_states_cpu, "CPU")
_library.impl("merge_states", _merge_states_cuda, "CUDA")
torch.library.register_fake("fork_attn::tree_attention", _tree_attention_fake, lib=_library)
torch.library.register_fake("fork_attn::merge_states", _merge_states_fake, lib=_library)


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Plan,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query row over the slots that the plan lets it see; shared slots are read
    once.

    Scores are q . k * k_scale * softmax_scale, then the softcap, then the mask, then the softmax,
    accumulated in fp32 and merged over work items by their log-sum-exps (FlashAttention-2, arXiv
    2307.08691).

    Args:
        q: (T, num_q_heads, head_dim), the step's rows in order. fp32, bf16 or fp16. Where the plan
            has rotations, their copies stand behind (`fork_attn.rope.with_rotations`).
        k_cache: (num_pages, page_size, num_kv_heads, head_dim), the dtype of `q` or float8_e4m3fn;
            any strides, last dimension contiguous.
        v_cache: (num_pages, page_size, num_kv_heads, head_dim_v), likewise.
        plan: of the open step, for this layer's sliding window and GQA group.
        softmax_scale: None means head_dim ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); None means no cap.
        sinks: (num_q_heads,) fp32 logits that join each row's softmax without a value (attention
            sinks, gpt-oss).
        k_scale: (num_kv_heads,) fp32, what the K in an e4m3 cache is multiplied with; None means 1.
        v_scale: (num_kv_heads,) fp32, likewise for V.
        backend: "auto" ("triton" for CUDA tensors, else "cpu"), "cpu", "triton", or "reference"
            (float64, slow). `FORK_ATTN_BACKEND` sets what "auto" means. With TRITON_INTERPRET=1
            "triton" takes CPU tensors.

    Returns:
        (out, lse): (T, num_q_heads, head_dim_v) in the dtype of `q`, and (T, num_q_heads) fp32,
            natural log, sinks
        included. A row that sees nothing has out 0 and lse -inf (with sinks: lse = sink).

    Raises:
        ValueError, TypeError: a shape, dtype, device or stride is off.
        Unsupported: the backend cannot do this.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}")
    backend_name = resolve_backend(backend, q.device)
    num_rotations = 0 if plan.rotations is None else len(plan.rotations)
    num_rows = plan.counts["num_tokens"] + num_rotations
    q = checks.tensor("q", q, shape=(num_rows, "num_q_heads", "head_dim"))
    if q.dtype not in _DTYPES:
        raise TypeError(f"q: expected dtype float32, bfloat16 or float16, got {q.dtype}")
    num_q_heads, head_dim = q.shape[1], q.shape[2]
    if num_q_heads % plan.group:
        raise ValueError(
            f"q: expected a multiple of the plan's group {plan.group} heads, got {num_q_heads}"
        )
    paged = ("num_pages", plan.page_size, num_q_heads // plan.group)
    checks.tensor("k_cache", k_cache, shape=(*paged, head_dim), device=q.device)
    if k_cache.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise TypeError(
            f"k_cache: expected dtype {q.dtype} (that of q) or float8_e4m3fn, got {k_cache.dtype}"
        )
    shape = (*paged, "head_dim_v")
    checks.tensor("v_cache", v_cache, shape=shape, dtype=k_cache.dtype, device=q.device)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            if k_cache.dtype != torch.float8_e4m3fn:
                raise ValueError(
                    f"{name}: expected None for a cache of {k_cache.dtype}, got a tensor"
                )
            checks.tensor(name, scale, shape=(paged[2],), dtype=torch.float32, device=q.device)
    if min(k_cache.shape[0], v_cache.shape[0]) < plan.page_limit:
        got = f"{k_cache.shape[0]} and {v_cache.shape[0]}"
        raise ValueError(
            f"k_cache, v_cache: expected at least the plan's {plan.page_limit} pages, got {got}"
        )
    options = check_scores(softmax_scale, softcap, sinks, num_q_heads, head_dim, q.device)
    return run_tree_attention(
        q, k_cache, v_cache, plan, *options, k_scale, v_scale, backend=backend_name
    )


def check_scores(
    softmax_scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    num_q_heads: int,
    head_dim: int,
    device: torch.device,
) -> tuple[float, float, torch.Tensor | None]:
    """`tree_attention`'s options as the op takes them: the scale, the cap or 0, the sinks.

    Raises:
        ValueError, TypeError: one is off.
    """
    if sinks is not None:
        checks.tensor("sinks", sinks, shape=(num_q_heads,), dtype=torch.float32, device=device)
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else float(softmax_scale)
    if softcap is None:
        return scale, 0.0, sinks
    cap = float(softcap)
    if not 0 < cap < math.inf:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    return scale, cap, sinks


def run_tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Plan,
    scale: float,
    cap: float,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    *,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tree_attention` of arguments that are checked, on a backend that is resolved.

    Raises:
        Unsupported: the backend cannot do this.
    """
    if backend == "flash_attn":
        raise Unsupported(
            "backend 'flash_attn' reads page tables, which a plan has not: use ForkedKVCache.attend"
        )
    if backend == "triton":
        if not torch.compiler.is_compiling():  # which cannot fold a device's compute capability
            ops_triton.check_supported(q, k_cache, v_cache)
        return ops_triton.run(q, k_cache, v_cache, plan, scale, cap, sinks, k_scale, v_scale)
    num_tokens = plan.counts["num_tokens"]
    if backend == "reference":
        from fork_attn.reference import tree_attention_reference

        return tree_attention_reference(
            *(q, k_cache, v_cache, plan.buffer),
            softmax_scale=scale,
            softcap=cap or None,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            pages=None if plan.on_device is None else plan.on_device.pages.cpu(),
        )
    if plan.on_device is not None:
        raise Unsupported(
            "backend 'cpu' reads plans that hold their own page lists; those of this plan stay on "
            "the device of a cache with backend 'triton'"
        )
    out, lse = torch.ops.fork_attn.tree_attention(
        q, k_cache, v_cache, plan.buffer, scale, cap, sinks, k_scale, v_scale
    )
    return (out, lse) if len(q) == num_tokens else (out[:num_tokens], lse[:num_tokens])


def merge_states(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges attention states over disjoint sets of keys into the state over their union, in index
    order.

    Args:
        out: (num_states, T, num_heads, head_dim_v), any of fp32, bf16, fp16; accumulated in fp32.
        lse: (num_states, T, num_heads) fp32, natural log; -inf marks an empty state.

    Returns:
        (T, num_heads, head_dim_v) in the dtype of `out` and (T, num_heads) fp32. Where all states
        are empty: 0, -inf.

    Raises:
        ValueError, TypeError: a shape, dtype or device is off.
        Unsupported: the states lie on a GPU and this build has no device code.
    """
    checks.tensor("out", out, shape=("num_states", "T", "num_heads", "head_dim_v"))
    checks.tensor("lse", lse, shape=out.shape[:3], dtype=torch.float32, device=out.device)
    if out.dtype not in _DTYPES:
        raise TypeError(f"out: expected dtype float32, bfloat16 or float16, got {out.dtype}")
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.fork_attn.merge_states(out, lse)
    return result
