"""The plan buffer as Python reads it."""

from __future__ import annotations

import random

import pytest
import torch

from fork_attn.plan_format import (
    DIAGONAL,
    GATHER,
    PER_SLOT,
    WINDOW,
    expand_plan,
    header,
    sections,
)
from fork_attn.testing.planbuf import ALL_TOKENS, BlockSpec, RunSpec, build_plan


def sees(block: BlockSpec, run: RunSpec, t: int, j: int, window: int) -> bool:
    """The rule of csrc/core/plan.h, word by word."""
    if not run.mask >> t & 1:
        return False
    if run.kind & DIAGONAL and not j < run.diag + t:
        return False
    if run.kind & WINDOW and not block.positions[t] - (run.first_position + j) < window:
        return False
    return not (run.kind & PER_SLOT and not run.words[j] >> t & 1)


@pytest.mark.parametrize("kind", range(8))
def test_expand_plan_follows_the_rule(kind: int) -> None:
    rng = random.Random(kind)
    page_size, window, num_slots = 3, 5, 11
    words = [rng.getrandbits(64) for _ in range(num_slots)] if kind & PER_SLOT else []
    options = {"first_position": 4, "kind": kind, "diag": 3, "words": words}
    run = RunSpec([7, 2, 5, 9, 0], num_slots, 2, mask=rng.getrandbits(64) | 1, **options)
    block = BlockSpec([6, 0, 3, 1], [9, 12, 4, 20], [[run]])
    plan = build_plan([block], num_tokens=8, group=2, page_size=page_size, window=window)
    expected = torch.zeros(8, 10 * page_size, dtype=torch.bool)
    for t, row in enumerate(block.rows):
        for j in range(num_slots):
            at = run.first_slot + j
            slot = run.pages[at // page_size] * page_size + at % page_size
            expected[row, slot] = sees(block, run, t, j, window)
    assert torch.equal(expand_plan(plan), expected)


def test_a_gather_run_lists_its_slots() -> None:
    words = [0b01, 0b11, 0b10, 0]
    run = RunSpec([7, 2, 30, 12], 4, kind=GATHER, words=words)
    plan = build_plan([BlockSpec([1, 0], [0, 0], [[run]])], num_tokens=2, group=1, page_size=4)
    assert header(plan).page_limit == 8 and sections(plan).gather.tolist() == [7, 2, 30, 12]
    mask = expand_plan(plan)
    assert mask[1].nonzero().flatten().tolist() == [2, 7]
    assert mask[0].nonzero().flatten().tolist() == [2, 30]


def test_rows_of_no_block_get_an_item_of_their_own() -> None:
    plan = build_plan(
        [BlockSpec([1], [0], [[RunSpec([0], 2)]])], num_tokens=3, group=1, page_size=4
    )
    s = sections(plan)
    assert s.items.tolist() == [[0, 0, 1, -1], [1, 1, 1, -1]]
    assert s.tokens.tolist() == [1, 0, 2]


def test_sections() -> None:
    runs = [RunSpec([4, 1], 5, 2, mask=0b10), RunSpec([3], 1, kind=PER_SLOT, words=[ALL_TOKENS])]
    blocks = [BlockSpec([2, 0], [5, 6], [runs, []]), BlockSpec([1], [7], [[]])]
    plan = build_plan(blocks, num_tokens=3, group=4, page_size=4)
    h, s = header(plan), sections(plan)
    assert (h.total_words, h.group, h.page_size, h.page_limit) == (len(plan), 4, 4, 5)
    assert (h.max_block_tokens, h.num_partial_rows) == (2, 4)
    assert s.blocks.tolist() == [[0, 2], [2, 1]]
    assert (s.tokens.tolist(), s.positions.tolist()) == ([2, 0, 1], [5, 6, 7])
    assert s.items.tolist() == [[0, 0, 2, 0], [0, 2, 2, 2], [1, 2, 2, -1]]
    assert s.run_masks.tolist() == [0b10, 0b11]
    assert (s.pages.tolist(), s.words.tolist()) == ([4, 1, 3], [-1])
    assert (s.merge_indptr.tolist(), s.merge_rows.tolist()) == ([0, 2, 2, 4], [1, 3, 0, 2])


def test_a_slot_seen_twice_is_an_error() -> None:
    block = BlockSpec([0], [0], [[RunSpec([1], 3), RunSpec([1], 2, 2)]])
    with pytest.raises(ValueError, match="sees already"):
        expand_plan(build_plan([block], num_tokens=1, group=1, page_size=4))


def test_header_refuses_what_is_no_plan() -> None:
    plan = build_plan([], num_tokens=1, group=1, page_size=4)
    assert expand_plan(plan).shape == (1, 0)
    with pytest.raises(TypeError, match="int64"):
        header(plan.int())
    with pytest.raises(ValueError, match="words"):
        header(plan[:-1])
    with pytest.raises(ValueError, match="contiguous"):
        header(plan[:3])
    with pytest.raises(ValueError, match="magic"):
        header(plan + 1)
