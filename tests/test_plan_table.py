"""The committed accounting of plans is what the planner does now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def plan_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_table", ROOT / "benchmarks/plan_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_shows_the_csv(plan_table: ModuleType) -> None:
    rows = plan_table.read_rows()
    assert {r["id"] for r in rows} == set(plan_table.cases())
    document = plan_table.DOC.read_text()
    assert document == plan_table.with_table(document, plan_table.render(rows)), (
        "stale: run benchmarks/plan_table.py"
    )


@pytest.mark.parametrize("name", ["S2", "N2s", "N4s", "N9", "T-1024-1", "J", "E-N1-16", "U3"])
def test_the_csv_is_what_the_planner_does(plan_table: ModuleType, name: str) -> None:
    text, build = plan_table.cases()[name]
    committed = [r for r in plan_table.read_rows() if r["id"] == name]
    now = [
        plan_table.row(name, text, heads, plan_table.plan_case(build, heads))
        for heads in plan_table.HEADS
    ]
    assert committed == now, "stale: run benchmarks/plan_table.py"
