"""`fork-attn calibrate`: known costs come back from times that the model gives, and a real run
writes a file that plans follow."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fork_attn import _C, cli, costs
from fork_attn.calibrate import design, fit, measure

CPU = torch.device("cpu")
KNOWN = {
    "bytes_per_ns": 7.0,
    "flops_per_ns_16": 90.0,
    "flops_per_ns_32": 110.0,
    "flops_per_ns_64": 130.0,
    "flops_per_ns_128": 160.0,
    "load_rows": 3.5,
    "ns_per_exp": 0.4,
    "item_ns": 650.0,
    "partial_bytes_per_ns": 4.0,
    "launch_ns": 9000.0,
}


@pytest.fixture(autouse=True)
def datasheet() -> Iterator[None]:
    costs.load.cache_clear()
    before = {target: _C.target_costs(target) for target in costs.TARGETS}
    yield
    costs.load.cache_clear()
    for target in costs.TARGETS:
        _C.reset_target_costs(target)
        assert _C.target_costs(target) == before[target]


@pytest.mark.parametrize(("target", "workers"), [("cpu", 2), ("cpu", 7), ("sm_90", 132)])
def test_known_costs_come_back(target: str, workers: int) -> None:
    known = KNOWN if target == "cpu" else KNOWN | {"load_rows": 0.0}
    scale = 1.0 if target == "cpu" else 30.0  # a GPU's worker is faster
    known = {k: x * scale if "per_ns" in k else x / scale for k, x in known.items()}
    known["load_rows"] *= scale
    cases = list(design.resident_cases(target, workers, 4e6 if target == "cpu" else 2e5))
    if target != "cpu":
        assert {rows for case in cases for rows in case.work.slots} == {16, 32, 64, 128}
    ns = [design.predicted_ns(case, known) for case in cases]
    found = fit.fit(cases, ns, known["bytes_per_ns"], load_rows=target == "cpu")
    assert found == pytest.approx(known, rel=1e-6)
    rng = random.Random(1)
    noisy = [t * rng.uniform(0.98, 1.02) for t in ns]
    found = fit.fit(cases, noisy, known["bytes_per_ns"], load_rows=target == "cpu")
    for name in ("flops_per_ns_16", "flops_per_ns_64", "item_ns"):
        assert found[name] == pytest.approx(known[name], rel=0.2), name
    assert max(map(abs, fit.errors(cases, noisy, found))) < 0.05


def test_a_known_bandwidth_comes_back() -> None:
    """On a CPU, where arithmetic's time is taken off; what it hides shows as at least a share."""
    cases = list(design.streamed_cases("cpu", 2, 1 << 24))
    ns = [design.predicted_ns(case, KNOWN) for case in cases]
    assert fit.bandwidth(cases, ns, KNOWN) == pytest.approx(KNOWN["bytes_per_ns"], rel=1e-6)
    slow = KNOWN | {f"flops_per_ns_{rows}": 1.0 for rows in (16, 32, 64, 128)}
    assert fit.bandwidth(cases, ns, slow) == pytest.approx(20 * fit.bandwidth(cases, ns))


def test_what_a_worker_does_is_what_the_planner_says() -> None:
    _C.set_target_costs("cpu", KNOWN)
    for case in (*design.tree_cases("cpu", 3, 10**6), *design.streamed_cases("cpu", 3, 1 << 24)):
        work = case.work
        row_bytes = 2 * (case.shape.head_dim_v + 1) * 4
        ns = design.predicted_ns(case, KNOWN) - KNOWN["launch_ns"]
        ns -= work.partial_rows * row_bytes / KNOWN["partial_bytes_per_ns"]
        assert ns <= case.plan.work[0] * 1000 * (1 + 1e-9) or len(case.plan.span_ns) > 3
        total = sum(case.plan.span_ns) * case.shape.num_kv_heads
        assert ns >= total / 3 * (1 - 1e-9)


def test_blocks_have_the_rows_that_were_asked_for() -> None:
    before = _C.target_costs("cpu")
    for rows in design.CPU_ROWS:
        cut, plan = (design.plan_rows("cpu", 2, rows, 3, 64_000, 64, pieces=n) for n in (16, 1))
        assert plan.num_row_blocks == 3
        assert set(design.work_of(plan, "cpu", 2).slots) == {rows}
        assert cut.num_items > plan.num_items and cut.counts["num_partial_rows"] > 0
    assert _C.target_costs("cpu") == before


def test_times_that_contradict_the_model_are_refused() -> None:
    streamed = list(design.streamed_cases("cpu", 2, 1 << 24))
    assert fit.bandwidth(streamed, [2e6, 1e6]) > 0
    with pytest.raises(ValueError, match="twice the memory took no longer"):
        fit.bandwidth(streamed, [1e6, 1e6])
    cases = list(design.resident_cases("cpu", 2, 1e6))
    slots = [sum(case.work.slots.values()) for case in cases]
    with pytest.raises(ValueError, match="calibrate: "):
        fit.fit(cases, [1e9 / (1 + s) for s in slots], 7.0, load_rows=True)


def test_the_command_writes_a_file_that_plans_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kernels run for real; the times are the model's, so that a busy machine cannot matter."""
    small = measure.Effort(2e5, 1 << 24, 1)
    monkeypatch.setattr(measure, "effort", lambda device, quick: small)
    real = measure._time

    def modelled(cases: list[design.Case], *rest: object) -> list[float]:
        assert all(ns > 0 for ns in real(cases, *rest))  # type: ignore[arg-type]
        return [design.predicted_ns(c, KNOWN) for c in cases]

    monkeypatch.setattr(measure, "_time", modelled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["calibrate", "--target", "cpu", "--quick"]) == 0
    printed = capsys.readouterr()
    path = tmp_path / "fork-attn" / "costs-cpu.json"
    assert f"written to {path}" in printed.out and "trees, not fitted" in printed.out
    assert "bandwidth: 2 calls" in printed.err
    assert _C.target_costs("cpu")["item_ns"] == 1000.0  # this process goes on as it was
    found = json.loads(path.read_text())
    assert found["workers"] == torch.get_num_threads()
    assert found["fit"]["largest_error"] < 1e-3
    assert found["costs"]["load_rows"] == KNOWN["load_rows"]
    assert found["datasheet"]["item_ns"] == 1000.0

    monkeypatch.delenv("FORK_ATTN_COSTS")
    costs.load.cache_clear()
    assert costs.describe("cpu") == f"measured on {found['machine']}, {found['date']}, {path}"
    assert costs.target_costs("cpu")["item_ns"] == pytest.approx(650.0, rel=1e-3)


def test_what_was_measured_is_shown_where_it_fits_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = measure.Effort(2e5, 1 << 24, 1)
    monkeypatch.setattr(measure, "effort", lambda device, quick: small)
    monkeypatch.setattr(measure, "_time", lambda cases, *rest: [7e3] * len(cases))
    before = _C.target_costs("cpu")
    out = tmp_path / "x.json"
    assert cli.main(["calibrate", "--target", "cpu", "--out", str(out)]) == 2
    complaint = capsys.readouterr().err
    assert "twice the memory took no longer" in complaint
    assert complaint.count(" 7.0 ") >= 10 and "predicted us" in complaint
    assert not out.exists() and _C.target_costs("cpu") == before


def test_a_gpu_that_is_not_here_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "x.json"
    assert cli.main(["calibrate", "--target", "sm_90", "--out", str(out)]) == 2
    complaint = capsys.readouterr().err
    assert "target: sm_90 can only be measured where it is; here is no CUDA device" in complaint
    assert not out.exists()
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--target", "sm_70"])
