"""Registers, spills and instructions of every body of the tree attention kernel."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import pytest
import triton

from fork_attn.kernels.bodies import choose_body, shared_memory, shared_needed

ROOT = Path(__file__).resolve().parents[2]


def _load() -> object:
    spec = importlib.util.spec_from_file_location(
        "kernel_table", ROOT / "benchmarks" / "kernel_table.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


table = _load()


def limits(case: object) -> tuple[int, int]:
    """What is reached: bytes of stack, for values that stay over a loop and functions that are
    called, and local loads and stores in a loop with products.

    Batch-invariant bodies keep the folded state of their chunks there, and their slow path has
    tiles as large as the fast one's.
    """
    if case.invariant:
        return 1280, 4
    if case.rows <= 16:
        return 16, 0
    if case.sm >= 100:
        return 208, 8
    if case.sm >= 90:
        return (184 if case.tma else 160) if max(case.dims) > 128 else 96, 0
    return 208, 0


@pytest.mark.parametrize("case", table.CASES, ids=lambda c: f"sm_{c.sm}-{c.rows}-{c.name}")
def test_body(case: object) -> None:
    compiled = table.compile_case(case)
    body = case.body
    stack, spills = limits(case)
    assert compiled.stack <= stack
    # The slow path's loop comes last; in batch-invariant bodies it may be part of the kernel.
    loops = compiled.loop_spills[:1] if case.invariant else compiled.loop_spills
    assert loops and max(loops) <= spills
    sizes = (*case.dims, table.BYTES[case.dtype], table.BYTES[case.kv_dtype])
    needed = shared_needed(body, *sizes, case.sm)
    assert compiled.registers <= 255 and compiled.shared <= needed <= shared_memory(case.sm)
    assert compiled.registers * 32 * body.warps <= 65536
    if case.dtype == "fp32":
        assert compiled.hmma == compiled.hgmma == compiled.tcgen05 == 0  # no tf32
    elif case.sm == 90 and body.rows >= 64:
        assert compiled.hgmma > 0 and compiled.hmma == 0
        # Twice a tile, not once a product: functions with warpgroup products would do that.
        assert compiled.product_waits <= 4
    elif 100 <= case.sm < 120 and body.rows >= 64:
        assert compiled.tcgen05 > 0 and compiled.hmma == 0
    else:
        assert compiled.hmma > 0
    assert compiled.wide_loads > 0 and (compiled.tma_loads > 0) == case.tma
    # The hand-over of partial results: one release and acquire for the whole GPU.
    inside = not (case.apart or case.invariant)
    assert compiled.ptx.count("atom.global.gpu.acq_rel.add.u32") == inside

    if triton.__version__ == "3.6.0":
        assert table.line(case, compiled) in table.DOC.read_text(), (
            "stale: run benchmarks/kernel_table.py"
        )


@pytest.mark.parametrize("sm", [80, 86, 87, 89, 90, 100, 120, 121])
def test_every_body_fits_the_card(sm: int) -> None:
    for dims in itertools.product(range(8, 257, 8), repeat=2):
        for sizes in ((2, 2), (2, 1), (4, 4), (4, 1)):
            for rows in (1, 32, 64, 128):
                body = choose_body(rows, *dims, *sizes, sm)
                assert shared_needed(body, *dims, *sizes, sm) <= shared_memory(sm)


def test_a_card_with_less_shared_memory_takes_smaller_tiles() -> None:
    """Whatever is known of its compute capability."""
    sizes = (128, 256, 256, 2, 2, 90)
    assert choose_body(*sizes).slots == choose_body(*sizes, 227 * 1024).slots == 64
    assert choose_body(*sizes, 160 * 1024).slots == 32


@pytest.mark.parametrize(
    "case", [c for c in table.CASES if c.invariant], ids=lambda c: f"sm_{c.sm}-{c.name}"
)
def test_a_batch_invariant_body_rounds_alike_everywhere(case: object) -> None:
    """No multiplication is fused with an addition, which could differ from copy to copy of a loop
    (products of fp32 tiles and log2 have fused ones of their own), and rows are reduced in one
    layout, the slow path's too."""
    compiled = table.compile_case(case)
    assert not re.search(r"\b(?:mul|add|sub)\.f32", compiled.ptx), "ptxas may fuse these"
    assert case.dtype == "fp32" or not re.search(r"\bfma\.rn\.f32", compiled.ptx)
    reductions = re.findall(
        r'"tt\.reduce"\([^)]*\) <\{axis = 1[^}]*\}> '
        r"\(\{\n.*?\n\s*\}\) : \((tensor<\w+xf32, .*?>)\)",
        compiled.ttgir,
        re.DOTALL,
    )
    assert len(reductions) >= 4 and len(set(reductions)) == 1  # the fast loop and the slow one


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("head_dim_v", [64, 128, 256])
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_merging_apart(sm: int, head_dim_v: int, invariant: bool) -> None:
    compiled = table.compile_merge(sm, head_dim_v, invariant)
    assert compiled.stack <= 8 and compiled.registers <= 128
    assert compiled.wide_loads >= head_dim_v // 8 or head_dim_v < 128  # 16 partial rows at a time
    assert not invariant or not re.search(r"\bfma\.rn\.f32", compiled.ptx)


def test_the_document_has_no_other_rows() -> None:
    document = table.DOC.read_text()
    rows = document.split(table.BEGIN)[1].split(table.END)[0].strip().splitlines()
    assert len(rows) == 2 + len(table.CASES)


def test_header_fields_are_those_of_the_format() -> None:
    from fork_attn.kernels import plan_fields
    from fork_attn.plan_format import PlanHeader

    names = [n for n in dir(plan_fields) if n.startswith(("OFF_", "NUM_"))]
    assert len(names) >= 11
    for name in names:
        assert PlanHeader._fields[getattr(plan_fields, name).value] == name.lower()
    assert PlanHeader._fields[plan_fields.WINDOW_SIZE.value] == "window"
