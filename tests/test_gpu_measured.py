"""The programs of `make gpu` where only a card would show it, and what is said of their files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_machine import GOOD, ROOT

pytest.importorskip("triton")
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import measured
import plans
import sweep

META = torch.device("meta")


# --- the sweep


@pytest.mark.parametrize("workers", [108, 132, 148])
def test_the_sweep_has_every_page_that_its_plans_read(workers: int) -> None:
    assert len(sweep.todo(dry=False)) == 12
    for rows, _, page in sweep.todo(dry=False):
        plan = sweep.make_plan("sm_90", workers, rows, page, dry=False)
        _, k, v, _ = sweep.tensors_of(META, plan, page).arguments(plan, True)
        assert min(k.shape[0], v.shape[0]) >= plan.page_limit
        read = plan.counts["num_tokens"] + (k.shape[0] - 1) * page
        assert read * sweep.HEADS * 512 > 2**30  # many times any L2


def test_a_dry_run_plans_what_a_card_gets(capsys: pytest.CaptureFixture[str]) -> None:
    assert [len(list(of(132))) > 10 for of in (plans.of_sweep, plans.of_calibration)] == [True] * 2
    need = plans.Need("a", page_limit=5, pages=4, num_bytes=1)
    assert need.wrong(10) == "a: the plan reads 5 pages, there are 4"
    assert "do not fit" in str(plans.Need("a", 4, 4, 11).wrong(10))
    assert plans.Need("a", 4, 4, 10).wrong(10) is None


def run_sweep(monkeypatch: pytest.MonkeyPatch, out: Path, row: dict[str, Any]) -> int:
    def no_bodies(*_: Any) -> list[dict[str, Any]]:
        return [{"body": {"warps": 4, "stages": 3}, "chosen": True, **row}]

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sweep, "sweep_plan", no_bodies)
    monkeypatch.setattr(sweep, "compile_ahead", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--dry", "--out", str(out)])
    return sweep.main()


def test_a_sweep_without_times_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep(monkeypatch, tmp_path, {"absent": "ValueError: pages"}) == 1
    assert "NOTHING MEASURED of 1 plans" in capsys.readouterr().out
    shutil.rmtree(tmp_path)
    times = {"seconds_memory": 1.0, "seconds_page": 1.0}
    assert run_sweep(monkeypatch, tmp_path, times) == 0


def fails_to_compile(case: sweep.Case, index: int, *_: Any) -> None:
    if index == 1:
        os._exit(1)


def test_a_body_that_kills_its_compiler_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "compile_body", fails_to_compile)
    with ProcessPoolExecutor(1) as pool:
        for _ in range(2):  # the second finds the processes gone
            sweep.compile_ahead(
                pool, sweep.todo(False)[:2], "sm_90", 132, time.monotonic() + 60, False
            )


# --- what files say


def said(kind: str, text: str, tmp_path: Path) -> measured.Found:
    path = tmp_path / "file"
    path.write_text(text)
    return measured.KINDS[kind](path)


def junit(**outcomes: str) -> str:
    """Modules, and the outcomes of their tests: p, f, e or s."""
    tags = {"p": "", "f": "<failure/>", "e": "<error/>", "s": "<skipped/>"}
    cases = [
        f'<testcase classname="tests.gpu.{module}" name="{i}">{tags[o]}</testcase>'
        for module, some in outcomes.items()
        for i, o in enumerate(some)
    ]
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"


@pytest.mark.parametrize(
    ("outcomes", "status", "words"),
    [
        ({"test_a": "pps", "test_b": "p"}, 0, ""),
        ({"test_a": "pfe"}, 1, "FAILED: test_a: 1; test_a: 2"),
        ({"test_a": "sss"}, 1, "NOTHING TESTED: no test passed"),
        ({}, 1, "NOTHING TESTED: no test passed"),
        ({"test_a": "ppp", "test_b": "ss"}, 1, "NOTHING TESTED of test_b: 2 skipped"),
    ],
)
def test_tests(outcomes: dict[str, str], status: int, words: str, tmp_path: Path) -> None:
    found = said("tests", junit(**outcomes), tmp_path)
    assert found.status == status and words in "".join(found.wrong)
    if len(outcomes) == 2:  # of a file some tests were chosen
        assert said("sanitizer", junit(**outcomes), tmp_path).status == 0


EMPTY: dict[str, dict[str, Any]] = {
    "baseline": {},
    "costs": {},
    "sweep": {"cases": []},
    "suite": {"cases": []},
    "end_to_end": {"cells": [], "traces": [], "continuous": {}},
}


@pytest.mark.parametrize("kind", list(EMPTY))
def test_an_empty_file_is_loud(kind: str, tmp_path: Path) -> None:
    good: Any = GOOD[kind]
    if kind == "baseline":
        good |= {"cache_kernels": GOOD["cache_kernels"]}
    assert said(kind, json.dumps(good), tmp_path).status == 0
    found = said(kind, json.dumps(EMPTY[kind]), tmp_path)
    assert found.status == 1 and "NOTHING MEASURED" in "".join(found.wrong)
    path = tmp_path / "broken.json"
    path.write_text('{"cases": [')
    program = str(ROOT / "benchmarks/gpu/measured.py")
    done = subprocess.run(
        [sys.executable, "-S", program, kind, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "!!! broken: NOTHING MEASURED" in done.stdout


def test_all_bodies_absent_from_one_plan(tmp_path: Path) -> None:
    plan = {"rows": 16, "load": "pointers", "page_size": 16}
    good, bad = {"seconds_memory": 1.0}, {"absent": "ValueError: too few pages"}
    cases = [{**plan, "bodies": [good, bad]}, {**plan, "bodies": [bad, bad]}]
    found = said("sweep", json.dumps({"cases": cases}), tmp_path)
    assert found.status == 1 and found.text == "1 of 4 bodies in 2 plans"
    assert "of 16 rows, pointers, pages of 16: ValueError: too few pages" in found.wrong[0]


def case(name: str, ran: tuple[str, ...], **absent: str) -> dict[str, Any]:
    ways = {way: {"ours": way.startswith("fork_attn"), "step": {}} for way in ran}
    return {"id": name, "ways": ways, "absent": absent}


def test_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEERS", raising=False)
    cases = [
        case("S1", ("fork_attn_triton", "sdpa"), flashinfer_decode="no module", xformers_a="x"),
        case("S2", ("fork_attn_triton", "xformers_a"), flashinfer_decode="no module", sdpa="big"),
    ]
    held: dict[str, Any] = {"cases": cases, "cases_planned": 2, "not_reached": [], "failed": []}
    found = said("suite", json.dumps(held), tmp_path)
    assert found.status == 0 and found.text == "ours in 2 of 2 cases, 3 ways"
    assert found.notes == ["absent from all 2 cases: flashinfer_decode: no module"]
    assert not found.wrong

    monkeypatch.setenv("PEERS", "somewhere")
    found = said("suite", json.dumps(held), tmp_path)
    assert found.status == 1
    loud = [line for line in found.wrong if "PEERS carries" in line]
    assert [line.split()[3] for line in loud] == ["flash_attn_3,", "flashinfer,"]
    monkeypatch.delenv("PEERS")

    left = held | {"not_reached": ["S3"], "cases_planned": 3}
    assert said("suite", json.dumps(left), tmp_path).status == measured.CUT_OFF
    failed = left | {"failed": [{"id": "S3", "reason": "RuntimeError: lost"}]}
    found = said("suite", json.dumps(failed), tmp_path)
    assert found.status == 1 and "FAILED: S3: RuntimeError: lost" in found.wrong
    ours = case("S1", ("sdpa",), fork_attn_triton="failed: wrong") | {
        "failed": ["fork_attn_triton"]
    }
    found = said("suite", json.dumps(held | {"cases": [ours]}), tmp_path)
    assert "NOTHING MEASURED: our kernel ran in no case" in found.wrong
    assert "FAILED: S1: fork_attn_triton: failed: wrong" in found.wrong


def test_end_to_end_that_did_not_end(tmp_path: Path) -> None:
    held = {key: value for key, value in GOOD["end_to_end"].items() if key != "continuous"}  # type: ignore[attr-defined]
    assert said("end_to_end", json.dumps(held), tmp_path).status == measured.CUT_OFF


def test_absent_from_dense_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good: Any = GOOD["baseline"]
    held = good | {
        "cache_kernels": GOOD["cache_kernels"],
        "dense_attention": [{"absent": {"fa3": "x"}}],
    }
    text = ["absent from dense attention: fa3: x"]
    for peers, status, notes, wrong in (("", 0, text, []), ("somewhere", 1, [], text)):
        monkeypatch.setenv("PEERS", peers)
        found = said("baseline", json.dumps(held), tmp_path)
        assert (found.status, found.notes, found.wrong) == (status, notes, wrong)


# --- tests/gpu

LOST = """
import pytest, torch
broken = []
torch.cuda.is_initialized = lambda: True
torch.cuda.empty_cache = lambda: None
def synchronize():
    if broken: raise RuntimeError("an illegal memory access")
torch.cuda.synchronize = synchronize
@pytest.mark.parametrize("i", range(8))
def test_it(i):
    if i == 1: broken.append(i)
"""


def test_a_kernel_that_kills_its_process_does_not_cost_the_rest(tmp_path: Path) -> None:
    (tmp_path / "test_lost.py").write_text(LOST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    shutil.copy(ROOT / "tests/gpu/conftest.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "1", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    # An error of the one at fault, a failure of the one that found the process lost; no other.
    assert "1 failed, 7 passed, 1 error" in done.stdout, done.stdout
    assert "an illegal memory access" in done.stdout
