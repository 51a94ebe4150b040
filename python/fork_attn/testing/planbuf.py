"""Builds plan buffers from Python lists, for tests of kernels that need no cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fork_attn.plan_format import (
    FULL,
    GATHER,
    HEADER_WORDS,
    MAX_BLOCK_TOKENS,
    PER_SLOT,
    PLAN_MAGIC,
    PLAN_VERSION,
    PlanHeader,
)

ALL_TOKENS = 2**64 - 1


@dataclass(frozen=True)
class RunSpec:
    """One run; `pages` are physical, the first one holds slot 0 at offset `first_slot`.

    Slot j of a GATHER run is `pages[j]`, a slot and not a page.
    """

    pages: Sequence[int]
    num_slots: int
    first_slot: int = 0
    first_position: int = 0
    mask: int = ALL_TOKENS  # bits beyond the block's tokens are cleared
    kind: int = FULL
    diag: int = 0
    words: Sequence[int] = ()  # unsigned, one for each slot of a PER_SLOT or GATHER run


@dataclass(frozen=True)
class BlockSpec:
    """Query rows that items serve together; `items` are lists of runs.

    `q_rows` are the rows of the query tensor that the rows read: their own, or num_tokens + i for
    the copy that rotation i makes. With it a row may stand in a block more than once.
    """

    rows: Sequence[int]
    positions: Sequence[int]
    items: Sequence[Sequence[RunSpec]]
    q_rows: Sequence[int] | None = None  # of the query tensor, where these are not `rows`


@dataclass
class _Lists:
    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    q_rows: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    items: list[list[int]] = field(default_factory=list)
    runs: list[tuple[int, list[int]]] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    gather: list[int] = field(default_factory=list)


def build_plan(
    blocks: Sequence[BlockSpec],
    *,
    num_tokens: int,
    group: int,
    page_size: int,
    window: int = 0,
    partials: bool = False,
    rotations: Sequence[tuple[int, int]] = (),
    span_items: int = 1,
) -> torch.Tensor:
    """Lays a plan out as csrc/core/plan.h describes.

    Args:
        blocks: row blocks; a query row may stand in several, its results are merged in this order.
        num_tokens: query rows of the step; rows in no block see nothing, in an item of their own.
        group: query heads per KV head.
        page_size: slots in a page.
        window: sliding window in positions, for runs of kind WINDOW.
        partials: items write partial rows even where a row has only one item.
        rotations: (row, shift) of the rotated copies of query rows, from `num_tokens` on.
        span_items: items of a span.

    Returns:
        (words,) int64.

    Raises:
        ValueError: a block or run contradicts itself.
    """
    lists = _Lists()
    missing = sorted(set(range(num_tokens)).difference(*(block.rows for block in blocks)))
    for begin in range(0, len(missing), MAX_BLOCK_TOKENS):
        rows = missing[begin : begin + MAX_BLOCK_TOKENS]
        blocks = [*blocks, BlockSpec(rows, [0] * len(rows), [[]])]
    for index, block in enumerate(blocks):
        _check_block(block, num_tokens, page_size, rotations)
        lists.blocks += [len(lists.tokens), len(block.rows)]
        lists.tokens += block.rows
        lists.q_rows += block.rows if block.q_rows is None else block.q_rows
        lists.positions += block.positions
        for runs in block.items:
            begin = len(lists.runs)
            for run in runs:
                _add_run(lists, run, len(block.rows))
            lists.items.append([index, begin, len(lists.runs), -1])
    merge_lists, num_partial_rows = _assign_partials(lists, num_tokens, partials)
    merged = [sum(len(merge_lists[row]) for row in block.rows) for block in blocks]
    sizes = {
        "num_tokens": num_tokens,
        "num_partial_rows": num_partial_rows,
        "group": group,
        "page_size": page_size,
        "window": window,
        "page_limit": 1 + max([*lists.pages, *(s // page_size for s in lists.gather)], default=-1),
        "max_block_tokens": max(lists.blocks[1::2], default=0),
        "max_merge_rows": max(merged, default=0),
    }
    return _serialise(lists, merge_lists, sizes, rotations, span_items)


def _check_block(
    block: BlockSpec, num_tokens: int, page_size: int, rotations: Sequence[tuple[int, int]]
) -> None:
    if not 1 <= len(block.rows) <= MAX_BLOCK_TOKENS or len(block.rows) != len(block.positions):
        expected = f"1..{MAX_BLOCK_TOKENS} rows with a position each"
        got = f"{len(block.rows)} rows and {len(block.positions)} positions"
        raise ValueError(f"block: expected {expected}, got {got}")
    distinct = block.q_rows is not None or len(set(block.rows)) == len(block.rows)
    if not distinct or not all(0 <= r < num_tokens for r in block.rows):
        raise ValueError(f"block: expected distinct rows below {num_tokens}: {list(block.rows)}")
    outputs = [*range(num_tokens), *(row for row, _ in rotations)]
    if block.q_rows is not None and [outputs[q] for q in block.q_rows] != list(block.rows):
        raise ValueError(f"block: expected query rows of its rows, got {list(block.q_rows)}")
    for run in (run for runs in block.items for run in runs):
        slots = len(run.pages) * (1 if run.kind & GATHER else page_size)
        fits = run.first_slot + run.num_slots <= slots
        if run.num_slots < 1 or not 0 <= run.first_slot < page_size or not fits:
            raise ValueError(f"run: slots do not fit its pages of {page_size}: {run}")
        if run.kind & (PER_SLOT | GATHER) and len(run.words) != run.num_slots:
            raise ValueError(f"run: expected {run.num_slots} words, got {len(run.words)}")


def _add_run(lists: _Lists, run: RunSpec, num_tokens: int) -> None:
    pages = lists.gather if run.kind & GATHER else lists.pages
    where = [len(pages), run.first_slot, run.num_slots, run.first_position]
    rest = [*where, run.kind, run.diag, len(lists.words), 0]
    lists.runs.append((run.mask & ((1 << num_tokens) - 1), rest))
    pages += run.pages
    lists.words += run.words


def _assign_partials(lists: _Lists, num_tokens: int, always: bool) -> tuple[list[list[int]], int]:
    """Partial rows of every query row, in merge order, and how many there are."""

    def rows_of(item: list[int]) -> list[int]:
        begin, count = lists.blocks[2 * item[0] : 2 * item[0] + 2]
        return lists.tokens[begin : begin + count]

    uses = [0] * num_tokens
    for item in lists.items:
        for row in rows_of(item):
            uses[row] += 1
    merge_lists: list[list[int]] = [[] for _ in range(num_tokens)]
    total = 0
    for item in lists.items:
        rows = rows_of(item)
        if not always and all(uses[row] == 1 for row in rows):
            continue
        item[3] = total
        for t, row in enumerate(rows):
            merge_lists[row].append(total + t)
        total += len(rows)
    return merge_lists, total


def _words(ints: Sequence[int]) -> torch.Tensor:
    """int32 values, two to a word."""
    padded = torch.tensor([*ints, *[0] * (len(ints) % 2)], dtype=torch.int32)
    return padded.view(torch.int64) if len(padded) else torch.empty(0, dtype=torch.int64)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _serialise(
    lists: _Lists,
    merge_lists: list[list[int]],
    sizes: dict[str, int],
    rotations: Sequence[tuple[int, int]],
    span_items: int,
) -> torch.Tensor:
    indptr = [0]
    for rows in merge_lists:
        indptr.append(indptr[-1] + len(rows))
    empty = torch.empty(0, dtype=torch.int64)
    spans = [*range(0, len(lists.items), span_items), len(lists.items)]
    runs = [torch.cat([torch.tensor([_signed(mask)]), _words(rest)]) for mask, rest in lists.runs]
    parts = {
        "blocks": _words(lists.blocks),
        "tokens": _words(lists.tokens),
        "q_rows": _words(lists.q_rows),
        "positions": _words(lists.positions),
        "items": _words([value for item in lists.items for value in item]),
        "runs": torch.cat([empty, *runs]),
        "pages": _words(lists.pages),
        "words": torch.tensor([_signed(word) for word in lists.words], dtype=torch.int64),
        "gather": _words(lists.gather),
        "rotations": _words([value for rotation in rotations for value in rotation]),
        "spans": _words(spans),
        "merge_indptr": _words(indptr),
        "merge_rows": _words([row for rows in merge_lists for row in rows]),
    }
    offsets = {}
    if lists.q_rows == lists.tokens:
        del parts["q_rows"]
    end = HEADER_WORDS
    for name, part in parts.items():
        offsets[f"off_{name}"] = end
        end += len(part)
    head = PlanHeader(
        magic=PLAN_MAGIC,
        version=PLAN_VERSION,
        total_words=end,
        num_blocks=len(lists.blocks) // 2,
        num_block_tokens=len(lists.tokens),
        num_items=len(lists.items),
        num_runs=len(lists.runs),
        num_pages=len(lists.pages),
        num_words=len(lists.words),
        num_merge_rows=indptr[-1],
        num_spans=len(spans) - 1,
        num_rotations=len(rotations),
        num_gather=len(lists.gather),
        **({} if "q_rows" in parts else {"off_q_rows": offsets["off_tokens"]}),
        tile_slots=0,
        **sizes,
        **offsets,
    )
    reserved = [0] * (2 * HEADER_WORDS - len(head))
    return torch.cat([_words([*head, *reserved]), *parts.values()])
