"""Rivals that only a GPU runs, on stand-ins: none is lost where it could run, and each says why."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fake_rivals
import fake_xformers
import pytest
import torch
from test_bench_suite import EVERY_FOREST, FORESTS, setting

from fork_attn import ops, ops_flash
from fork_attn.bench import measure, way, way_flash, way_flashinfer, way_flex, way_ours, way_torch
from fork_attn.bench.forest import Node, Query, sorted_forest, uniform
from fork_attn.bench.inputs import TOLERANCE, Inputs, Setting
from fork_attn.bench.paging import pages_in
from fork_attn.bench.shapes import Heads
from fork_attn.bench.way import WAYS, Absent

CUDA = torch.device("cuda")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rival can be imported, and takes tensors on the CPU for those on a GPU."""
    modules = fake_xformers.modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake_rivals.flash_attn_interface)
    monkeypatch.setitem(sys.modules, "flashinfer", fake_rivals.flashinfer)  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "flash_attn", fake_rivals.flash_attn)  # type: ignore[misc]

    def found(name: str, inputs: Inputs) -> Any:
        return importlib.import_module(name)

    for users in ("way_flash", "way_flashinfer", "way_xformers"):
        monkeypatch.setattr(f"fork_attn.bench.{users}.cuda_module", found)
    monkeypatch.setattr(way_flashinfer, "WORKSPACE_BYTES", 16)
    monkeypatch.setattr(ops_flash, "installed", lambda: 3)
    monkeypatch.setattr(ops_flash, "require", lambda device: None)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


# As on an H100 with all peers; what torch brings needs a device that is not there.
EXPECTED = {
    "fork_attn_flash_attn",
    "flash_attn_3_paged",
    "flash_attn_3_levels",
    "flashinfer_decode",
    "flashinfer_decode_tc",
    "flashinfer_cascade",
    "flashinfer_cascade_fa2",
    "flashinfer_batch_attention",
    "xformers_splitk_paged",
}


@pytest.mark.usefixtures("peers")
def test_with_all_peers_there_none_is_lost() -> None:
    inputs = Inputs(FORESTS["shared"](), setting(torch.bfloat16))
    kinds = [kind for kind in WAYS.values() if kind.name != "flex_attention"]
    ready, _, absent = measure.build_ways(inputs, 2, kinds)
    assert set(ready) >= EXPECTED, absent
    assert [kind.name for kind in kinds if kind.name in ready] == list(ready), "WAYS' order"
    assert not [why for why in absent.values() if why.startswith(way.FAILED)]
    for one in ready.values():
        assert not one.note
        one.step(3, 2)
        one.close()


@pytest.mark.usefixtures("peers")
@EVERY_FOREST
def test_our_cache_by_flash_attn_is_right_or_says_why_not(name: str) -> None:
    inputs = Inputs(FORESTS[name](), setting(torch.bfloat16))
    ready, _, absent = measure.build_ways(inputs, 2, [way_ours.ForkedFlash])
    reasons = {"verify": "draft trees need a mask", "joined": "branch "}
    if name in reasons:
        assert absent["fork_attn_flash_attn"].startswith(reasons[name])
        return
    one = ready["fork_attn_flash_attn"]
    for _ in range(2):  # a step takes other slots than the one before
        one.step(3, 2)
        one.plan()
        assert inputs.error(one.output()) <= TOLERANCE[torch.bfloat16]
    one.close()


@pytest.mark.usefixtures("peers")
def test_our_cache_by_flash_attn_has_pages_for_its_copies() -> None:
    # Each child begins in mid-page and fills a page's slots: two pages, one of them a copy.
    nodes = [Node((), 1), *(Node((0,), 16) for _ in range(20))]
    inputs = Inputs(sorted_forest(nodes, [Query(20)]), setting(torch.bfloat16))
    ready, _, absent = measure.build_ways(inputs, 1, [way_ours.ForkedFlash])
    assert ready, absent


@pytest.mark.usefixtures("peers")
@EVERY_FOREST
@pytest.mark.parametrize("kind", ["xformers_splitk_paged", "xformers_tree_attention"])
def test_xformers_is_right_or_says_why_not(name: str, kind: str) -> None:
    inputs = Inputs(FORESTS[name](), setting(torch.bfloat16))
    ready, _, absent = measure.build_ways(inputs, 1, [WAYS[kind]])
    assert ready or not absent[kind].startswith(way.FAILED)
    drafts = name == "verify"
    takes = drafts if kind == "xformers_tree_attention" else not (drafts or name == "inner")
    assert bool(ready) == takes, absent
    for one in ready.values():
        assert one.held_bytes() % (64 * inputs.slot_bytes) == 0


@pytest.mark.usefixtures("peers")
def test_xformers_takes_few_new_tokens() -> None:
    for rows, takes in ((16, True), (17, False)):
        inputs = Inputs(uniform([1, 2], [20, 3], new=rows), setting(torch.bfloat16))
        ready, _, absent = measure.build_ways(inputs, 1, [WAYS["xformers_splitk_paged"]])
        assert bool(ready) == takes
        assert takes or "up to 16 new tokens" in absent["xformers_splitk_paged"]


def test_pages_for_rivals_are_ours_where_they_read_them() -> None:
    for size, multiple, expected in ((16, 64, 64), (64, 64, 64), (128, 64, 128), (16, 256, 256)):
        inputs = Inputs(FORESTS["one"](), setting(page_size=size))
        assert pages_in(inputs, multiple) == expected


