"""Ways of decoding with a model agree, and replays do what traces say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import e2e_models  # noqa: E402
import end_to_end  # noqa: E402
from e2e_traces import TRACES, Fork, Serial, Trace  # noqa: E402
from e2e_ways import Forked, Stock, Way, held_kv  # noqa: E402

CPU = torch.device("cpu")
PROMPT = list(range(5, 55))
SMALL = Trace(
    "small",
    "ours",
    40,
    (Serial(2), Fork((3, 1)), Serial(1), Fork((2, 4), joins=False, returns=3)),
)


@pytest.fixture(scope="module")
def ways() -> dict[str, Way]:
    pages = sum(end_to_end.pages_needed([(len(PROMPT), 3)], [SMALL], 2).values())
    made = end_to_end.make_ways(e2e_models.load("tiny", CPU), PROMPT, pages)
    end_to_end.narrow(made, 40)
    return made


def test_logits_agree(ways: dict[str, Way]) -> None:
    differences = end_to_end.compare_logits(ways, 3)
    assert set(differences) == {"fork_attn", "stock_batch", "stock_copies"}
    assert max(differences.values()) < 1e-4


def test_a_wrong_way_is_not_measured(ways: dict[str, Way], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "FIRST_TOKEN", 9)
    own = ways["fork_attn"]
    monkeypatch.setattr(own, "step", lambda tokens: type(own).step(own, [t + 1 for t in tokens]))
    with pytest.raises(SystemExit, match="logits differ from stock's"):
        end_to_end.compare_logits(ways, 2)


def test_replay(ways: dict[str, Way]) -> None:
    own = ways["fork_attn"]
    assert isinstance(own, Forked)
    lengths = []
    for way in ways.values():
        way.begin(1)
        way.replay(SMALL)
        lengths.append(way.prefilled)
        if way is own:
            # The prompt, what it decoded, what it joined and what children returned.
            assert own.branches[0].length == 40 + 2 + (3 + 1) + 1 + 3
            assert own.cache.stats().pages_live * own.cache.page_size < 3 * 64
        way.end()
    assert lengths == [0, SMALL.joined_tokens, SMALL.joined_tokens]
    assert own.peak_bytes < ways["stock_batch"].peak_bytes
    assert len(own.cache.branches) == 1  # the prompt's


def test_a_copy_of_a_cut_prompt_is_no_larger(ways: dict[str, Way]) -> None:
    """Views of a longer prompt would be copied with all of it."""
    for name in ("stock_batch", "stock_copies"):
        way = ways[name]
        assert isinstance(way, Stock)
        way.begin(3)
        storages = [kv.untyped_storage().nbytes() for kv in held_kv(way.caches)]
        assert sum(storages) == way.kv_bytes()
        one = sum(kv.numel() * 4 for kv in held_kv([way.prompt]))
        assert way.kv_bytes() == 3 * one
        way.end()


def test_a_way_that_runs_out_of_memory_is_named(
    ways: dict[str, Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tokens: list[int]) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(ways["stock_copies"], "step", fail)
    monkeypatch.setattr(ways["stock_copies"], "replay", fail)
    cell = end_to_end.run_cell(ways, 2, 1, 1, CPU)
    trace = end_to_end.run_trace(ways, SMALL, 1, CPU)
    for part in (cell, trace):
        assert part["absent"] == {"stock_copies": "out of memory"}
        assert set(part["ways"]) == {"fork_attn", "stock_batch"}


@pytest.mark.parametrize("size", ["cpu", "cuda", "quick"])
def test_pages_are_enough_and_fit_a_gpu(size: str) -> None:
    cells = end_to_end.CELLS[size]
    traces = [make().scaled(end_to_end.SCALE[size]) for make in TRACES.values()]
    pages = end_to_end.pages_needed(cells, traces, 6)
    for length, threads in cells:
        assert pages["prompt"] >= 2 * length / 16
        assert pages["added"] >= threads * (1 + (2 + 6 + 15) // 16)  # begun in mid-page
    for trace in traces:
        assert pages["added"] * 16 >= trace.tokens
    # Of K and V of Llama 3 8B (32 layers, 8 heads of 128) in bf16: an H100 has 80 GB.
    assert sum(pages.values()) * 16 * 2 * 32 * 8 * 128 * 2 < 16e9


def test_counts_of_traces() -> None:
    assert (SMALL.tokens, SMALL.critical_path, SMALL.joined_tokens) == (13, 10, 4)
    for make in TRACES.values():
        trace = make()
        assert trace.tokens / trace.critical_path > 1.0
        small = trace.scaled(1 / 80)
        assert len(small.phases) == len(trace.phases)
        assert 0.8 < small.tokens * 80 / trace.tokens < 1.25
    weaver, multiverse = TRACES["threadweaver"](), TRACES["multiverse"]()
    assert 7_700 <= weaver.tokens <= 27_300 and 6_400 <= weaver.critical_path <= 24_000
    assert 1.1 <= weaver.tokens / weaver.critical_path <= 1.3
    assert 1.1 <= multiverse.tokens / multiverse.critical_path <= 1.3


def test_a_cell_has_every_figure(ways: dict[str, Way]) -> None:
    cell = end_to_end.run_cell(ways, 2, 1, 1, CPU)
    for way in cell["ways"].values():
        assert way["tokens_per_s"] > 0 and way["kv_bytes"] > 0 and way["fork"]["median"] > 0
