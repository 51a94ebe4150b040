"""Tree attention over a plan (csrc/core/plan.h) in one launch: docs/kernels/tree_attention.md.

A persistent grid: program p takes units (span, KV head) p, p + programs, ... and reads every count
and offset from the plan on the device, so that one captured launch serves any plan that fits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fork_attn.kernels.tiles import LOG2E, add_state, add_tile, end_rows, scores, section

# Header fields of the plan, by their place (plan_format.PlanHeader; a test compares).
NUM_TOKENS = tl.constexpr(3)
WINDOW_SIZE = tl.constexpr(14)
OFF_BLOCKS = tl.constexpr(17)
OFF_TOKENS = tl.constexpr(18)
OFF_POSITIONS = tl.constexpr(19)
OFF_ITEMS = tl.constexpr(20)
OFF_RUNS = tl.constexpr(21)
OFF_WORDS = tl.constexpr(23)
OFF_MERGE_INDPTR = tl.constexpr(24)
OFF_MERGE_ROWS = tl.constexpr(25)
NUM_SPANS = tl.constexpr(26)
OFF_SPANS = tl.constexpr(27)
OFF_Q_ROWS = tl.constexpr(28)
OFF_GATHER = tl.constexpr(32)
# Bits of a run's kind, and its record's size in int32.
DIAGONAL = tl.constexpr(1)
WINDOW = tl.constexpr(2)
PER_SLOT = tl.constexpr(4)
GATHER = tl.constexpr(8)
RUN_INTS = tl.constexpr(10)


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
def _stream(
    q, bit_low, bit_high, token, positions, num_tokens, max_position, head,
    run_begin, run_end, plan32, pages, k_cache, v_cache, k_desc, v_desc,
    scale, softcap, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows over an item's runs: (top, total, acc).

    Of each run first the tiles that all tokens see whole, without a mask, then the others. With
    ISOLATE, V rows that hold Inf or NaN never meet a row that does not see them; rows that do
    become NaN.
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
            behind = first_position + window  # slot j is hidden from positions >= behind + j
            low = tl.where(windowed, tl.maximum(max_position - behind + 1, 0), 0)
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
        if ISOLATE:
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
                seen = seen & ((positions[:, None] < (behind + j)[None, :]) | (windowed == 0))
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


@triton.jit
def _write_rows(
    rows_out, rows_lse, at, acc, factor, lse, ok,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Writes acc * factor and lse where `ok`, rows (rows,) `at` the given rows."""
    d = tl.arange(0, BLOCK_DV)
    values = (acc * factor[:, None]).to(rows_out.dtype.element_ty)
    mask = ok[:, None] & (d < DV)[None, :]
    tl.store(rows_out + at[:, None] * DV + d[None, :], values, mask=mask)
    tl.store(rows_lse + at, lse, mask=ok)


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
    top, total, acc = _stream(
        q_tile, bit_low, bit_high, t, positions, num_tokens, max_position, head,
        run_begin, run_end, plan32, pages, k_cache, v_cache, k_desc, v_desc, scale, softcap,
        K_STRIDES, V_STRIDES, PAGE_SIZE, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, WIDE,
        HAS_WINDOW, HAS_SOFTCAP, TMA, STAGES, PRECISION, ISOLATE,
    )  # fmt: skip
    if partial_begin >= 0:
        factor, row_lse = end_rows(top, total, top, False)
        at = (partial_begin + t).to(tl.int64) * NUM_Q_HEADS + head_q
        _write_rows(partial_out, partial_lse, at, acc, factor * value_scale, row_lse, ok,
                    DV, BLOCK_DV)  # fmt: skip
    else:
        sink = top
        if HAS_SINKS:
            sink = tl.load(sinks + head_q)
        factor, row_lse = end_rows(top, total, sink, HAS_SINKS)
        row = tl.load(section(plan32, OFF_TOKENS) + token_begin + t, mask=ok, other=0)
        at = row.to(tl.int64) * NUM_Q_HEADS + head_q
        _write_rows(out, lse, at, acc, factor * value_scale, row_lse, ok, DV, BLOCK_DV)
    return tl.max(tl.max((tl.abs(acc) < float("inf")).to(tl.int32) ^ 1, 1), 0)