def test_varlen_reads_pages_of_256(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_rivals.varlen_attn)
    inputs = Inputs(FORESTS["nested"](), setting())
    one = way_torch.Varlen(inputs)
    one.build(1)
    assert inputs.error(one.output()) <= TOLERANCE[torch.float32]
    assert one.held_bytes() % (256 * inputs.slot_bytes) == 0


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("kind", [way_flash.Flash3, way_flash.Flash3Merged])
def test_flash_attn_3_plans_once_a_step(
    kind: type[way_flash.Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[int] = []
    plan: Callable[..., Any] = fake_rivals.get_scheduler_metadata
    module = SimpleNamespace(
        flash_attn_with_kvcache=fake_rivals.flash_attn_with_kvcache,
        get_scheduler_metadata=lambda *args, **kwargs: plans.append(1) or plan(*args, **kwargs),
    )
    monkeypatch.setattr(kind, "module", module, raising=False)
    inputs = Inputs(FORESTS["shared"](), setting())
    one = kind(inputs)
    one.build(1)
    assert one.has_plan and not one.note
    plans.clear()
    one.step(36, 1)
    assert len(plans) == len(one.calls)
    assert inputs.error(one.output()) <= TOLERANCE[torch.float32]

    def refused(*args: object, **kwargs: object) -> None:
        raise TypeError("no\nsuch argument")

    module.get_scheduler_metadata = refused
    one = kind(inputs)
    one.build(1)
    assert one.note == "computes its schedule in every call: TypeError: no such argument"
    one.step(2, 1)
    assert inputs.error(one.output()) <= TOLERANCE[torch.float32]


@pytest.mark.usefixtures("peers")
def test_flashinfer_says_which_heads_it_has_no_kernels_for() -> None:
    forest = FORESTS["shared"]()

    def reason(kind: type[way_flashinfer.FlashInfer], heads: str) -> str:
        made = Setting(Heads.parse(heads), torch.bfloat16, 16, torch.device("cpu"))
        try:
            kind.available(Inputs(forest, made))
        except Absent as why:
            return str(why)
        return ""

    assert "16 query heads a KV head" in reason(way_flashinfer.DecodePlain, "16/1")
    assert not reason(way_flashinfer.DecodeTensorCores, "16/1")
    for heads in ("32/8", "64/8", "8/1", "32/32", "16/8", "9/3x64"):
        assert not reason(way_flashinfer.DecodePlain, heads)
        assert bool(reason(way_flashinfer.Holistic, heads)) == (heads == "32/32")
    assert "1206 MiB here, its workspace has 384" in reason(way_flashinfer.Holistic, "32/32")


def test_a_call_per_branch_is_measured_for_some_hundred_branches_on_a_gpu() -> None:
    for device, branches, takes in ((CUDA, 513, False), (torch.device("cpu"), 513, True)):
        forest = uniform([1, branches], [8, 1])
        inputs: Any = SimpleNamespace(forest=forest, device=device, slot_bytes=1)
        if takes:
            way_torch.SdpaPerBranch.available(inputs)
            continue
        with pytest.raises(Absent, match="513 calls a layer"):
            way_torch.SdpaPerBranch.available(inputs)


def test_flex_attention_plans_compiled_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile(what: Any, **options: Any) -> Any:
        compiled.append(what)
        return what

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(way_flex.Flex, "run", lambda self, layer: self.q)
    made = lambda *args, **kwargs: "a mask"  # noqa: E731
    monkeypatch.setattr("torch.nn.attention.flex_attention.create_block_mask", made)
    inputs = Inputs(FORESTS["shared"](), setting())
    way_flex.Flex(inputs).build(1)
    assert made not in compiled
    monkeypatch.setattr(Inputs, "device", property(lambda self: SimpleNamespace(type="cuda")))
    monkeypatch.setattr(way_flex, "need", lambda *args: None)
    monkeypatch.setattr(way_flex, "_visibility", lambda inputs: (None, None))
    way_flex.Flex(inputs).build(1)
    assert made in compiled


def test_what_the_allocator_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "mem_get_info": (100, 0),
        "memory_reserved": 70,
        "memory_allocated": 30,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert way.free_bytes(CUDA) == 140


def test_every_layout_asks_for_memory_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fork_attn.bench.way.free_bytes", lambda device: 1000)
    monkeypatch.setattr(way_flash.Flash3, "module", fake_rivals.flash_attn_interface, raising=False)
    one = way_flash.Flash3(Inputs(FORESTS["shared"](), setting()))
    with pytest.raises(Absent, match="1 layers of pages of 16 takes"):
        one.build(1)


def test_ours_is_built_first() -> None:
    built: list[str] = []

    def kind(name: str, ours: bool) -> Any:
        def build(self: Any, layers: int) -> None:
            built.append(name)
            raise Absent("enough")

        from test_bench_suite import _Wrong

        return type(name, (_Wrong,), {"name": name, "ours": ours, "build": build})

    kinds = [kind("a", False), kind("b", True), kind("c", False)]
    _, _, absent = measure.build_ways(Inputs(FORESTS["one"](), setting()), 1, kinds)
    assert built == ["b", "a", "c"] and list(absent) == ["a", "b", "c"]


def test_a_reason_has_all_lines_of_its_error() -> None:
    lines = "CUDA error: out of luck\n\n  Compile with\n" + "x" * 1000
    text = way.told(RuntimeError(lines))
    assert text.startswith("RuntimeError: CUDA error: out of luck Compile with xxx")
    assert len(text) == len("RuntimeError: ") + 400


def test_backends_are_all_there() -> None:
    assert {f"fork_attn_{name}" for name in ("cpu", "triton", "cuda", "flash_attn")} <= set(WAYS)
    assert "flash_attn" in ops.AVAILABLE
