"""Registers, spills and instructions of every body of the tree attention kernel."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import triton

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
SHARED_LIMIT = {80: 163, 90: 227, 100: 227}  # KiB of one program


@pytest.mark.parametrize("case", table.CASES, ids=lambda c: f"sm_{c.sm}-{c.rows}-{c.name}")
def test_body(case: object) -> None:
    compiled = table.compile_case(case)
    body = case.body
    wide = max(case.dims) > 128
    assert compiled.hot_spills <= (16 if wide or case.sm >= 100 else 0)
    assert compiled.stack <= (448 if wide else 256)
    if body.rows <= 16:
        assert compiled.stack == 0 and compiled.spills == 0
    assert compiled.registers <= 255 and compiled.shared <= SHARED_LIMIT[case.sm] * 1024
    assert compiled.registers * 32 * body.warps <= 65536
    if case.dtype == "fp32":
        assert compiled.hmma == compiled.hgmma == compiled.tcgen05 == 0  # no tf32
    elif case.sm == 90 and body.rows >= 64:
        assert compiled.hgmma > 0 and compiled.hmma == 0
    elif case.sm >= 100 and body.rows >= 64:
        assert compiled.tcgen05 > 0 and compiled.hmma == 0
    else:
        assert compiled.hmma > 0
    assert compiled.wide_loads > 0 and (compiled.tma_loads > 0) == case.tma
    # The hand-over of partial results: one release and acquire for the whole GPU.
    assert compiled.ptx.count("atom.global.gpu.acq_rel.add.u32") == 1

    if triton.__version__ == "3.6.0":
        assert table.line(case, compiled) in table.DOC.read_text(), (
            "stale: run benchmarks/kernel_table.py"
        )


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
