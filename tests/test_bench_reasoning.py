"""The measurement of thinking in threads: what it runs is what it says, and the table shows it."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import reason_scripts  # noqa: E402
import reasoning  # noqa: E402
import report  # noqa: E402
import report_reasoning  # noqa: E402


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    saved: list[dict[str, Any]] = []
    args = Namespace(model="tiny", quick=True, rounds=1)
    result = reasoning.measure(args, lambda some: saved.append(copy.deepcopy(some)))
    assert [len(some["fans"]) for some in saved] == [1, 2, 2, 2], "saved after each part"
    assert saved[-1] == result
    return result


def test_all_ways_write_the_same(measured: dict[str, Any]) -> None:
    fan, alone = measured["fans"]
    assert fan["same_tokens"] and alone["same_tokens"]
    assert set(fan["ways"]) == {"fork_attn", "stock_one_by_one", "stock_batch"}
    assert set(alone["ways"]) == {"fork_attn", "stock_generate"}
    held = {name: way["kv_bytes"] for name, way in fan["ways"].items()}
    assert held["fork_attn"] < held["stock_batch"]
    # Stock holds one copy of the prompt or three, grown by all that was fed.
    row = 2 * 3 * 2 * 16 * 4  # K and V, layers, KV heads, head dimension, fp32
    grown = fan["prefix"] + fan["tokens"]
    assert held["stock_one_by_one"] == row * grown
    assert held["stock_batch"] == row * 3 * grown


def test_joins_differ_in_what_they_read_again(measured: dict[str, Any]) -> None:
    threads, tokens, forks = reasoning.JOINS["quick"]
    ways = measured["joins"]["ways"]
    # All threads but the first, and the tag that ends each.
    again = forks * (threads - 1) * (tokens + 1)
    assert ways["threadweaver"]["prefilled_tokens"] == again
    assert ways["threadweaver_rebase"]["prefilled_tokens"] == 0


def test_coordination_is_of_wide_steps(measured: dict[str, Any]) -> None:
    found = measured["coordination"]
    threads, tokens, forks = reasoning.COORDINATION["quick"]
    assert (found["threads"], found["forks"]) == (threads, forks)
    assert found["step"]["rounds"] >= tokens, "every step in which all threads write"
    assert 0 < found["share"]["median"] < 1 and found["step_without_model"]["median"] > 0


def test_a_script_that_is_not_followed_is_no_measurement() -> None:
    model, tokenizer = reason_scripts.load("tiny")
    script = reason_scripts.tagged_script(tokenizer, "multiverse", 2, 3, 1)
    never = {**script, ((2, 0),): [5]}
    with pytest.raises(RuntimeError, match=r"multiverse: expected \d+ tokens, got done after"):
        reason_scripts.run_told(model, tokenizer, "multiverse", never)


def test_the_table_says_what_was_measured(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = report_reasoning.reasoning([measured])
    fan = measured["fans"][0]
    own, batch = (fan["ways"][name]["seconds"]["median"] for name in ("fork_attn", "stock_batch"))
    (line,) = [li for li in text.splitlines() if "one batch over copied caches" in li]
    assert f"| {batch / own:.2f} |" in line and "tokens differ" not in text
    changed = {**measured, "fans": [{**fan, "same_tokens": False}]}
    assert "tokens differ" in report_reasoning.reasoning([changed])
    assert report_reasoning.reasoning([]) == "Nothing is measured yet."
    # A new result makes the page stale.
    load = report.load
    monkeypatch.setattr(
        report, "load", lambda kind: [measured] if kind == "reasoning" else load(kind)
    )
    assert report.stale() == ["docs/benchmarks.md"]
