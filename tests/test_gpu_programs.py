"""The programs of `make gpu` as far as tests take them; its dry run goes through all of them."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import roofline  # noqa: E402


def test_roofline_of_the_committed_suite() -> None:
    suite = json.loads((ROOT / "benchmarks/results/suite_cpu.json").read_text())
    roofs = {"read_bytes_per_second": 3e10, "matmul_bf16_flops_per_second": 2e11}
    baseline = {"roofs": roofs, "machine": {"gpu": None, "cpu": "a <CPU>"}}
    picture = roofline.picture(suite, baseline)
    root = ElementTree.fromstring(picture)
    assert root.tag.endswith("svg") and "Tree attention on a &lt;CPU&gt;" in picture
    marks = [node for node in root if node.tag.endswith("circle")]
    ran = [c for c in suite["cases"] if any(w["ours"] for w in c["ways"].values())]
    assert len(marks) >= len(ran) > 10
    with pytest.raises(ValueError, match="at least one case that our kernel ran"):
        roofline.picture({"cases": []}, baseline)


def test_points_are_the_fastest_of_ours_and_of_the_others() -> None:
    def way(ours: bool, seconds: float) -> dict[str, object]:
        return {"ours": ours, "cold": {"median": seconds}}

    ways = {"a": way(True, 2.0), "b": way(True, 1.0), "c": way(False, 4.0), "d": {"ours": False}}
    cases = [{"flops": 80.0, "unique_bytes": 10.0, "ways": ways}]
    assert roofline.points(cases, True) == [(8.0, 80.0)]
    assert roofline.points(cases, False) == [(8.0, 20.0)]
    assert roofline.roof(10.0, 40.0, [2.0, 8.0]) == [(1.0, 10.0), (4.0, 40.0), (16.0, 40.0)]
