"""The benchmark suite: shapes, layouts and every implementation, on tiny trees against float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fake_rivals
import pytest
import torch

from fork_attn.bench import measure, results, way_flash, way_flashinfer, way_ours, way_torch
from fork_attn.bench.forest import Forest, Node, Query, sorted_forest, uniform
from fork_attn.bench.inputs import TOLERANCE, Inputs, Setting
from fork_attn.bench.paging import Pool, dense_tables
from fork_attn.bench.shapes import SHAPES, Heads, draft_tree, joined, ragged
from fork_attn.bench.way import WAYS, Absent, Way

CPU = torch.device("cpu")
FORESTS: dict[str, Callable[[], Forest]] = {
    "shared": lambda: uniform([1, 5], [40, 7]),
    "nested": lambda: uniform([1, 2, 6], [33, 16, 5]),
    "apart": lambda: uniform([3], [20]),
    "one": lambda: uniform([1], [1]),
    "extend": lambda: uniform([1, 4], [35, 6], new=5),
    "verify": lambda: uniform([3], [21], draft=draft_tree(12, 1)),
    "joined": lambda: joined(3, 17),
    "ragged": lambda: ragged(9, 12, 50, 41),
    "inner": lambda: sorted_forest(
        [Node((), 20), Node((0,), 9), Node((0,), 4)], [Query(2), Query(1, 3), Query(0), Query(1)]
    ),
}
EVERY_FOREST = pytest.mark.parametrize("name", FORESTS)


def setting(dtype: torch.dtype = torch.float32, page_size: int = 16) -> Setting:
    return Setting(Heads(4, 2, 32), dtype, page_size, CPU)


@EVERY_FOREST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ways_that_run_on_a_cpu_are_right(name: str, dtype: torch.dtype) -> None:
    inputs = Inputs(FORESTS[name](), setting(dtype))
    # Compiling takes seconds: FlexAttention has a test of its own.
    kinds = [kind for kind in WAYS.values() if kind.name != "flex_attention"]
    ready, _, absent = measure.build_ways(inputs, 2, kinds)
    expected = {"fork_attn_cpu", "sdpa_per_branch", "sdpa_batched", "grouped_matmul"}
    expected -= {"sdpa_batched"} if name == "inner" else set()
    assert expected <= set(ready)
    assert set(ready) | set(absent) == {kind.name for kind in kinds}
    assert all(absent.values()), "a reason for each"
    for way in ready.values():
        assert inputs.error(way.run(1).reshape(inputs.q.shape)) <= TOLERANCE[dtype], way.name
        assert way.held_bytes() >= inputs.unique_bytes
        way.step(3, 2)
        way.close()


FP8 = torch.float8_e4m3fn


@EVERY_FOREST
def test_e4m3_is_held_against_the_values_that_it_has(name: str) -> None:
    inputs = Inputs(FORESTS[name](), setting(FP8))
    assert inputs.q.dtype == torch.bfloat16 and inputs.slot_bytes == 2 * 2 * 32
    assert all(torch.equal(x, x.to(FP8).to(x.dtype)) for x in (inputs.k, inputs.v))
    kinds = [kind for kind in WAYS.values() if kind.name != "flex_attention"]
    ready, errors, absent = measure.build_ways(inputs, 2, kinds)
    assert set(ready) == {"fork_attn_cpu", results.HALF_KV}
    assert absent["sdpa_per_branch"] == "takes K and V in fp32 or bf16 or fp16, not in fp8"
    assert absent["flashinfer_decode"] == "flashinfer needs a CUDA device"
    own, half = ready["fork_attn_cpu"], ready[results.HALF_KV]
    assert isinstance(own, way_ours.Forked) and isinstance(half, way_ours.Forked)
    assert (own.cache.dtype, half.cache.dtype) == (FP8, torch.bfloat16)
    assert own.held_bytes() * 2 == half.held_bytes() >= 2 * inputs.unique_bytes
    for way in ready.values():
        way.step(3, 2)
        way.close()
    # Both are right to bf16's rounding: what e4m3 rounds away is in the exact result too.
    assert max(errors.values()) < 1e-2
    assert errors["fork_attn_cpu"] == pytest.approx(errors[results.HALF_KV], abs=4e-3)


def test_what_e4m3_rounds_away_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(FORESTS["one"](), setting(FP8))
    inputs.v *= 1.06  # no e4m3 values any more: the cache rounds them, the exact result does not
    with pytest.raises(RuntimeError, match="fork_attn_cpu is wrong by"):
        measure.build_ways(inputs, 1, [WAYS["fork_attn_cpu"]])


def test_rivals_with_e4m3_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = way_flashinfer.DecodePlain
    monkeypatch.setattr(kind, "module", fake_rivals.flashinfer, raising=False)
    monkeypatch.setattr(way_flashinfer, "WORKSPACE_BYTES", 16)
    way = kind(Inputs(FORESTS["shared"](), setting(FP8)))
    way.build(1)
    assert way.types() == {"q_data_type": torch.bfloat16, "kv_data_type": FP8}
    assert {x.dtype for x in way.kv[0]} == {FP8}


def test_only_cases_of_e4m3_have_bf16_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COLD_BYTES", 1)
    shape = SHAPES["S6"]
    small = type(shape)("S0", "tiny", FORESTS["shared"], "full")
    limits: Any = SimpleNamespace(stream={"read": 1e9}, rate=lambda *_: 1e9)
    for dtype, expected in ((torch.bfloat16, False), (FP8, True)):
        row = measure.run_case(measure.Case(small, setting(dtype)), limits, 0.01)
        named = set(row["ways"]) | set(row["absent"])
        assert (results.HALF_KV in named) == expected
        assert (results.over_half_kv(row) is not None) == expected
        assert results.best_rival(row) != results.HALF_KV
    assert " fp8 " in row["id"]


@pytest.mark.parametrize("name", ["nested", "verify"])
def test_flex_attention_is_right(name: str) -> None:
    inputs = Inputs(FORESTS[name](), setting())
    ready, _, absent = measure.build_ways(inputs, 1, [WAYS["flex_attention"]])
    assert ready or "flex_attention" in absent  # where no compiler is at hand, a reason


PAGED: list[tuple[type[Way], Any]] = [
    (way_flash.Flash2, fake_rivals.flash_attn),
    (way_flash.Flash3, fake_rivals.flash_attn_interface),
    (way_flash.Flash3Merged, fake_rivals.flash_attn_interface),
    (way_flashinfer.DecodePlain, fake_rivals.flashinfer),
    (way_flashinfer.CascadeShipped, fake_rivals.flashinfer),
    (way_flashinfer.CascadeFa2, fake_rivals.flashinfer),
    (way_flashinfer.Holistic, fake_rivals.flashinfer),
    (way_torch.Varlen, None),
]


@pytest.mark.parametrize(("kind", "module"), PAGED, ids=[kind.name for kind, _ in PAGED])
@EVERY_FOREST
def test_paged_rivals_are_told_the_tree(
    kind: type[Way], module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forest = FORESTS[name]()
    if any(q.draft is not None for q in forest.queries):
        pytest.skip("they take no mask")
    rows = {q.rows for q in forest.queries}
    if kind is way_flashinfer.DecodePlain and rows != {1}:
        pytest.skip("decodes one token")
    if kind in (way_flash.Flash2, way_flash.Flash3) and len(rows) > 1:
        pytest.skip("takes equal numbers of rows")
    monkeypatch.setattr(kind, "module", module, raising=False)
    monkeypatch.setattr(way_flashinfer, "WORKSPACE_BYTES", 16)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_rivals.varlen_attn)
    inputs = Inputs(forest, setting())
    way = kind(inputs)
    try:
        way.build(1)
    except Absent as reason:
        levels = kind is way_flash.Flash3Merged or issubclass(kind, way_flashinfer.Cascade)
        assert levels and str(reason)
        return
    way.plan()
    assert inputs.error(way.output()) <= TOLERANCE[torch.float32]
    if isinstance(way, way_flashinfer.CascadeFa2):
        assert {w._backend for w in way.wrapper._batch_prefill_wrappers} == {"fa2"}


def test_tables_share_physical_pages() -> None:
    inputs = Inputs(uniform([1, 4], [64, 8]), setting())
    pool = Pool(inputs)
    tables = dense_tables(inputs, pool)
    assert pool.num_pages == 4 + 4
    assert {tuple(t.pages[:4]) for t in tables} == {(0, 1, 2, 3)}
    assert [t.length for t in tables] == [73] * 4
    # 40 tokens end in mid-page: each branch copies that page's beginning, as copy-on-write does.
    pool = Pool(Inputs(uniform([1, 4], [40, 8]), setting()))
    dense_tables(pool.inputs, pool)
    assert pool.num_pages == 3 + 4 * 2


def test_pages_lie_shuffled_and_hold_their_slots() -> None:
    inputs = Inputs(uniform([1, 4], [64, 8]), setting())
    pool = Pool(inputs)
    tables = dense_tables(inputs, pool)
    k, _ = pool.tensors()
    assert pool.order.tolist() != sorted(pool.order.tolist())
    for query, table in enumerate(tables):
        held = k[pool.physical(table.pages).long()].flatten(0, 1)[: table.length]
        slots = torch.cat([inputs.context_slots(query), inputs.own_slots(query)])
        assert torch.equal(held, inputs.k[slots])


# --- forests and shapes


def test_counts_of_a_joined_forest() -> None:
    forest = joined(3, 10)
    assert forest.paths[-1] == (0, 1, 2, 3, 4, 7)
    assert forest.contexts == (60, 60, 60)
    assert forest.unique_slots == 80 + 3 and forest.copied_slots == 183
    # The chain up to the second fork is one piece.
    assert [(p.nodes, p.queries) for p in forest.pieces] == [
        ((0, 1, 2, 3, 4), 3),
        ((5,), 1),
        ((6,), 1),
        ((7,), 1),
    ]


def test_visible_pairs_are_those_of_the_masks() -> None:
    for make in FORESTS.values():
        inputs = Inputs(make(), setting())
        pairs = 0
        for query, context in enumerate(inputs.forest.contexts):
            mask = inputs.own_mask(query)
            pairs += len(mask) * context + int(mask.sum())
        assert inputs.forest.visible_pairs == pairs


def test_the_exact_result_is_that_of_a_mask_over_all_slots() -> None:
    from fork_attn.reference import attention

    inputs = Inputs(FORESTS["inner"](), setting())
    mask = torch.zeros(len(inputs.q), len(inputs.k), dtype=torch.bool)
    for query in range(len(inputs.forest.queries)):
        rows = inputs.rows(query)
        mask[rows, inputs.context_slots(query)] = True
        own = inputs.own_slots(query)
        mask[rows, int(own[0]) : int(own[-1]) + 1] = inputs.own_mask(query)
    expected, _ = attention(inputs.q, inputs.k, inputs.v, mask)
    assert inputs.error(expected) < 1e-12
    assert not inputs.error(expected[:-1]) <= 1  # of another shape
    assert not inputs.error(torch.full_like(expected, torch.nan)) <= 1


def test_every_shape_builds_and_every_family_is_there() -> None:
    assert {shape.family for shape in SHAPES.values()} == set("SNUTEJR")
    for shape in SHAPES.values():
        forest = shape.make()
        assert forest.unique_slots > 0 and len(forest.contexts) == len(forest.queries), shape.id
    same = [ragged(3, 20) == ragged(3, 20), ragged(3, 20) == ragged(4, 20)]
    assert same == [True, False]


def test_cases_name_what_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"shapes: expected of .* got 'S99'"):
        measure.cases(CPU, shapes=["S99"])
    with pytest.raises(ValueError, match="heads: expected like"):
        Heads.parse("32")
    with pytest.raises(ValueError, match="multiple"):
        Heads.parse("9/2")
    quick, full = measure.cases(CPU, quick=True), measure.cases(CPU)
    assert 0 < len(quick) < len(full)
    assert {c.shape.family for c in quick} == set("SNUTJR")
    few = [c for c in full if c.setting.dtype == FP8]
    assert few and all(c.shape.cpu == "quick" for c in few)


# --- running


class _Wrong(Way):
    name = "wrong"

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        pass

    def build(self, layers: int) -> None:
        pass

    def run(self, layer: int) -> torch.Tensor:
        return torch.zeros_like(self.inputs.q)

    def held_bytes(self) -> int:
        return 0


class _Broken(_Wrong):
    name = "broken"

    def build(self, layers: int) -> None:
        raise OSError("no such library")


def test_wrong_and_broken_rivals_are_absent_with_a_reason() -> None:
    inputs = Inputs(FORESTS["shared"](), setting())
    ready, _, absent = measure.build_ways(inputs, 1, [_Wrong, _Broken])
    assert not ready
    assert absent["wrong"].startswith("wrong by 1.0")
    assert absent["broken"] == "failed: OSError: no such library"


def test_nothing_is_measured_where_we_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Wrong, "ours", True)
    with pytest.raises(RuntimeError, match=r"wrong by 1\.0"):
        measure.build_ways(Inputs(FORESTS["shared"](), setting()), 1, [_Wrong])


def test_a_case_has_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COLD_BYTES", 1 << 16)
    shape = SHAPES["S6"]
    small = type(shape)("S0", "tiny", FORESTS["shared"], "full")
    limits: Any = SimpleNamespace(stream={"read": 1e9}, rate=lambda *_: 1e9)
    row = measure.run_case(measure.Case(small, setting()), limits, 0.01)
    way = row["ways"]["fork_attn_cpu"]
    assert {"cold", "warm", "plan", "step", "held_bytes", "error"} <= set(way)
    assert way["cold"]["p20"] <= way["cold"]["median"] <= way["cold"]["p95"]
    assert row["limit_seconds"] == max(row["moved_bytes"], row["flops"]) / 1e9
    assert row["absent"]["flex_attention"].startswith("compiled for")
    assert results.over_best_rival(row) is not None and results.of_limit(row) is not None
    rows = list(results.flat({"cases": [row]}))
    assert len(rows) == len(row["ways"]) + len(row["absent"])
