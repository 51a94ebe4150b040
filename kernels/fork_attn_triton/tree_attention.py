"""Tree attention over a plan (csrc/core/plan.h) in one launch: docs/kernels/tree_attention.md.

A persistent grid: program p takes units (span, KV head) p, p + programs, ... and reads every count
and offset from the plan on the device, so that one captured launch serves any plan that fits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fork_attn.kernels.chunks import stream_chunks
from fork_attn.kernels.partials import arrive, merge_partials, write_rows
from fork_attn.kernels.plan_fields import (
    NUM_SPANS,
    NUM_TOKENS,
    OFF_BLOCKS,
    OFF_ITEMS,
    OFF_POSITIONS,
    OFF_Q_ROWS,
    OFF_SPANS,
    OFF_TOKENS,
    section,
)
from fork_attn.kernels.stream import stream
from fork_attn.kernels.tiles import end_rows, end_state


@triton.jit
def _serve(
    first, head, token_begin, num_tokens, run_begin, run_end, partial_begin,
    q, k_cache, v_cache, k_desc, v_desc, plan32, pages, out, lse, partial_out, partial_lse,
    sinks, k_scale, v_scale, q_row, q_head, softmax_scale, softcap,
    NUM_KV_HEADS: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, ISOLATE: tl.constexpr,
    INVARIANT: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + BLOCK_M) of an item, from queries to output or partial rows.

    Returns whether a result is not finite (1) or all are (0).
    """
    NUM_Q_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    t = m // GROUP
    head_q = head * GROUP + m % GROUP
    ok = t < num_tokens
    scale = softmax_scale
    value_scale = 1.0
    if HAS_K_SCALE:
        scale = softmax_scale * tl.load(k_scale + head)
    if HAS_V_SCALE:
        value_scale = tl.load(v_scale + head)
    row_q = tl.load(section(plan32, OFF_Q_ROWS) + token_begin + t, mask=ok, other=0)
    q_at = row_q.to(tl.int64) * q_row + head_q * q_head
    q_mask = ok[:, None] & (d < D)[None, :]
    q_tile = tl.load(q + q_at[:, None] + d[None, :], mask=q_mask, other=0.0)
    bit_low = tl.where(ok & (t < 32), 1 << (t & 31), 0)
    bit_high = tl.where(ok & (t >= 32), 1 << (t & 31), 0)
    positions = t
    max_position = 0
    if HAS_WINDOW:
        where = section(plan32, OFF_POSITIONS) + token_begin + t
        positions = tl.load(where, mask=ok, other=0)
        max_position = tl.max(positions, 0)
    if INVARIANT:
        acc, state_lse = stream_chunks(
            q_tile, bit_low, bit_high, t, positions, num_tokens, max_position, head,
            run_begin, run_end, plan32, pages, k_cache, v_cache, scale, value_scale, softcap,
            K_STRIDES, V_STRIDES, PAGE_SIZE, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, WIDE,
            HAS_WINDOW, HAS_SOFTCAP, STAGES, PRECISION, ISOLATE,
        )  # fmt: skip
    else:
        top, total, acc = stream(
            q_tile, bit_low, bit_high, t, positions, num_tokens, max_position, head,
            run_begin, run_end, plan32, pages, k_cache, v_cache, k_desc, v_desc, scale, softcap,
            K_STRIDES, V_STRIDES, PAGE_SIZE, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, WIDE,
            HAS_WINDOW, HAS_SOFTCAP, TMA, STAGES, PRECISION, ISOLATE, False,
        )  # fmt: skip
    if partial_begin >= 0:
        if INVARIANT:
            factor, row_lse = end_state(state_lse, state_lse, False)
        else:
            factor, row_lse = end_rows(top, total, top, False)
            factor = factor * value_scale
        at = (partial_begin + t).to(tl.int64) * NUM_Q_HEADS + head_q
        write_rows(partial_out, partial_lse, at, acc, factor, row_lse, ok, DV, BLOCK_DV)
    else:
        sink = 0.0
        if HAS_SINKS:
            sink = tl.load(sinks + head_q)
        if INVARIANT:
            factor, row_lse = end_state(state_lse, sink, HAS_SINKS)
        else:
            factor, row_lse = end_rows(top, total, sink, HAS_SINKS)
            factor = factor * value_scale
        row = tl.load(section(plan32, OFF_TOKENS) + token_begin + t, mask=ok, other=0)
        at = row.to(tl.int64) * NUM_Q_HEADS + head_q
        write_rows(out, lse, at, acc, factor, row_lse, ok, DV, BLOCK_DV)
    return tl.max(tl.max((tl.abs(acc) < float("inf")).to(tl.int32) ^ 1, 1), 0)


