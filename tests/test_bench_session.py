"""A long run of the suite: what fails, takes long or is not reached costs nothing else."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_bench_suite import FORESTS, setting

from fork_attn.bench import figures, measure, results, session
from fork_attn.bench.inputs import Inputs
from fork_attn.bench.shapes import SHAPES
from fork_attn.bench.timing import Timer
from fork_attn.bench.way import WAYS, Way
from fork_attn.cli import main

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Counted(Way):
    """Sleeps, and raises on some run."""

    name = "counted"
    has_plan = True
    seconds = 0.0
    raises_on: int | None = None

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        pass

    def build(self, layers: int) -> None:
        self.runs = self.plans = self.closed = 0

    def plan(self) -> None:
        self.plans += 1

    def run(self, layer: int) -> torch.Tensor:
        self.runs += 1
        time.sleep(self.seconds)
        if self.runs == self.raises_on:
            raise OSError(f"run {self.runs}\nis too many")
        return torch.zeros_like(self.inputs.q)

    def held_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self.closed += 1


def counted(**attributes: Any) -> Counted:
    made: Counted = type("Made", (Counted,), attributes)(Inputs(FORESTS["one"](), setting()))
    made.build(1)
    return made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a GPU whose calls take as long as on the host."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(figures, "graphed", lambda call: call)

    def clock(self: Timer, cold: bool, warm: bool) -> Callable[[Any], float]:
        def seconds(call: Any) -> float:
            begun = time.perf_counter()
            call()
            return time.perf_counter() - begun

        return seconds

    monkeypatch.setattr(Timer, "_gpu_clock", clock)


# --- one case


@pytest.mark.usefixtures("gpu")
def test_a_long_step_of_a_rival_is_added_up_on_a_gpu() -> None:
    ways: dict[str, Way] = {"slow": counted(seconds=0.05), "quick": counted()}
    timer = Timer(CUDA, 0.0, 2, 2)
    found, _ = figures.measured(ways, timer, 1, {})
    slow, quick = ways["slow"], ways["quick"]
    assert isinstance(slow, Counted) and isinstance(quick, Counted)
    # Tried three times, then warmed up and timed twice: cold, warm, graph.
    assert slow.runs == 3 + 3 * 3
    assert quick.runs >= slow.runs + 36 * 2
    step, cold, plan = (found["slow"][what] for what in ("step", "cold", "plan"))
    assert step["added_up"] is True
    assert step["median"] == pytest.approx(plan["median"] + 36 * cold["median"])
    assert "added_up" not in found["quick"]["step"]


@pytest.mark.usefixtures("gpu")
def test_our_own_step_is_always_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "LONGEST_STEP", 0.01)
    ours = counted(seconds=0.001, ours=True)
    found, _ = figures.measured({"ours": ours}, Timer(CUDA, 0.0, 1, 1), 1, {})
    assert "added_up" not in found["ours"]["step"] and ours.runs > 36


def test_on_a_cpu_every_step_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "LONGEST_STEP", 0.0)
    found, _ = figures.measured({"any": counted()}, Timer(CPU, 0.0, 1, 1), 1, {})
    assert "added_up" not in found["any"]["step"] and "graph" not in found["any"]


@pytest.mark.parametrize("fatal", [2, 3, 4, 9])
def test_a_way_that_raises_later_is_dropped_and_the_others_measured(fatal: int) -> None:
    bad, good = counted(raises_on=fatal), counted()
    ways: dict[str, Way] = {"bad": bad, "good": good}
    absent: dict[str, str] = {}
    found, _ = figures.measured(ways, Timer(CPU, 0.0), 1, absent)
    assert set(found) == {"good"} == set(ways)
    assert absent == {"bad": f"failed: OSError: run {fatal} is too many"}
    assert bad.closed == 1 and good.closed == 0
    rounds = [found["good"][what]["rounds"] for what in ("cold", "warm", "plan", "step")]
    assert rounds == [5, 5, 5, 5]


# --- many cases


def case(name: str = "S0") -> measure.Case:
    shape = SHAPES["S6"]
    return measure.Case(type(shape)(name, "tiny", FORESTS["one"], "full"), setting())


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cases that ran; those named F fail, none measures."""
    done: list[str] = []

    def run_case(case: measure.Case, *args: Any) -> dict[str, Any]:
        done.append(case.shape.id)
        if case.shape.id.startswith("F"):
            raise RuntimeError(f"{case.shape.id} is\nwrong")
        return {"id": case.id, "ways": {}, "absent": {"a": "failed: it is", "b": "not here"}}

    limits = SimpleNamespace(stream={"read": 1e9}, as_json=dict)
    monkeypatch.setattr(session, "run_case", run_case)
    monkeypatch.setattr(session, "Limits", lambda *args: limits)
    monkeypatch.setattr(session, "machine", lambda device: dict(MACHINE))
    monkeypatch.setattr(session, "device_target", lambda device: "cpu")
    return done


MACHINE = {"cpu": "a processor", "commit": "abc", "date": "today"}


def go(todo: list[measure.Case], **options: Any) -> tuple[dict[str, Any], str]:
    """The result, and what was shown."""
    shown: list[str] = []
    device = options.pop("device", CPU)
    saved: list[Any] = []
    save = lambda result: saved.append(copy.deepcopy(result))  # noqa: E731
    result = session.Session(device, 0.1, save, shown.append, **options).run(todo)
    assert saved[-1] == json.loads(json.dumps(result)), "what is saved last is all of it"
    return result, "\n".join(shown)


def test_one_case_that_fails_does_not_cost_the_others(ran: list[str]) -> None:
    result, shown = go([case("F1"), case("S1")])
    assert ran == ["F1", "S1"]
    assert [row["id"] for row in result["cases"]] == [case("S1").id]
    assert result["failed"] == [{"id": case("F1").id, "reason": "RuntimeError: F1 is wrong"}]
    assert "failed: RuntimeError: F1 is wrong" in shown and result["not_reached"] == []


