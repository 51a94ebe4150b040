"""The planner's costs: datasheet or measured, from which file, and what a bad one says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fork_attn as fa
from fork_attn import _C, cli, costs
from fork_attn.plan import Plan, build_plan

DATASHEET = {target: _C.target_costs(target) for target in costs.TARGETS}


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache directory of the user's, and the datasheet's costs, before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    costs.load.cache_clear()
    yield
    costs.load.cache_clear()
    for target in costs.TARGETS:
        _C.reset_target_costs(target)


def content(target: str = "cpu", **changes: Any) -> dict[str, Any]:
    numbers = {name: DATASHEET[target][name] for name in costs.FIELDS}
    return {
        "what": costs.WHAT,
        "version": costs.VERSION,
        "target": target,
        "machine": costs.machine_name("cpu"),
        "date": "2026-01-02T03:04:05+00:00",
        "costs": numbers | {"item_ns": 777.0, "launch_ns": 2500.0},
        **changes,
    }


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def cache_of(num_pages: int = 60_000) -> fa.ForkedKVCache:
    return fa.ForkedKVCache(
        num_layers=1, num_pages=num_pages, num_q_heads=32, num_kv_heads=8, head_dim=128,
        device="meta",
    )  # fmt: skip


def plan_tree(cache: fa.ForkedKVCache, readers: list[fa.Branch]) -> Plan:
    shape = cache._layer(0).plan_shape(torch.bfloat16)
    with cache.step(dict.fromkeys(readers, 1)) as step:
        plan = build_plan(cache._core, None, shape, 16, "sm_90", 132)
        step.rollback()
    return plan


def test_without_a_file_the_datasheet_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert costs.load() == {} and costs.describe("cpu") == "datasheet"
    assert costs.target_costs("sm_90") == DATASHEET["sm_90"]
    assert cli.main(["info"]) == 0
    assert "costs sm_90         datasheet" in capsys.readouterr().out


def test_a_named_file_is_used_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "mine.json", content("sm_90", machine="Some GPU"))
    monkeypatch.setenv("FORK_ATTN_COSTS", str(path))
    assert cli.main(["plan", "[1,8]x[2048,32]", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["costs"] == f"measured on Some GPU, 2026-01-02T03:04:05+00:00, {path}"
    table = _C.target_costs("sm_90")
    assert table["item_ns"] == 777.0 and table["workers"] == DATASHEET["sm_90"]["workers"]
    assert _C.target_costs("cpu") == DATASHEET["cpu"]
    assert report["predicted_us"] > 2.5
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"costs sm_90         measured on Some GPU, 2026-01-02T03:04:05+00:00, {path}" in out
    assert "costs cpu           datasheet" in out


def test_the_users_file_is_used_on_its_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORK_ATTN_COSTS")
    write(costs.default_path("cpu"), content())
    assert set(costs.load()) == {"cpu"}
    assert costs.target_costs("cpu")["item_ns"] == 777.0
    monkeypatch.setenv("FORK_ATTN_COSTS", "datasheet")
    costs.load.cache_clear()
    assert costs.load() == {}
    monkeypatch.delenv("FORK_ATTN_COSTS")
    write(costs.default_path("cpu"), content(machine="another"))
    costs.load.cache_clear()
    assert costs.load() == {}


def test_a_bad_file_that_was_not_named_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORK_ATTN_COSTS")
    write(costs.default_path("cpu"), "{")
    with pytest.warns(UserWarning, match=r"datasheet costs are used: .*costs-cpu\.json: expected"):
        assert costs.load() == {}
    write(costs.default_path("cpu"), content("sm_90"))
    costs.load.cache_clear()
    with pytest.warns(UserWarning, match="target: expected 'cpu', got 'sm_90'"):
        assert costs.load() == {}


def without(name: str) -> dict[str, float]:
    return {key: x for key, x in content()["costs"].items() if key != name}


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (None, "No such file"),
        ("{", "expected JSON"),
        ([], "what: expected 'fork-attn costs'"),
        (content(what="suite"), "what: expected 'fork-attn costs'"),
        (content(version=0), "version: expected 2, got 0"),
        (content() | {"target": "sm_75"}, "target: expected cpu, sm_80, sm_90, sm_100, got 'sm_75"),
        (content(machine=3), "machine: expected a string, got 3"),
        (content(date=None), "date: expected a string, got None"),
        (content(costs=[]), r"costs: expected an object, got \[\]"),
        (content(costs=without("item_ns")), r"costs\.item_ns: expected a number above 0, got None"),
        (content(costs=without("") | {"item_ns": 0}), r"costs\.item_ns: .* above 0, got 0"),
        (content(costs=without("") | {"item_ns": True}), r"costs\.item_ns: .* got True"),
        (
            content(costs=without("") | {"load_rows": -1}),
            r"costs\.load_rows: .* 0, got -1",
        ),
        (content(costs=without("") | {"ns_per_exp": "x"}), r"costs\.ns_per_exp: .* got 'x'"),
        (content(costs=without("") | {"tile": 1}), r"costs\.tile: no such cost"),
        (
            json.dumps(content()).replace("777.0", "Infinity"),
            r"costs\.item_ns: expected a number above 0, got inf",
        ),
    ],
)
def test_a_bad_file_that_was_named_is_refused_by_field(
    value: object, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.json"
    if value is not None:
        write(path, value)
    monkeypatch.setenv("FORK_ATTN_COSTS", str(path))
    for _ in range(2):  # and again: an error is not forgotten
        with pytest.raises(ValueError, match=rf"FORK_ATTN_COSTS: .*bad\.json: .*{complaint}"):
            cache_of()
    assert _C.target_costs("cpu") == DATASHEET["cpu"]
    report = cli.info()["costs"]
    assert all("bad.json" in why for why in report.values())


def test_changed_costs_make_other_plans_in_a_cache_that_remembers_choices() -> None:
    cache = cache_of()
    root = cache.new_branch()
    cache.step({root: 4096}).commit()
    readers = [child for kid in root.fork(8) for child in kid.fork(8)]
    cache.step(dict.fromkeys(readers, 200)).commit()
    before = plan_tree(cache, readers)
    changes = {"item_ns": 60_000.0, "partial_bytes_per_ns": 0.5}
    _C.set_target_costs("sm_90", changes)
    after = plan_tree(cache, readers)
    assert after.cost_ns > 1.2 * before.cost_ns
    assert after.num_items < before.num_items
    _C.reset_target_costs("sm_90")
    again = plan_tree(cache, readers)
    assert torch.equal(again.buffer, before.buffer) and again.cost_ns == before.cost_ns


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_each_rate_is_that_of_its_rows(rows: int) -> None:
    cache = cache_of()
    root = cache.new_branch()
    cache.step({root: 4096}).commit()
    readers = root.fork(rows // 4)
    _C.set_target_costs("sm_90", {"bytes_per_ns": 1e9, "partial_bytes_per_ns": 1e9})
    base = plan_tree(cache, readers).cost_ns
    for size in (16, 32, 64, 128):
        field = f"flops_per_ns_{size}"
        _C.set_target_costs("sm_90", {field: DATASHEET["sm_90"][field] / 2})
        assert (plan_tree(cache, readers).cost_ns > base) == (size == rows)
        _C.set_target_costs("sm_90", {field: DATASHEET["sm_90"][field]})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"item_ns": 0.0}, "item_ns: expected a number above 0"),
        ({"flops_per_ns_64": float("nan")}, "flops_per_ns: expected a number above 0"),
        ({"launch_ns": -1.0}, "launch_ns: expected a number of at least 0"),
        ({"workers": 3}, "costs: expected a cost that can be set, got 'workers'"),
    ],
)
def test_the_core_refuses_costs_that_are_none(changes: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        _C.set_target_costs("sm_90", changes)
    assert _C.target_costs("sm_90") == DATASHEET["sm_90"]
    with pytest.raises(ValueError, match="target: expected cpu"):
        _C.set_target_costs("sm_70", {})