@triton.jit(noinline=True)
def _serve_isolated(
    first, head, token_begin, num_tokens, run_begin, run_end, partial_begin,
    q, k_cache, v_cache, plan32, pages, out, lse, partial_out, partial_lse,
    sinks, k_scale, v_scale, q_row, q_head, softmax_scale, softcap,
    NUM_KV_HEADS: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr, PRECISION: tl.constexpr, INVARIANT: tl.constexpr,
):  # fmt: skip
    """`_serve` of ROWS rows again, slowly, with ISOLATE."""
    for begin in range(first, tl.minimum(first + ROWS, num_tokens * GROUP), BLOCK_M):
        _serve(
            begin, head, token_begin, num_tokens, run_begin, run_end, partial_begin,
            q, k_cache, v_cache, None, None, plan32, pages, out, lse, partial_out, partial_lse,
            sinks, k_scale, v_scale, q_row, q_head, softmax_scale, softcap,
            NUM_KV_HEADS, K_STRIDES, V_STRIDES, GROUP, PAGE_SIZE, D, DV, BLOCK_D, BLOCK_DV,
            BLOCK_M, BLOCK_N, WIDE, HAS_WINDOW, HAS_SOFTCAP, HAS_SINKS, HAS_K_SCALE,
            HAS_V_SCALE, False, 1, PRECISION, True, INVARIANT,
        )  # fmt: skip


@triton.jit
def _merge_item(
    tokens, num_tokens, head, plan32, out, lse, partial_out, partial_lse, counters, sinks,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, ROWS: tl.constexpr, HAS_SINKS: tl.constexpr, INVARIANT: tl.constexpr,
):  # fmt: skip
    """An item's arrival; if it was the last of some tokens, their merging, ROWS rows at a time."""
    last = arrive(tokens, num_tokens, head, plan32, counters, NUM_KV_HEADS, BLOCK_T)
    if tl.max(last, 0) != 0:
        for first in range(0, num_tokens * GROUP, ROWS):
            m = first + tl.arange(0, ROWS)
            t = m // GROUP
            ok = t < num_tokens
            mine = tl.gather(last, tl.minimum(t, BLOCK_T - 1), 0) != 0
            token = tl.load(tokens + t, mask=ok, other=0)
            merge_partials(
                token, head * GROUP + m % GROUP, ok & mine, plan32, out, lse, partial_out,
                partial_lse, sinks, NUM_KV_HEADS * GROUP, DV, BLOCK_DV, ROWS, 4, HAS_SINKS,
                INVARIANT,
            )  # fmt: skip


