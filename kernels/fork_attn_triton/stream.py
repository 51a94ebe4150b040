"""The inner loops of tree attention: rows of a block over the runs of an item."""

from __future__ import annotations

import triton
import triton.language as tl

from fork_attn.kernels.plan_fields import (
    DIAGONAL,
    GATHER,
    OFF_GATHER,
    OFF_RUNS,
    OFF_WORDS,
    PER_SLOT,
    RUN_INTS,
    WINDOW,
    WINDOW_SIZE,
    section,
)
from fork_attn.kernels.tiles import add_tile, scores


@triton.jit
def _load_rows(
    cache, page, offset, head, seen, STRIDES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of K or V by page and offset, (slots, BLOCK_D); 0 where not `seen`."""
    d = tl.arange(0, BLOCK_D)
    rows = cache + head.to(tl.int64) * STRIDES[2]
    at = page.to(tl.int64) * STRIDES[0] + offset.to(tl.int64) * STRIDES[1]
    mask = seen[:, None] & (d < D)[None, :] if D != BLOCK_D else seen[:, None]
    return tl.load(rows + at[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def stream(
    q, bit_low, bit_high, token, positions, num_tokens, max_position, head,
    run_begin, run_end, plan32, pages, k_cache, v_cache, k_desc, v_desc, scale, softcap,
    K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr, PAGE_SIZE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, ISOLATE: tl.constexpr,
    IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows over runs: (top, total, acc).

    Of each run first the tiles that all tokens see whole, without a mask, then the others; with
    IN_ORDER all tiles one after another, by the same instructions whoever sees them. With ISOLATE,
    V rows that hold Inf or NaN never meet a row that does not see them; rows that do become NaN.
    """
    runs = section(plan32, OFF_RUNS)
    words = section(plan32, OFF_WORDS)
    gather = section(plan32, OFF_GATHER)
    window = tl.load(plan32 + WINDOW_SIZE)
    n = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for r in range(run_begin, run_end):
        run = runs + r * RUN_INTS
        mask_low = tl.load(run)
        mask_high = tl.load(run + 1)
        page_begin = tl.load(run + 2)
        first_slot = tl.load(run + 3)
        num_slots = tl.load(run + 4)
        kind = tl.load(run + 6)
        diag = tl.load(run + 7)
        words_begin = tl.load(run + 8)
        diagonal = (kind & DIAGONAL) != 0
        gathered = (kind & GATHER) != 0
        worded = (kind & (PER_SLOT | GATHER)) != 0
        # Slots [low, high) that all tokens see, and end: that any may see.
        end = tl.where(diagonal, tl.minimum(num_slots, diag + num_tokens), num_slots)
        high = tl.where(diagonal, tl.minimum(num_slots, diag), num_slots)
        low = 0
        if HAS_WINDOW:
            first_position = tl.load(run + 5)
            windowed = (kind & WINDOW) != 0
            # A token `ahead` positions past the run's first sees slots from ahead - window + 1 on;
            # no sum here leaves 32 bits.
            ahead_most = max_position - first_position
            low = tl.where(windowed & (ahead_most >= window), ahead_most - window + 1, 0)
            low = tl.minimum(low, num_slots)
            ahead_rows = positions - first_position
            low_rows = tl.where(windowed & (ahead_rows >= window), ahead_rows - window + 1, 0)
        all_low = tl.where(num_tokens >= 32, -1, (1 << num_tokens) - 1)
        seen_by_all = mask_low == all_low
        if WIDE:
            all_high = tl.where(num_tokens >= 64, -1, (1 << tl.maximum(num_tokens - 32, 0)) - 1)
            seen_by_all = seen_by_all & (mask_high == all_high)
        # Tiles begin on pages where descriptors load them, and at the run's first slot elsewhere.
        start = 0 if TMA else first_slot
        ahead = first_slot - start
        num_tiles = tl.cdiv(ahead + end, BLOCK_N)
        full_begin = tl.cdiv(ahead + low, BLOCK_N)
        full_end = (ahead + high) // BLOCK_N
        full = seen_by_all & (worded == 0) & (full_end > full_begin)
        full_begin = tl.where(full, full_begin, 0)
        full_end = tl.where(full, full_end, 0)
        if ISOLATE or IN_ORDER:
            full_begin = 0
            full_end = 0
        else:
            for tile in tl.range(full_begin, full_end, num_stages=STAGES):
                at = start + tile * BLOCK_N
                if TMA:
                    page = tl.load(pages + page_begin + at // PAGE_SIZE).to(tl.int64)
                    offset = at % PAGE_SIZE
                    k_row = page * (K_STRIDES[0] // K_STRIDES[1]) + offset
                    k_row += head * (K_STRIDES[2] // K_STRIDES[1])
                    v_row = page * (V_STRIDES[0] // V_STRIDES[1]) + offset
                    v_row += head * (V_STRIDES[2] // V_STRIDES[1])
                    k = k_desc.load([k_row.to(tl.int32), 0])
                    v = v_desc.load([v_row.to(tl.int32), 0])
                else:
                    page = tl.load(pages + page_begin + (at + n) // PAGE_SIZE)
                    offset = (at + n) % PAGE_SIZE
                    every = n >= 0
                    k = _load_rows(k_cache, page, offset, head, every, K_STRIDES, D, BLOCK_D)
                    v = _load_rows(v_cache, page, offset, head, every, V_STRIDES, DV, BLOCK_DV)
                s = scores(q, k.to(q.dtype), scale, softcap, HAS_SOFTCAP, PRECISION)
                top, total, acc, _ = add_tile(s, v.to(q.dtype), top, total, acc, PRECISION)
        table = tl.where(gathered, gather, pages)  # of slots or of pages
        limit = tl.where(diagonal, diag + token, num_slots)  # (rows,): sees slots below it
        for i in tl.range(0, num_tiles - (full_end - full_begin), num_stages=min(STAGES, 2)):
            tile = tl.where(i < full_begin, i, i + full_end - full_begin)
            at = start + tile * BLOCK_N + n
            j = at - first_slot
            inside = (j >= 0) & (j < end)
            where = words + 2 * (words_begin + j).to(tl.int64)
            word_low = tl.load(where, mask=inside & worded, other=-1) & mask_low
            word_high = word_low
            if WIDE:
                word_high = tl.load(where + 1, mask=inside & worded, other=-1) & mask_high
            inside = inside & ((word_low | word_high) != 0)
            listed = tl.load(
                table + page_begin + tl.where(gathered, j, at // PAGE_SIZE), mask=inside, other=0
            )
            page = tl.where(gathered, listed // PAGE_SIZE, listed)
            offset = tl.where(gathered, listed, at) % PAGE_SIZE
            k = _load_rows(k_cache, page, offset, head, inside, K_STRIDES, D, BLOCK_D)
            v = _load_rows(v_cache, page, offset, head, inside, V_STRIDES, DV, BLOCK_DV)
            s = scores(q, k.to(q.dtype), scale, softcap, HAS_SOFTCAP, PRECISION)
            seen = (word_low[None, :] & bit_low[:, None]) != 0
            if WIDE:
                seen = seen | ((word_high[None, :] & bit_high[:, None]) != 0)
            seen = seen & inside[None, :] & (j[None, :] < limit[:, None])
            if HAS_WINDOW:
                seen = seen & (j[None, :] >= low_rows[:, None])
            s = tl.where(seen, s, -float("inf"))
            if ISOLATE:
                values = v.to(tl.float32)
                finite = tl.abs(values) < float("inf")
                broken = tl.max((finite == 0).to(tl.int32), 1)
                v = tl.where(finite, values, 0.0).to(q.dtype)
                hit = tl.max(seen.to(tl.int32) * broken[None, :], 1)
                acc += tl.where(hit != 0, float("nan"), 0.0)[:, None]
            top, total, acc, _ = add_tile(s, v.to(q.dtype), top, total, acc, PRECISION)
    return top, total, acc
