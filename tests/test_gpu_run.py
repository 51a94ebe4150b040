"""benchmarks/gpu/run.sh on a machine that only looks like one with a GPU."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_machine import GOOD, ROOT, Call, GpuMachine, states

PARTS = ("build", "tests", "sanitizer", "baseline", "tune", "bench", "end_to_end")
COSTLY = (
    "pip install",
    "-m pytest",
    "baseline.py",
    "calibrate",
    "fork_attn bench",
    "end_to_end.py",
)


@pytest.fixture
def machine(tmp_path: Path) -> GpuMachine:
    return GpuMachine(tmp_path)


def of(calls: list[Call], text: str) -> list[Call]:
    return [call for call in calls if text in call.text]


def number_after(option: str, call: Call) -> int:
    found = re.search(rf"{option} (\d+)", call.text)
    assert found, call.text
    return int(found[1])


def test_all_goes_through_every_part(machine: GpuMachine) -> None:
    status, output, calls = machine.run("all")
    assert status == 0, output
    assert states(output) == dict.fromkeys(PARTS, "done")
    for text in COSTLY:
        assert of(calls, text), text
    assert {p.name for p in machine.out.iterdir()} == {
        "log.txt", "baseline-nvidia-test.json", "costs.json", "sweep.json", "roofline.svg",
        "suite_nvidia-test.json", "end_to_end_nvidia-test.json",
    }  # fmt: skip
    assert (machine.out / "log.txt").read_text() == output
    assert all(call.environ["COMMIT"] for call in calls[1:])
    built = of(calls, "pip install")[0].environ
    assert built["FORK_ATTN_CUDA"] == "ON" and built["FORK_ATTN_CUDA_ARCHS"] == "90a-real"
    assert str(built["PATH"]).endswith(f":{machine.cuda}/bin")  # no nvcc on PATH before


def test_a_failing_part_costs_no_other(machine: GpuMachine) -> None:
    machine.bad = {"sweep.py": 1}
    status, output, _ = machine.run("all")
    assert status == 1
    assert states(output) == {**dict.fromkeys(PARTS, "done"), "tune": "failed"}
    machine.bad = {}
    status, output, calls = machine.run("all")
    assert status == 0
    before = dict.fromkeys(PARTS, "done before") | {"build": "done", "tune": "done"}
    assert states(output) == before
    assert not of(calls, "pip install") and not of(calls, "-m pytest") and of(calls, "sweep.py")


def test_what_was_done_with_other_sources_is_done_again(machine: GpuMachine) -> None:
    assert machine.run("all", COMMIT="same")[0] == 0
    _, output, calls = machine.run("all", COMMIT="same")
    assert states(output)["tests"] == "done before" and not of(calls, "pip install")
    (machine.tree / "csrc/a.cu").write_text("two")
    status, output, calls = machine.run("all", COMMIT="same")
    assert status == 0 and states(output) == dict.fromkeys(PARTS, "done")
    for text in COSTLY:
        assert of(calls, text), text


def test_one_part_alone_has_the_whole_call(machine: GpuMachine) -> None:
    _, _, calls = machine.run("all")
    (quick,) = of(calls, "fork_attn bench")
    assert "--quick" in quick.text and "--device cuda" in quick.text
    assert 80 < number_after("--budget", quick) < 420
    status, output, calls = machine.run("bench")
    assert status == 0 and states(output) == {"build": "done", "bench": "done"}
    (whole,) = of(calls, "fork_attn bench")
    assert "--quick" not in whole.text  # those come first all the same
    assert number_after("--budget", whole) > 480
    (alone,) = of(
        machine.run("bench", SHAPES="S3 N4", HEADS="16/8", LIMIT="300")[2], "fork_attn bench"
    )
    assert "--shapes S3 N4" in alone.text and "--heads 16/8" in alone.text
    assert number_after("--budget", alone) <= 300


def test_a_fresh_machine_builds_first(machine: GpuMachine) -> None:
    _, output, calls = machine.run("tests")
    assert states(output) == {"build": "done", "tests": "done"}
    assert of(calls, "pip install")
    parallel, alone = of(calls, "-m pytest")
    assert "--ignore=tests/gpu/test_streams.py" in parallel.text
    assert "-n 1 " in alone.text and "tests/gpu/test_streams.py" in alone.text


def test_without_device_code_the_rest_is_tested(machine: GpuMachine) -> None:
    machine.bad = {"pip": 1}
    status, output, calls = machine.run("tests")
    assert status == 1 and states(output) == {"build": "failed", "tests": "done"}
    assert [c.environ["FORK_ATTN_CUDA"] for c in of(calls, "pip install")] == ["ON", "OFF"]
    assert "!!! device code was not built" in output.partition("=== summary")[2]
    # Nor is it taken for built in the next call.
    assert of(machine.run("tests")[2], "pip install")


def test_plans_follow_the_costs_of_a_call_before(machine: GpuMachine, tmp_path: Path) -> None:
    _, output, calls = machine.run("bench")
    assert "!!! no costs.json" in output and "costs sm_90 datasheet" in output
    assert "!!! no picture" in output
    assert of(calls, "fork_attn bench")[0].environ["FORK_ATTN_COSTS"] is None
    assert machine.run("baseline")[0] == machine.run("tune")[0] == 0
    _, output, calls = machine.run("bench")  # $OUT is empty again
    costs = of(calls, "fork_attn bench")[0].environ["FORK_ATTN_COSTS"]
    assert costs and Path(costs).is_file() and f"costs sm_90 {costs}" in output
    assert of(calls, "roofline.py") and (machine.out / "roofline.svg").exists()

    # Another machine, on which only the tree lies: the files are named.
    shutil.rmtree(machine.tree / "build")
    for name in ("costs.json", "base.json"):
        (tmp_path / name).write_text("{}")
    given = {"COSTS": f"{tmp_path}/costs.json", "BASE": f"{tmp_path}/base.json"}
    status, _, calls = machine.run("bench", **given)
    assert status == 0
    assert of(calls, "fork_attn bench")[0].environ["FORK_ATTN_COSTS"] == given["COSTS"]
    assert given["BASE"] in of(calls, "roofline.py")[0].text
    status, output, _ = machine.run("bench", COSTS=f"{tmp_path}/none.json")
    assert status == 1 and "!!! COSTS: there is no file" in output


def test_a_part_that_measured_nothing_fails(machine: GpuMachine) -> None:
    machine.good = GOOD | {"sweep": {"cases": []}, "suite": {"cases": []}}
    status, output, _ = machine.run("all")
    assert status == 1
    found = states(output)
    assert found["tune"] == found["bench"] == "failed" and found["end_to_end"] == "done"
    said = output.partition("=== summary")[2]
    assert "!!! sweep: NOTHING MEASURED: no plan" in said
    assert "!!! suite_nvidia-test: NOTHING MEASURED: our kernel ran in no case" in said


def test_what_has_no_time_left_is_not_run(machine: GpuMachine) -> None:
    status, output, calls = machine.run("all", LIMIT="0")
    assert status == 1 and states(output) == dict.fromkeys(PARTS, "not run")
    assert not of(calls, "-m pytest")


def left_to_do(number: int) -> dict[str, object]:
    """Results of a suite that another run goes on with, a case at a time."""
    suite = dict(GOOD["suite"])  # type: ignore[call-overload]
    return GOOD | {"suite": suite | {"not_reached": [f"S{i}" for i in range(number)]}}


def test_the_suite_goes_on_after_a_case_that_lost_the_gpu(machine: GpuMachine) -> None:
    machine.good = left_to_do(4)
    status, output, calls = machine.run("bench")
    assert status == 0 and states(output)["bench"] == "done"
    files = {call.text.partition("--json ")[2].split()[0] for call in of(calls, "fork_attn bench")}
    assert len(of(calls, "fork_attn bench")) == 4 and len(files) == 1


def test_a_suite_that_is_cut_off_goes_on_in_another_call(machine: GpuMachine) -> None:
    machine.good = left_to_do(3)
    status, output, calls = machine.run("bench", LIMIT="40")
    assert status == 1 and states(output)["bench"] == "cut off"
    assert "2 not reached" in output
    assert len(of(calls, "fork_attn bench")) == 1
    assert (machine.out / "suite_nvidia-test.json").exists()
    assert machine.run("bench")[0] == 0


def test_races_are_looked_for_in_our_own_kernels_alone(machine: GpuMachine) -> None:
    status, output, calls = machine.run("sanitizer")
    assert status == 0, output
    (races,) = of(calls, "--tool racecheck")
    (memory,) = of(calls, "--tool memcheck")
    assert "--kernel-name kns=fork_attn" in races.text
    assert "tests/gpu/test_cache_kernels.py" in races.text
    assert "--kernel-name" not in memory.text and memory.text.split()[-1] == "tests/gpu"
    assert output.partition("=== summary")[2].count("1 passed") == 2


def test_peers_that_cannot_be_unpacked_are_loud(machine: GpuMachine, tmp_path: Path) -> None:
    carried = tmp_path / "carried"
    carried.mkdir()
    shutil.copy(ROOT / "benchmarks/peers/activate.sh", carried)
    machine.bad = {"--target": 1, "import xformers": 1}
    site = tmp_path / "site"
    given = {"PEERS": str(carried), "PEERS_SITE": str(site)}
    status, output, calls = machine.run("baseline", **given)
    assert status == 1 and states(output)["baseline"] == "failed"
    assert not (site / ".ready").exists()
    assert f"!!! {carried}/activate.sh failed with status 1" in output
    assert "!!! xformers cannot be imported" in output
    assert of(calls, "baseline.py")  # what torch brings is measured all the same


@pytest.mark.parametrize("processes", [0, 2])
def test_failures_are_told_when_tests_are_cut_off(processes: int, tmp_path: Path) -> None:
    fails = "def test_fails(): assert 'this' == 'that'\n"
    sleeps = "def test_sleeps(): time.sleep(60)\n"
    (tmp_path / "test_a.py").write_text(f"import time\n{fails}{sleeps}")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    script = f"""
        source {ROOT}/benchmarks/gpu/run.sh
        cd {tmp_path} && work={tmp_path} python={sys.executable} deadline=$((SECONDS + 5))
        run_pytest some {processes} .
    """
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        # As where a shell runs it in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.returncode == 124, done.stdout + done.stderr
    assert "AssertionError: assert 'this' == 'that'" in done.stdout
    assert "cut off after" in done.stdout
    assert (tmp_path / "some.xml").exists()


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    script = ROOT / "benchmarks/gpu/run.sh"
    done = subprocess.run(
        ["bash", str(script), "test"],
        env={"OUT": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"expected all, {', '.join(PARTS)} or dry, got 'test'" in done.stderr