# What differs from step to step is no part of the specialisation: a body is compiled once.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["plan"])
def tree_attention_kernel(
    q, k_cache, v_cache, k_desc, v_desc, plan, pages, out, lse, partial_out, partial_lse,
    counters, sinks, k_scale, v_scale, num_rows, q_row, q_head, softmax_scale, softcap,
    NUM_KV_HEADS: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, WIDE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    CALLS: tl.constexpr, INVARIANT: tl.constexpr, MERGE: tl.constexpr, MERGE_ROWS: tl.constexpr,
    FAR_HEADS: tl.constexpr,
):  # fmt: skip
    """See `launch.tree_attention`, which says what the arguments are."""
    program = tl.program_id(0)
    if FAR_HEADS:
        q_head = q_head.to(tl.int64)
    plan32 = plan.to(tl.pointer_type(tl.int32))
    blocks = section(plan32, OFF_BLOCKS)
    items = section(plan32, OFF_ITEMS)
    spans = section(plan32, OFF_SPANS)
    num_spans = tl.load(plan32 + NUM_SPANS)
    NUM_Q_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    # Where a result is not finite, small tiles do; batch-invariant launches keep to theirs.
    SLOW_ROWS: tl.constexpr = BLOCK_M if INVARIANT else 16
    SLOW_SLOTS: tl.constexpr = BLOCK_N if INVARIANT else 16
    for unit in range(program, num_spans * NUM_KV_HEADS, tl.num_programs(0)):
        head = unit // num_spans
        span = unit % num_spans
        for item in range(tl.load(spans + span), tl.load(spans + span + 1)):
            block = tl.load(items + 4 * item)
            run_begin = tl.load(items + 4 * item + 1)
            run_end = tl.load(items + 4 * item + 2)
            partial_begin = tl.load(items + 4 * item + 3)
            token_begin = tl.load(blocks + 2 * block)
            num_tokens = tl.load(blocks + 2 * block + 1)
            tokens = section(plan32, OFF_TOKENS) + token_begin
            for first in range(0, num_tokens * GROUP, BLOCK_M):
                broken = _serve(
                    first, head, token_begin, num_tokens, run_begin, run_end, partial_begin,
                    q, k_cache, v_cache, k_desc, v_desc, plan32, pages, out, lse, partial_out,
                    partial_lse, sinks, k_scale, v_scale, q_row, q_head, softmax_scale, softcap,
                    NUM_KV_HEADS, K_STRIDES, V_STRIDES, GROUP, PAGE_SIZE, D, DV, BLOCK_D, BLOCK_DV,
                    BLOCK_M, BLOCK_N, WIDE, HAS_WINDOW, HAS_SOFTCAP, HAS_SINKS, HAS_K_SCALE,
                    HAS_V_SCALE, TMA, STAGES, PRECISION, False, INVARIANT,
                )  # fmt: skip
                if broken != 0:
                    if CALLS:
                        _serve_isolated(
                            first, head, token_begin, num_tokens, run_begin, run_end,
                            partial_begin, q, k_cache, v_cache, plan32, pages, out, lse,
                            partial_out, partial_lse, sinks, k_scale, v_scale, q_row, q_head,
                            softmax_scale, softcap, NUM_KV_HEADS, K_STRIDES, V_STRIDES, GROUP,
                            PAGE_SIZE, D, DV, BLOCK_D, BLOCK_DV, SLOW_ROWS, SLOW_SLOTS, BLOCK_M,
                            WIDE, HAS_WINDOW, HAS_SOFTCAP, HAS_SINKS, HAS_K_SCALE, HAS_V_SCALE,
                            PRECISION, INVARIANT,
                        )  # fmt: skip
                    else:
                        _serve(
                            first, head, token_begin, num_tokens, run_begin, run_end,
                            partial_begin, q, k_cache, v_cache, None, None, plan32, pages, out,
                            lse, partial_out, partial_lse, sinks, k_scale, v_scale, q_row, q_head,
                            softmax_scale, softcap, NUM_KV_HEADS, K_STRIDES, V_STRIDES, GROUP,
                            PAGE_SIZE, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, SLOW_SLOTS, WIDE,
                            HAS_WINDOW, HAS_SOFTCAP, HAS_SINKS, HAS_K_SCALE, HAS_V_SCALE, False, 1,
                            PRECISION, True, INVARIANT,
                        )  # fmt: skip
            if MERGE:  # noqa: SIM102, known when compiled
                if partial_begin >= 0:
                    _merge_item(
                        tokens, num_tokens, head, plan32, out, lse, partial_out, partial_lse,
                        counters, sinks, NUM_KV_HEADS, GROUP, DV, BLOCK_DV, BLOCK_T, MERGE_ROWS,
                        HAS_SINKS, INVARIANT,
                    )  # fmt: skip
    # Rows past the plan's (a captured step is as wide as it may become) see nothing.
    dv = tl.arange(0, BLOCK_DV)
    for row in range(tl.load(plan32 + NUM_TOKENS) + program, num_rows, tl.num_programs(0)):
        here = tl.zeros([1], tl.int64) + row
        for head_q in range(NUM_Q_HEADS):
            nothing = tl.full([1], -float("inf"), tl.float32)
            if HAS_SINKS:
                nothing = tl.load(sinks + head_q + tl.zeros([1], tl.int32))
            at = out + (here * NUM_Q_HEADS + head_q) * DV
            tl.store(at + dv, tl.zeros([BLOCK_DV], out.dtype.element_ty), mask=dv < DV)
            tl.store(lse + here * NUM_Q_HEADS + head_q, nothing)
