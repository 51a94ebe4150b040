"""A debugging aid: every page that a plan's runs name, looked at on the device before attention."""

from __future__ import annotations

import triton
import triton.language as tl

from fork_attn.kernels.plan_fields import (
    GATHER,
    NUM_RUNS,
    OFF_GATHER,
    OFF_RUNS,
    RUN_INTS,
    section,
)

PROGRAMS, BLOCK = 128, 128


@triton.jit(debug=True)
def check_pages_kernel(
    plan, pages, num_listed, num_pages, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Program p looks at runs p, p + programs, ...

    Args:
        pages: (num_listed,) int32.
        num_pages: of the pool.
    """
    plan32 = plan.to(tl.pointer_type(tl.int32))
    gather = section(plan32, OFF_GATHER)
    for run_index in range(tl.program_id(0), tl.load(plan32 + NUM_RUNS), tl.num_programs(0)):
        run = section(plan32, OFF_RUNS) + run_index * RUN_INTS
        begin = tl.load(run + 2)
        num_slots = tl.load(run + 4)
        gathered = (tl.load(run + 6) & GATHER) != 0
        listed = tl.cdiv(tl.load(run + 3) + num_slots, PAGE_SIZE)
        count = tl.where(gathered, num_slots, listed)
        tl.device_assert(
            (begin >= 0) & (gathered | (begin + count <= num_listed)),
            "fork_attn: a run lies outside the page lists",
        )
        table = tl.where(gathered, gather, pages)
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK)
            found = tl.load(table + begin + i, mask=i < count, other=0)
            page = tl.where(gathered, found // PAGE_SIZE, found)
            tl.device_assert(
                (found >= 0) & (page < num_pages), "fork_attn: a page outside the cache"
            )