@triton.jit(noinline=True)
def _serve_isolated(
    first, head, token_begin, num_tokens, run_begin, run_end, partial_begin,
    q, k_cache, v_cache, plan32, pages, out, lse, partial_out, partial_lse,
    sinks, k_scale, v_scale, q_row, q_head, softmax_scale, softcap,
    NUM_KV_HEADS: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`_serve` again, slowly, with ISOLATE."""
    _serve(
        first, head, token_begin, num_tokens, run_begin, run_end, partial_begin,
        q, k_cache, v_cache, None, None, plan32, pages, out, lse, partial_out, partial_lse,
        sinks, k_scale, v_scale, q_row, q_head, softmax_scale, softcap,
        NUM_KV_HEADS, K_STRIDES, V_STRIDES, GROUP, PAGE_SIZE, D, DV, BLOCK_D, BLOCK_DV,
        BLOCK_M, 16, WIDE, HAS_WINDOW, HAS_SOFTCAP, HAS_SINKS, HAS_K_SCALE,
        HAS_V_SCALE, False, 1, PRECISION, True,
    )  # fmt: skip


@triton.jit
def _merge_rows(
    token, head_q, last, plan32, out, lse, partial_out, partial_lse, sinks,
    NUM_Q_HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merges the partial rows of the rows that are `last`, in the plan's order, and writes them."""
    d = tl.arange(0, BLOCK_DV)
    merge_indptr = section(plan32, OFF_MERGE_INDPTR)
    merge_rows = section(plan32, OFF_MERGE_ROWS)
    begin = tl.load(merge_indptr + token, mask=last, other=0)
    count = tl.load(merge_indptr + token + 1, mask=last, other=0) - begin
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for s in range(0, tl.max(count, 0)):
        more = s < count
        row = tl.load(merge_rows + begin + s, mask=more, other=0).to(tl.int64)
        at = row * NUM_Q_HEADS + head_q
        state_lse = tl.load(
            partial_lse + at, mask=more, other=-float("inf"), cache_modifier=".cg"
        )
        state = tl.load(
            partial_out + at[:, None] * DV + d[None, :],
            mask=more[:, None] & (d < DV)[None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        top, total, acc = add_state(state, state_lse * LOG2E, top, total, acc)
    sink = top
    if HAS_SINKS:
        sink = tl.load(sinks + head_q, mask=last, other=0.0)
    factor, row_lse = end_rows(top, total, sink, HAS_SINKS)
    at = token.to(tl.int64) * NUM_Q_HEADS + head_q
    _write_rows(out, lse, at, acc, factor, row_lse, last, DV, BLOCK_DV)


@triton.jit
def _arrive(
    tokens, num_tokens, head, plan32, counters,
    NUM_KV_HEADS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Counts this item as done for its tokens; (BLOCK_T,) int32: 1 where it was the last to come.

    Partial rows that other programs stored before they arrived can be read afterwards. The last
    one resets the counter.
    """
    tl.debug_barrier()  # every thread's partial rows are stored before any thread arrives
    t = tl.arange(0, BLOCK_T)
    token = tl.load(tokens + t, mask=t < num_tokens, other=0)
    merge_indptr = section(plan32, OFF_MERGE_INDPTR)
    count = tl.load(merge_indptr + token + 1) - tl.load(merge_indptr + token)
    counter = counters + token.to(tl.int64) * NUM_KV_HEADS + head
    before = tl.atomic_add(counter, 1, mask=t < num_tokens, sem="acq_rel", scope="gpu")
    last = (t < num_tokens) & (before == count - 1)
    tl.store(counter, 0, mask=last)
    tl.debug_barrier()
    return last.to(tl.int32)


@triton.jit
def tree_attention_kernel(
    q, k_cache, v_cache, k_desc, v_desc, plan, pages, out, lse, partial_out, partial_lse,
    counters, sinks, k_scale, v_scale, num_rows, q_row, q_head, softmax_scale, softcap,
    NUM_KV_HEADS: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, WIDE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See `launch.tree_attention`, which says what the arguments are."""
    program = tl.program_id(0)
    plan32 = plan.to(tl.pointer_type(tl.int32))
    blocks = section(plan32, OFF_BLOCKS)
    items = section(plan32, OFF_ITEMS)
    spans = section(plan32, OFF_SPANS)
    num_spans = tl.load(plan32 + NUM_SPANS)
    NUM_Q_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    m = tl.arange(0, BLOCK_M)
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
                    HAS_V_SCALE, TMA, STAGES, PRECISION, False,
                )  # fmt: skip
                if broken != 0:
                    _serve_isolated(
                        first, head, token_begin, num_tokens, run_begin, run_end, partial_begin,
                        q, k_cache, v_cache, plan32, pages, out, lse, partial_out,
                        partial_lse, sinks, k_scale, v_scale, q_row, q_head, softmax_scale,
                        softcap, NUM_KV_HEADS, K_STRIDES, V_STRIDES, GROUP, PAGE_SIZE, D, DV,
                        BLOCK_D, BLOCK_DV, BLOCK_M, WIDE, HAS_WINDOW, HAS_SOFTCAP, HAS_SINKS,
                        HAS_K_SCALE, HAS_V_SCALE, PRECISION,
                    )  # fmt: skip
            if partial_begin >= 0:
                last = _arrive(tokens, num_tokens, head, plan32, counters, NUM_KV_HEADS, BLOCK_T)
                if tl.max(last, 0) != 0:
                    for first in range(0, num_tokens * GROUP, BLOCK_M):
                        t = (first + m) // GROUP
                        ok = t < num_tokens
                        mine = tl.gather(last, tl.minimum(t, BLOCK_T - 1), 0) != 0
                        token = tl.load(tokens + t, mask=ok, other=0)
                        _merge_rows(
                            token, head * GROUP + (first + m) % GROUP, ok & mine, plan32, out, lse,
                            partial_out, partial_lse, sinks, NUM_Q_HEADS, DV, BLOCK_DV, BLOCK_M, HAS_SINKS,
                        )  # fmt: skip
    # Rows past the plan's (a captured step is as wide as it may become) see nothing.
    dv = tl.arange(0, BLOCK_DV)
    for row in range(tl.load(plan32 + NUM_TOKENS) + program, num_rows, tl.num_programs(0)):
        here = tl.zeros([1], tl.int64) + row
        for head_q in range(0, NUM_Q_HEADS):
            nothing = tl.full([1], -float("inf"), tl.float32)
            if HAS_SINKS:
                nothing = tl.load(sinks + head_q + tl.zeros([1], tl.int32))
            at = out + (here * NUM_Q_HEADS + head_q) * DV
            tl.store(at + dv, tl.zeros([BLOCK_DV], out.dtype.element_ty), mask=dv < DV)
            tl.store(lse + here * NUM_Q_HEADS + head_q, nothing)
