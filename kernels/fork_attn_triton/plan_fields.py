"""Where things are in a plan buffer (csrc/core/plan.h), for device code."""

from __future__ import annotations

import triton
import triton.language as tl

# Header fields of the plan, by their place (plan_format.PlanHeader; a test compares).
NUM_TOKENS = tl.constexpr(3)
NUM_RUNS = tl.constexpr(7)
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
RUN_CHUNK = tl.constexpr(9)


@triton.jit
def section(plan32, field: tl.constexpr):
    """Where a section of the plan begins: `field` is its header field, in words of 8 bytes."""
    return plan32 + 2 * tl.load(plan32 + field).to(tl.int64)
