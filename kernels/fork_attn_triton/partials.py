"""Results of items: written, counted, and merged by the last to arrive."""

from __future__ import annotations

import triton
import triton.language as tl

from fork_attn.kernels.plan_fields import OFF_MERGE_INDPTR, OFF_MERGE_ROWS, section
from fork_attn.kernels.tiles import LOG2E, add_state, end_rows, end_state, fold_state


@triton.jit
def write_rows(
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
def arrive(
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
def merge_partials(
    token, head_q, ok, plan32, out, lse, partial_out, partial_lse, sinks,
    NUM_Q_HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, AT_ONCE: tl.constexpr, HAS_SINKS: tl.constexpr, INVARIANT: tl.constexpr,
):  # fmt: skip
    """Merges the partial rows of the rows that are `ok`, in the plan's order, and writes them.

    Rows without partial rows stay as they are. AT_ONCE partial rows of a row are on their way at a
    time.
    """
    d = tl.arange(0, BLOCK_DV)
    merge_indptr = section(plan32, OFF_MERGE_INDPTR)
    merge_rows = section(plan32, OFF_MERGE_ROWS)
    begin = tl.load(merge_indptr + token, mask=ok, other=0)
    count = tl.load(merge_indptr + token + 1, mask=ok, other=0) - begin
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for first in range(0, tl.max(count, 0), AT_ONCE):
        # Unpacking into a tuple is not part of Triton's language.
        places = ()
        for i in tl.static_range(AT_ONCE):
            more = first + i < count
            row = tl.load(merge_rows + begin + first + i, mask=more, other=0).to(tl.int64)
            places = places + (row * NUM_Q_HEADS + head_q,)  # type: ignore[assignment]  # noqa: RUF005
        states = ()
        lses = ()
        for i in tl.static_range(AT_ONCE):
            more = first + i < count
            state_lse = tl.load(
                partial_lse + places[i], mask=more, other=-float("inf"), cache_modifier=".cg"
            )
            state = tl.load(
                partial_out + places[i][:, None] * DV + d[None, :],
                mask=more[:, None] & (d < DV)[None, :], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            lses = lses + (state_lse,)  # type: ignore[assignment]  # noqa: RUF005
            states = states + (state,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(AT_ONCE):
            if INVARIANT:
                acc, top = fold_state(acc, top, states[i], lses[i])
            else:
                top, total, acc = add_state(states[i], lses[i] * LOG2E, top, total, acc)
    sink = top
    if HAS_SINKS:
        sink = tl.load(sinks + head_q, mask=ok, other=0.0)
    if INVARIANT:
        factor, row_lse = end_state(top, sink, HAS_SINKS)
    else:
        factor, row_lse = end_rows(top, total, sink, HAS_SINKS)
    at = token.to(tl.int64) * NUM_Q_HEADS + head_q
    write_rows(out, lse, at, acc, factor, row_lse, count > 0, DV, BLOCK_DV)
