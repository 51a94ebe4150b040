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
from e2e_ways import Forked, Way  # noqa: E402

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
    return end_to_end.make_ways(e2e_models.load("tiny", CPU), PROMPT, 3)


def test_logits_agree(ways: dict[str, Way]) -> None:
    differences = end_to_end.compare_logits(ways, 40, 3)
    assert set(differences) == {"fork_attn", "stock_batch", "stock_copies"}
    assert max(differences.values()) < 1e-4


def test_a_wrong_way_is_not_measured(ways: dict[str, Way], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "FIRST_TOKEN", 9)
    own = ways["fork_attn"]
    monkeypatch.setattr(own, "step", lambda tokens: type(own).step(own, [t + 1 for t in tokens]))
    with pytest.raises(SystemExit, match="logits differ from stock's"):
        end_to_end.compare_logits(ways, 40, 2)


def test_replay(ways: dict[str, Way]) -> None:
    own = ways["fork_attn"]
    assert isinstance(own, Forked)
    lengths = []
    for way in ways.values():
        way.replay(SMALL)
        lengths.append(way.prefilled)
        if way is own:
            # The prompt, what it decoded, what it joined and what children returned.
            assert own.branches[0].length == 40 + 2 + (3 + 1) + 1 + 3
            assert own.cache.stats().pages_live * own.cache.page_size < 3 * 64
        way.end()
    assert lengths == [0, SMALL.joined_tokens, SMALL.joined_tokens]
    assert own.peak_bytes < ways["stock_batch"].peak_bytes
    assert len(own.cache.branches) <= 2  # the prompt's, and its stem


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
    cell = end_to_end.run_cell(ways, 40, 2, 1, 1, CPU)
    for way in cell["ways"].values():
        assert way["tokens_per_s"] > 0 and way["kv_bytes"] > 0 and way["fork"]["median"] > 0
