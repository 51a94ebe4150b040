"""The regression guard: ratios to a rival, noise allowed, another machine refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fork_attn.bench import compare, measure, session
from fork_attn.bench.compare import OVERALL, SLACK
from fork_attn.cli import main


def result(**factors: float) -> dict[str, Any]:
    """Results of three cases; `factors` slow a way down in all of them."""

    def times(name: str, median: float) -> dict[str, float]:
        median *= factors.get(name, 1.0)
        return {"median": median, "p20": median * 0.99, "p95": median * 1.1, "rounds": 9}

    cases = []
    for i in (1, 2, 3):
        ways = {"fork_attn_cpu": (True, 1.0 * i), "sdpa": (False, 3.0 * i), "noisy": (False, 2.0)}
        row: dict[str, Any] = {"id": f"case {i}", "ways": {}}
        for name, (mine, median) in ways.items():
            row["ways"][name] = {"ours": mine, "cold": times(name, median)}
        row["ways"]["noisy"]["cold"]["p20"] *= 0.5
        cases.append(row)
    machine = {"cpu": "a processor", "threads": 2, "capability": "AVX512"}
    return {"schema": session.SCHEMA, "machine": machine, "cases": cases}


def test_the_same_is_no_regression_on_a_slower_machine_either() -> None:
    found = compare.compare(result(fork_attn_cpu=2.0, sdpa=2.0, noisy=2.0), result())
    assert not found.regressed
    assert found.overall == pytest.approx(1.0)
    assert {change.rival for change in found.changes} == {"sdpa"}, "the rival that spreads least"


def test_slower_is_a_regression() -> None:
    found = compare.compare(result(fork_attn_cpu=1.3), result())
    assert found.regressed and all(change.regressed for change in found.changes)
    assert found.changes[0].now == pytest.approx(3 / 1.3)
    assert "REGRESSED" in "\n".join(compare.show(found))
    assert not compare.compare(result(fork_attn_cpu=0.7), result()).regressed


def test_all_a_little_slower_is_one_too() -> None:
    slow = (OVERALL + SLACK) / 2
    found = compare.compare(result(fork_attn_cpu=slow), result())
    assert not any(change.regressed for change in found.changes)
    assert found.regressed


def test_noise_is_allowed_for() -> None:
    now = result(fork_attn_cpu=1.25)
    noisy = copy.deepcopy(now)
    for row in noisy["cases"]:
        row["ways"]["fork_attn_cpu"]["cold"]["p20"] *= 0.8
    assert compare.compare(now, result()).changes[0].regressed
    assert not compare.compare(noisy, result()).changes[0].regressed


def test_the_mean_of_few_noisy_cases_is_allowed_their_noise() -> None:
    now, then = result(fork_attn_cpu=1.15), result()
    for row in now["cases"]:
        row["ways"]["fork_attn_cpu"]["cold"]["p20"] *= 0.8
    del now["cases"][1:]
    alone = compare.compare(now, then)
    assert alone.overall < 1 / OVERALL and not alone.regressed
    # Noise of its own does not hide what all of many cases say.
    many = copy.deepcopy(now)
    many["cases"] = [{**now["cases"][0], "id": f"case {i}"} for i in range(40)]
    then["cases"] = [{**then["cases"][0], "id": f"case {i}"} for i in range(40)]
    assert compare.compare(many, then).regressed


def test_what_cannot_be_compared_is_said() -> None:
    other = result()
    other["machine"]["threads"] = 8
    with pytest.raises(ValueError, match="against: expected results of a processor, 2 threads"):
        compare.compare(result(), other)
    other = result()
    other["schema"] = 0
    with pytest.raises(ValueError, match="expected schema"):
        compare.compare(result(), other)
    now = result()
    now["cases"][0]["id"] = "new"
    assert compare.compare(now, result()).missing == ["new"]
    for row in now["cases"]:
        row["id"] += " of today"
    with pytest.raises(ValueError, match="no case in common"):
        compare.compare(now, result())


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fork_attn.bench.machine.STREAM_BYTES", 1 << 16)
    monkeypatch.setattr("fork_attn.bench.measure.COLD_BYTES", 1)
    path = tmp_path / "out.json"
    arguments = ["bench", "--device", "cpu", "--shapes", "S7a", "--heads", "4/2x32"]
    arguments += ["--dtypes", "fp32", "--seconds", "0.01", "--json", str(path)]
    arguments += ["--ways", "fork_attn_cpu", "grouped_matmul"]
    assert main(arguments) == 0
    written = json.loads(path.read_text())
    assert [row["shape"] for row in written["cases"]] == ["S7a"]
    assert path.with_suffix(".csv").read_text().startswith("way,id,shape,")
    assert "limit" in capsys.readouterr().out

    # Held against results in which we were a thousand times as fast.
    fast = copy.deepcopy(written)
    for times in fast["cases"][0]["ways"]["fork_attn_cpu"].values():
        if isinstance(times, dict):
            times |= {"median": times["median"] / 1000, "p20": times["p20"] / 1000}
    against = tmp_path / "then.json"
    against.write_text(json.dumps(fast))
    assert main([*arguments, "--against", str(against)]) == 1
    assert "REGRESSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shapes", "S99"], "shapes: expected of"),
        (["--ways", "magic"], "ways: expected of"),
        (["--heads", "3/2"], "heads: expected a multiple"),
        (["--device", "tpu"], "device: expected cpu or cuda"),
        (["--seconds", "-1"], "seconds: expected seconds above 0, got -1.0"),
        (["--seconds", "nan"], "seconds: expected seconds above 0, got nan"),
        (["--budget", "0"], "budget: expected seconds above 0, got 0.0"),
        (["--page-sizes", "16", "0"], "page_sizes: expected 1 to 65536, got 0"),
        (["--against", "/nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "3", '{"machine": {}}', '{"machine": 1}', "{"])
def test_other_files_are_no_results(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert main(["bench", "--against", str(path)]) == 2
    assert f"against: expected results in {path}" in capsys.readouterr().err
    if not text.startswith('{"'):
        assert main(["bench", "--json", str(path), "--budget", "0.001", "--shapes", "S7a"]) == 2
        assert f"json: expected results to go on with in {path}" in capsys.readouterr().err
    assert path.read_text() == text


def test_the_list_names_every_shape_and_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*measure.WAYS, *measure.SHAPES])
    takes = {line.split()[0] for line in shown.splitlines() if " fp8 " in line}
    rivals = {name for name in takes if not measure.WAYS[name].ours}
    assert "fork_attn_cpu" in takes
    assert {name.split("_")[0] for name in rivals} == {"flashinfer", "fork"}
