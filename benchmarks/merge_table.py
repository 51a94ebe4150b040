"""The largest merge of each plan of the suite's shapes on sm_90, and how long it is predicted to
take: a table in docs/kernels/tree_attention.md.

Counts are exact. Times are a model of latency and of one SM's share of L2, not measured.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fork_attn.kernels.bodies import (
    APART_AT_ONCE,
    APART_ROWS,
    choose_merge,
)
from fork_attn.plan import Plan
from fork_attn.plan_format import header, sections

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "kernels" / "tree_attention.md"
BEGIN, END = "<!-- begin: benchmarks/merge_table.py -->", "<!-- end: benchmarks/merge_table.py -->"
HEAD_DIM = 128
SHOWN = 8  # rows of each setting of heads

# H200, assumed: an access that finds its line in L2; 64 bytes a clock and SM at 1.75 GHz; all SMs;
# from the end of one launch to the start of the next, in a graph.
LATENCY_US = 0.3
SM_BYTES_PER_US = 112e3
L2_BYTES_PER_US = 5.5e6
LAUNCH_US = 1.5
INSIDE_ROWS, INSIDE_AT_ONCE = 32, 4  # of bodies with 8 warps
PROGRAMS = 132 * 8  # of the launch that merges, at a time: 8 of 128 threads an SM


@dataclass(frozen=True)
class Merge:
    """The largest merge of a plan."""

    rows: int  # query rows (tokens x group) of the block, one KV head
    cuts: int  # partial rows of one of them, at most
    size: int  # bytes of all of them
    plan_size: int  # bytes of all partial rows of the plan, all heads
    all_rows: int  # query rows of the plan, all heads
    kernel_us: float  # predicted for the plan, merging apart

    @property
    def inside_us(self) -> float:
        """By the last program to arrive: two accesses that wait for each other, a few rows each."""
        blocks = -(-self.rows // INSIDE_ROWS)
        rounds = blocks * -(-self.cuts // INSIDE_AT_ONCE)
        return rounds * 2 * LATENCY_US + self.size / SM_BYTES_PER_US

    @property
    def apart_us(self) -> float:
        """By a launch of its own, over all rows of the plan."""
        waves = math.ceil(self.all_rows / (APART_ROWS * PROGRAMS))
        rounds = 1 + waves * -(-self.cuts // APART_AT_ONCE)
        return LAUNCH_US + rounds * 2 * LATENCY_US + self.plan_size / L2_BYTES_PER_US

    @property
    def way(self) -> str:
        return choose_merge(self.size // (4 * (HEAD_DIM + 1)), 1, HEAD_DIM)

    @property
    def chosen_us(self) -> float:
        return {"none": 0.0, "inside": self.inside_us, "apart": self.apart_us}[self.way]


def largest_merge(plan: Plan) -> Merge:
    """Of a plan made for sm_90."""
    h, s = header(plan.buffer), sections(plan.buffer)
    count = s.merge_indptr.diff()
    largest, rows = 0, 0
    for begin, tokens in s.blocks.tolist():
        merged = int(count[s.tokens[begin : begin + tokens].long()].sum())
        if merged > largest:
            largest, rows = merged, tokens * h.group
    assert largest == h.max_merge_rows
    row = 4 * (plan.shape.head_dim_v + 1)
    heads = plan.shape.num_q_heads
    return Merge(
        rows,
        int(count.max()),
        largest * h.group * row,
        h.num_partial_rows * heads * row,
        h.num_tokens * heads,
        plan.work[0],
    )


def line(name: str, heads: str, merge: Merge) -> str:
    """A row of the table."""
    cells = [
        name, heads, str(merge.rows), str(merge.cuts), f"{merge.size / 1024:.0f}",
        f"{merge.kernel_us:.1f}", f"{merge.inside_us:.1f}", f"{merge.apart_us:.1f}", merge.way,
        f"{100 * merge.chosen_us / merge.kernel_us:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def render(lines: list[str]) -> str:
    """The table."""
    columns = [
        "id",
        "heads",
        "rows",
        "cuts",
        "KiB",
        "kernel us",
        "inside us",
        "apart us",
        "chosen",
        "% of kernel",
    ]
    head = "| " + " | ".join(columns) + " |"
    return "\n".join([head, "|---|---|--:|--:|--:|--:|--:|--:|---|--:|", *lines])


def plan_table() -> ModuleType:
    """benchmarks/plan_table.py, which makes the plans."""
    path = ROOT / "benchmarks" / "plan_table.py"
    spec = importlib.util.spec_from_file_location("plan_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("plan_table", module)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Writes the table."""
    shapes = plan_table()
    lines = []
    for heads in shapes.HEADS:
        found = []
        for name, (_, build) in shapes.cases().items():
            merge = largest_merge(shapes.plan_case(build, heads))
            if merge.way != "none":
                found.append((merge.inside_us / merge.kernel_us, name, merge))
        found.sort(key=lambda x: x[0], reverse=True)
        lines += [line(name, heads, merge) for _, name, merge in found[:SHOWN]]
        over = sum(m.chosen_us > 0.05 * m.kernel_us for _, _, m in found)
        would = sum(m.inside_us > 0.05 * m.kernel_us for _, _, m in found)
        print(heads, len(found), "merge; over 5 % of the kernel inside:", would, "chosen:", over)
    print("\n".join(lines))
    document = DOC.read_text()
    if BEGIN in document:
        start, rest = document.split(BEGIN)
        DOC.write_text(f"{start}{BEGIN}\n\n{render(lines)}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
