"""Items of batch-invariant plans: chunks of a context, each by itself, then folded in order.

Rows have the same bits whatever item holds a chunk and whoever else is in it: docs/plan.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fork_attn.kernels.plan_fields import OFF_RUNS, RUN_CHUNK, RUN_INTS, section
from fork_attn.kernels.stream import stream
from fork_attn.kernels.tiles import end_rows, fold_state


@triton.jit
def stream_chunks(
    q, bit_low, bit_high, token, positions, num_tokens, max_position, head,
    run_begin, run_end, plan32, pages, k_cache, v_cache, scale, value_scale, softcap,
    K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr, PAGE_SIZE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows over an item's chunks: normalised rows and natural-log LSEs.

    A chunk begins a softmax of its own. Where a row sees nothing of a tile, its sums stay as they
    are; where it sees nothing of a chunk, its result does.
    """
    runs = section(plan32, OFF_RUNS)
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    lse = tl.full([BLOCK_M], -float("inf"), tl.float32)
    begin = run_begin
    while begin < run_end:
        chunk = tl.load(runs + begin * RUN_INTS + RUN_CHUNK)
        end = begin + 1
        more = end < run_end
        while more:
            same = tl.load(runs + end * RUN_INTS + RUN_CHUNK) == chunk
            end += same.to(tl.int32)
            more = same & (end < run_end)
        top, total, acc = stream(
            q, bit_low, bit_high, token, positions, num_tokens, max_position, head,
            begin, end, plan32, pages, k_cache, v_cache, None, None, scale, softcap,
            K_STRIDES, V_STRIDES, PAGE_SIZE, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, WIDE,
            HAS_WINDOW, HAS_SOFTCAP, False, STAGES, PRECISION, ISOLATE, True,
        )  # fmt: skip
        factor, chunk_lse = end_rows(top, total, top, False)
        # + 0: the sign of a zero would tell of tiles in which the row saw nothing.
        rows = acc * (factor * value_scale)[:, None] + 0.0
        out, lse = fold_state(out, lse, rows, chunk_lse)
        begin = end
    return out, lse