def test_a_lost_device_ends_the_run_and_says_so(
    ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    for name, reason in (("F1", "RuntimeError: F1 is wrong"), ("S1", "a: failed: it is")):
        ran.clear()
        result, shown = go([case(name), case("S2")], device=CUDA)
        assert ran == [name] and result["not_reached"] == [case("S2").id]
        # Ways behind the one that lost the device failed for no fault of theirs.
        assert result["cases"] == []
        assert result["failed"] == [
            {"id": case(name).id, "reason": f"the device was lost; {reason}"}
        ]
        assert f"nothing more is measured: the device was lost; {reason}" in shown


def test_what_the_budget_does_not_reach_is_named(
    ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: next(now)))
    todo = [case("S1"), case("S2"), case("S3")]
    result, _ = go(todo, budget=25.0)
    assert ran == ["S1"]
    assert result["not_reached"] == [todo[1].id, todo[2].id] and result["cases_planned"] == 3


def test_another_run_goes_on(ran: list[str]) -> None:
    first, _ = go([case("F1"), case("S1")])
    ran.clear()
    more = [case("F1"), case("S1"), case("S2")]
    second, shown = go(more, before=first)
    assert ran == ["S2", "F1"], "what failed comes last"
    assert [row["id"] for row in second["cases"]] == [case("S1").id, case("S2").id]
    assert second["cases_planned"] == 2 + 1 and "1 cases were measured before, today" in shown
    ran.clear()
    third, _ = go([case("S3")], before=second)
    assert ran == ["S3"] and len(third["cases"]) == 3
    assert [one["cases"] for one in third["kept"]] == [[case("S1").id], [case("S2").id]]
    assert third["failed"] == second["failed"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"machine": {**MACHINE, "commit": "def"}}, "another commit's"),
        ({"plan_costs": {"launch": 1.0}}, "another commit's"),
        ({"asked": {"seconds": 0.1, "ways": ["x"]}}, "another commit's"),
        ({"schema": 0}, "another commit's"),
        ({"machine": {**MACHINE, "date": "yesterday"}}, "yesterday: kept"),
    ],
)
def test_only_the_same_is_kept(ran: list[str], change: dict[str, Any], text: str) -> None:
    first, _ = go([case("S1")])
    ran.clear()
    _, shown = go([case("S1")], before={**first, **change})
    assert text in shown and bool(ran) == ("kept" not in text)


@pytest.mark.parametrize("commit", ["unknown", "abc-dirty"])
def test_nothing_is_kept_where_the_code_is_not_known(
    ran: list[str], commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "machine", lambda device: {**MACHINE, "commit": commit})
    first, _ = go([case("S1")])
    _, shown = go([case("S1")], before=first)
    assert ran == ["S1", "S1"] and f"commit {commit}" in shown


def test_a_gpu_begins_with_the_quick_shapes() -> None:
    full = [c.shape.id for c in measure.cases(CUDA)]
    quick = [c.shape.id for c in measure.cases(CUDA, quick=True)]
    assert tuple(quick) == measure.GPU_QUICK == tuple(full[: len(quick)])
    assert sorted(full) == sorted(SHAPES)


# --- the command and its files


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("fork_attn.bench.machine.STREAM_BYTES", 1 << 16)
    monkeypatch.setattr("fork_attn.bench.measure.COLD_BYTES", 1)
    monkeypatch.setattr(session, "machine", lambda device: {**MACHINE, "threads": 1})
    for name in ("Z1", "Z2"):
        monkeypatch.setitem(SHAPES, name, type(SHAPES["S6"])(name, "tiny", FORESTS["one"], "full"))
    given = ["bench", "--device", "cpu", "--shapes", "Z1", "Z2", "--heads", "4/2x32"]
    given += ["--dtypes", "fp32", "--seconds", "0.01", "--ways", "fork_attn_cpu", "sdpa_batched"]
    return [*given, "--json", str(tmp_path / "out.json")]


def test_the_command_goes_on(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--budget", "1e-9"]) == 0
    assert "no time left for 2 of 2 cases: Z1" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["cases"] == []
    for kept in (0, 2):
        assert main([*arguments, "--budget", "1000"]) == 0
        shown = capsys.readouterr().out
        assert f"{kept} cases were measured before" in shown and "no time left" not in shown
    assert main(arguments) == 0
    assert "measured before" not in capsys.readouterr().out
    (tmp_path / "out.json").write_text("{")
    assert main([*arguments, "--budget", "1"]) == 2
    assert main([*arguments, "--budget", "0"]) == 2
    shown = capsys.readouterr().err
    assert "json: expected results to go on with" in shown and "budget: expected seconds" in shown


def test_the_command_fails_after_all_others_are_measured(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        WAYS,
        "ours too",
        type("Ours", (Counted,), {"name": "ours too", "ours": True, "raises_on": 1}),
    )
    arguments.insert(arguments.index("--ways") + 1, "ours too")
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert "FAILED Z1 4/2x32 fp32 page 16: ours too: failed: OSError: run 1 is" in shown
    rows = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [row["failed"] for row in rows] == [["ours too"]] * 2
    assert all(set(row["ways"]) == {"fork_attn_cpu", "sdpa_batched"} for row in rows)


def test_a_file_is_whole_whenever_its_writer_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some" / "out.json"
    results.write(path, {"cases": [1]})

    def stopped(self: Path, text: str, **options: Any) -> int:
        with self.open("w") as file:
            file.write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        results.write(path, {"cases": [1, 2]})
    assert json.loads(path.read_text()) == {"cases": [1]}
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"
