"""Merging in a launch of its own, where one program would merge too much by itself."""

from __future__ import annotations

import triton
import triton.language as tl

from fork_attn.kernels.partials import merge_partials
from fork_attn.kernels.plan_fields import NUM_TOKENS


@triton.jit(do_not_specialize_on_alignment=["plan"])
def merge_kernel(
    plan, out, lse, partial_out, partial_lse, sinks,
    NUM_Q_HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, AT_ONCE: tl.constexpr, HAS_SINKS: tl.constexpr, INVARIANT: tl.constexpr,
):  # fmt: skip
    """Program p merges ROWS rows of (token, query head) from row p * ROWS on.

    Rows that an item wrote directly, and those past the plan's, stay as they are.
    """
    plan32 = plan.to(tl.pointer_type(tl.int32))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // NUM_Q_HEADS
    ok = token < tl.load(plan32 + NUM_TOKENS)
    merge_partials(
        token, row % NUM_Q_HEADS, ok, plan32, out, lse, partial_out, partial_lse, sinks,
        NUM_Q_HEADS, DV, BLOCK_DV, ROWS, AT_ONCE, HAS_SINKS, INVARIANT,
    )  # fmt: skip
