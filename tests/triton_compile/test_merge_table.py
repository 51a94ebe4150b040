"""The committed table of predicted merges is what the planner does now."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "merge_table.py"
spec = importlib.util.spec_from_file_location("merge_table", PATH)
assert spec is not None and spec.loader is not None
table = importlib.util.module_from_spec(spec)
sys.modules["merge_table"] = table  # dataclasses look their module up
spec.loader.exec_module(table)


@pytest.mark.parametrize(
    ("name", "heads"), [("S1", "32/8"), ("N4s", "64/8"), ("U3", "8/1"), ("N2s", "32/32")]
)
def test_a_line_of_the_table(name: str, heads: str) -> None:
    shapes = table.plan_table()
    _, build = shapes.cases()[name]
    merge = table.largest_merge(shapes.plan_case(build, heads))
    assert table.line(name, heads, merge) in table.DOC.read_text(), (
        "stale: run benchmarks/merge_table.py"
    )
