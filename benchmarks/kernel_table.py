"""Resources of every body of the tree attention kernel, compiled with no GPU: a table in
docs/kernels/tree_attention.md.

It holds for the Triton and ptxas of constraints.txt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fork_attn.kernels.bodies import (
    APART_WARPS,
    Body,
    choose_body,
    constants,
    invariant_rows,
    merge_constants,
)
from fork_attn.kernels.merge import merge_kernel
from fork_attn.kernels.tree_attention import tree_attention_kernel
from fork_attn.testing.triton_compile import Compiled, compile_kernel

DOC = Path(__file__).resolve().parent.parent / "docs" / "kernels" / "tree_attention.md"
BEGIN, END = (
    "<!-- begin: benchmarks/kernel_table.py -->",
    "<!-- end: benchmarks/kernel_table.py -->",
)
KV_HEADS = 8
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8e4nv": 1}
POINTERS = {
    "plan": "*i64", "pages": "*i32", "lse": "*fp32", "partial_out": "*fp32",
    "partial_lse": "*fp32", "counters": "*i32",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One specialisation of the kernel."""

    sm: int
    rows: int  # tokens x group of the largest block
    dims: tuple[int, int] = (128, 128)
    dtype: str = "bf16"
    kv: str | None = None  # None: as dtype
    group: int = 4
    page_size: int = 16
    tma: bool = False
    extras: bool = False  # window, softcap and sinks
    apart: bool = False  # merged in a launch of its own
    invariant: bool = False  # batch-invariant

    @property
    def kv_dtype(self) -> str:
        return self.kv or self.dtype

    @property
    def body(self) -> Body:
        sizes = (BYTES[self.dtype], BYTES[self.kv_dtype])
        rows = invariant_rows(self.sm) if self.invariant else self.rows
        return choose_body(rows, *self.dims, *sizes, self.sm)

    @property
    def name(self) -> str:
        dims = "/".join(map(str, dict.fromkeys(self.dims)))
        kv = "" if self.kv is None else " over " + {"fp8e4nv": "e4m3"}.get(self.kv, self.kv)
        more = ", descriptors" if self.tma else ""
        more += ", window, softcap, sinks" if self.extras else ""
        more += "" if self.group == 4 else f", group {self.group}"
        more += ", batch-invariant" if self.invariant else ""
        more += ", merged apart" if self.apart and not self.invariant else ""
        return f"{self.dtype}{kv}, {dims}{more}"


CASES = [
    *(Case(sm, rows) for sm in (80, 90, 100) for rows in (16, 32, 64, 128)),
    *(Case(90, rows, page_size=64, tma=True) for rows in (16, 64, 128)),
    Case(100, 128, page_size=64, tma=True),
    Case(90, 128, kv="fp8e4nv", page_size=64, tma=True),
    Case(90, 128, dims=(64, 64), group=2, page_size=64, tma=True, extras=True),
    Case(90, 128, dims=(256, 256), page_size=64, tma=True),
    # No e4m3 on sm_89: Triton 3.6 keeps the conversions of the first target of a process.
    Case(86, 128, dims=(256, 256)),
    Case(120, 128, dims=(256, 256)),
    Case(90, 128, kv="fp8e4nv"),
    Case(90, 128, group=2, extras=True),
    Case(90, 128, dims=(64, 64)),
    Case(90, 128, dims=(192, 128)),
    Case(90, 128, dims=(256, 256)),
    Case(90, 16, dtype="fp32"),
    Case(80, 64, apart=True),
    Case(90, 128, apart=True),
    *(Case(sm, 128, invariant=True) for sm in (80, 90, 100)),
    Case(90, 128, kv="fp8e4nv", invariant=True),
    Case(90, 128, group=2, extras=True, invariant=True),
    Case(90, 128, dims=(192, 128), invariant=True),
    Case(90, 16, dtype="fp32", invariant=True),
]  # fmt: skip


