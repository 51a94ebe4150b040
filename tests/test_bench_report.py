"""README's headline, docs/benchmarks.md and the pictures are what the committed results say."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402
import report_plots  # noqa: E402
import report_tables  # noqa: E402
import simulation  # noqa: E402
import svg_chart  # noqa: E402


@pytest.fixture(scope="module")
def written() -> dict[Path, str]:
    return report.files()


def test_nothing_is_stale(written: dict[Path, str]) -> None:
    wrong = [str(p) for p, text in written.items() if not p.exists() or p.read_text() != text]
    assert not wrong, "stale: run benchmarks/report.py"
    assert set(report.ASSETS.glob("bench-*.svg")) <= set(written), "a picture that nothing draws"


def test_a_changed_result_makes_them_stale(
    monkeypatch: pytest.MonkeyPatch, written: dict[Path, str]
) -> None:
    def load(prefix: str) -> list[dict[str, Any]]:
        results = load_committed(prefix)
        for row in (row for result in results for row in result.get("cases", ())):
            for way in row["ways"].values():
                way["step"]["median"] *= 2 if way["ours"] else 1
        return results

    load_committed = report.load
    monkeypatch.setattr(report, "load", load)
    assert {"README.md", "docs/benchmarks.md"} <= set(report.stale())


def test_pictures_are_svg(written: dict[Path, str]) -> None:
    pictures = {path.name: text for path, text in written.items() if path.suffix == ".svg"}
    assert set(pictures) <= set(report_plots.TITLES)
    assert "bench-simulation.svg" in pictures
    for text in pictures.values():
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg") and "nan" not in text


def test_every_result_has_its_machine_versions_and_commit() -> None:
    results = [r for kind in ("suite", "end_to_end", "reasoning") for r in report.load(kind)]
    assert results
    for result in results:
        machine = result["machine"]
        assert machine["commit"] and "dirty" not in machine["commit"]
        assert machine["versions"]["torch"] and machine["date"]
        assert report_tables.conditions(result)


def test_markers_must_stand_once(tmp_path: Path) -> None:
    begin, end = (f"<!-- {w}: benchmarks/report.py x -->" for w in ("begin", "end"))
    page = tmp_path / "page"
    text = f"a\n{begin}\nold\n{end}\nb"
    once = report.fill(text, "x", "new", page)
    assert once == f"a\n{begin}\n\nnew\n\n{end}\nb"
    assert report.fill(once, "x", "new", page) == once
    for bad in ("nothing", text + begin):
        with pytest.raises(ValueError, match="page: expected"):
            report.fill(bad, "x", "new", page)


def _row(shape: str, reuse: float, ours: float, rival: float) -> dict[str, Any]:
    def way(mine: bool, seconds: float) -> dict[str, Any]:
        times = {"median": seconds, "p20": seconds, "p95": seconds, "rounds": 5}
        return {"ours": mine, "error": 0.0, "held_bytes": 2**20, "cold": times, "step": times}

    return {
        "id": shape,
        "shape": shape,
        "text": "[1,2]x[3,4]",
        "heads": "32/8x128",
        "dtype": "bfloat16",
        "page_size": 16,
        "branches": 2,
        "reuse": reuse,
        "unique_bytes": 2**20,
        "copied_bytes": 2**21,
        "moved_bytes": 2**20,
        "flops": 2**20,
        "matmul_flops_per_s": 1e12,
        "limit_seconds": 1e-3,
        "limit_by": "memory",
        "ways": {"fork_attn_cpu": way(True, ours), "sdpa_per_branch": way(False, rival)},
        "absent": {"flashinfer_decode": "flashinfer needs a CUDA device"},
    }


def test_the_headline_counts_losses() -> None:
    rows = [_row("A", 1.0, 2e-3, 1e-3), _row("B", 9.0, 1e-3, 4e-3), _row("C", 9.0, 1e-3, 1e-3)]
    suite = {
        **report.load("suite")[-1],
        "cases": rows,
        "cases_planned": 3,
    }
    text = report_tables.headline([suite], [])
    assert "| nothing shared | 1 | 0.50 (0.50–0.50) |" in text
    assert "| reuse from 8 on | 2 | 2.00 (1.00–4.00) |" in text
    assert "Slower than the best rival in 1 of 3; worst: A" in text
    both = report_tables.headline([suite, {**suite, "cases": rows[1:]}], [])
    assert both.startswith(text[: text.index("All shapes")])
    assert "another machine: reuse from 8 on 2.00 (1.00–4.00). Slower than the best" in both
    table = report_tables.suite([suite])
    assert "flashinfer_decode | 3 | flashinfer needs a CUDA device" in table


def test_charts_refuse_what_they_cannot_draw() -> None:
    with pytest.raises(ValueError, match="positive"):
        svg_chart.lines("t", "x", "y", [svg_chart.Series("a", [(1, 0)])])
    with pytest.raises(ValueError, match="positive"):
        svg_chart.bars("t", "u", [])
    shown = svg_chart.lines("a < b", "x", "y", [svg_chart.Series("a", [(1, 2), (4, 5)])])
    assert "a &lt; b" in shown


# --- simulation


def test_prediction_bytes_are_exact() -> None:
    model = simulation.MODELS[0]
    point = simulation.predict(model, 8, 1024, 2)
    slots = 1024 + 8 * (simulation.SUFFIX + 1)
    assert point.kv_bytes == slots * 2 * 4 * 128 * 2 * 32
    assert point.copied_bytes == 8 * (1024 + simulation.SUFFIX + 1) * 2 * 4 * 128 * 2 * 32
    assert 0 < point.attention_ms < point.copies_ms * 8


def test_predictions_grow_with_branches_and_shrink_with_cards() -> None:
    model = simulation.MODELS[1]
    few, many = (simulation.predict(model, w, 2048, 2).attention_ms for w in (8, 512))
    assert few < many
    cards = simulation.predict(model, 512, 2048, 8).attention_ms
    assert cards < many


def test_checks_cover_every_measured_case() -> None:
    for result in report.load("suite"):
        found = simulation.checks(result)
        assert len(found) == len(result["cases"])
        assert all(predicted > 0 for _, _, predicted in found)


def test_modules_are_the_repositorys() -> None:
    modules: list[ModuleType] = [report, simulation, svg_chart]
    assert all(Path(str(m.__file__)).parent == ROOT / "benchmarks" for m in modules)