def compile_case(case: Case) -> Compiled:
    """The kernel for one case, as `launch.tree_attention` has it compiled over the caches of a
    `ForkedKVCache`."""
    body, dtype, kv = case.body, f"*{case.dtype}", f"*{case.kv_dtype}"
    scales = case.kv is not None
    values = constants(
        body,
        num_kv_heads=KV_HEADS,
        k_strides=_strides(case.page_size, case.dims[0]),
        v_strides=_strides(case.page_size, case.dims[1]),
        group=case.group,
        page_size=case.page_size,
        head_dim=case.dims[0],
        head_dim_v=case.dims[1],
        max_block_tokens=max(1, case.rows // case.group),
        window=case.extras,
        softcap=case.extras,
        sinks=case.extras,
        k_scale=scales,
        v_scale=scales,
        tma=case.tma,
        fp32=case.dtype == "fp32",
        sm=case.sm,
        merge="apart" if case.apart or case.invariant else "inside",
        batch_invariant=case.invariant,
        far_heads=False,
    )
    types = POINTERS | {"q": dtype, "k_cache": kv, "v_cache": kv, "out": dtype}
    types |= {"softmax_scale": "fp32", "softcap": "fp32"}
    if case.extras:
        types["sinks"] = "*fp32"
    if scales:
        types |= {"k_scale": "*fp32", "v_scale": "*fp32"}
    if case.tma:
        for name, dim in zip(("k_desc", "v_desc"), case.dims, strict=True):
            types[name] = f"tensordesc<{case.kv_dtype}[{body.slots}, {dim}]>"
    for name in ("sinks", "k_scale", "v_scale", "k_desc", "v_desc"):
        if name not in types:
            values[name] = None
    signature = {
        name: "constexpr" if name in values else types.get(name, "i32")
        for name in tree_attention_kernel.arg_names
    }
    return compile_kernel(
        tree_attention_kernel,
        signature,
        values,
        case.sm,
        aligned=[*_aligned(tree_attention_kernel, signature), "q_row", "q_head"],
        num_warps=body.warps,
        num_stages=body.stages,
        fuse=not case.invariant,
    )


def compile_merge(sm: int, head_dim_v: int = 128, invariant: bool = False) -> Compiled:
    """The kernel that merges in a launch of its own, for bf16."""
    values = merge_constants(4 * KV_HEADS, head_dim_v, True, invariant)
    types = POINTERS | {"out": "*bf16", "sinks": "*fp32"}
    signature = {
        name: "constexpr" if name in values else types[name] for name in merge_kernel.arg_names
    }
    return compile_kernel(
        merge_kernel,
        signature,
        values,
        sm,
        aligned=_aligned(merge_kernel, signature),
        num_warps=APART_WARPS,
        fuse=not invariant,
    )


def _aligned(kernel: Any, signature: dict[str, str]) -> list[str]:
    """Pointers that the JIT would look at and find on 16 bytes."""
    exempt = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    return [name for name, kind in signature.items() if kind[0] == "*" and name not in exempt]


def _strides(page_size: int, dim: int) -> tuple[int, int, int]:
    return (KV_HEADS * page_size * dim, dim, page_size * dim)


def line(case: Case, c: Compiled) -> str:
    """A row of the table."""
    body = case.body
    products = {"HGMMA": c.hgmma, "HMMA": c.hmma, "tcgen05": c.tcgen05}
    used = ", ".join(f"{count} {name}" for name, count in products.items() if count)
    cells = [
        f"sm_{case.sm}", case.name, f"{body.rows} x {body.slots}", f"{body.warps}, {body.stages}",
        str(c.registers), f"{c.stack}", f"{c.hot_spills}", f"{c.shared / 1024:.0f}",
        str(c.instructions), used or "FFMA", str(c.wide_loads), str(c.tma_loads),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def render(lines: list[str]) -> str:
    """The table."""
    head = (
        "| target | specialisation | rows x slots | warps, stages | registers | stack bytes "
        "| spills in loops | shared KiB | instructions | products | 128-bit loads | TMA loads |"
    )
    return "\n".join([head, "|---|---|---|---|--:|--:|--:|--:|--:|---|--:|--:|", *lines])


def with_table(document: str, table: str) -> str:
    """The document with the table between its markers."""
    head, rest = document.split(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Writes the table."""
    lines = []
    for case in CASES:
        lines.append(line(case, compile_case(case)))
        print(lines[-1], flush=True)
    DOC.write_text(with_table(DOC.read_text(), render(lines)))


if __name__ == "__main__":
    main()
