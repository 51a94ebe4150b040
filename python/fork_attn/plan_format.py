"""The plan buffer read from Python: its header, its sections, the dense mask that it stands for.

The format is that of csrc/core/plan.h, whose constants and records are mirrored here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

PLAN_MAGIC = 0x4641504C
PLAN_VERSION = 2
MAX_BLOCK_TOKENS = 64
HEADER_WORDS = 24

# Bits of a run's kind.
FULL = 0
DIAGONAL = 1
WINDOW = 2
PER_SLOT = 4
GATHER = 8


class PlanHeader(NamedTuple):
    """The fixed first words of a plan buffer, field by field as in plan.h."""

    magic: int
    version: int
    total_words: int
    num_tokens: int
    num_blocks: int
    num_block_tokens: int
    num_items: int
    num_runs: int
    num_pages: int
    num_words: int
    num_partial_rows: int
    num_merge_rows: int
    group: int
    page_size: int
    window: int
    page_limit: int
    max_block_tokens: int
    off_blocks: int
    off_tokens: int
    off_positions: int
    off_items: int
    off_runs: int
    off_pages: int
    off_words: int
    off_merge_indptr: int
    off_merge_rows: int
    num_spans: int
    off_spans: int
    off_q_rows: int
    num_rotations: int
    off_rotations: int
    num_gather: int
    off_gather: int
    tile_slots: int
    max_merge_rows: int


class PlanSections(NamedTuple):
    """The sections of a plan buffer, as views of it (`runs` and `run_masks` share memory)."""

    blocks: torch.Tensor  # (num_blocks, 2) int32: token_begin, num_tokens
    tokens: torch.Tensor  # (num_block_tokens,) int32: rows of the step
    q_rows: torch.Tensor  # (num_block_tokens,) int32: rows of the query tensor
    rotations: torch.Tensor  # (num_rotations, 2) int32: row, shift
    positions: torch.Tensor  # (num_block_tokens,) int32
    items: torch.Tensor  # (num_items, 4) int32: block, run_begin, run_end, partial_begin
    runs: torch.Tensor  # (num_runs, 10) int32; columns from 2 on are the fields after the mask
    run_masks: torch.Tensor  # (num_runs,) int64
    pages: torch.Tensor  # (num_pages,) int32: pages, and slots of SLOT_LIST runs
    words: torch.Tensor  # (num_words,) int64
    gather: torch.Tensor  # (num_gather,) int32: slots of GATHER runs
    spans: torch.Tensor  # (num_spans + 1,) int32: first item of each span, and the end
    merge_indptr: torch.Tensor  # (num_tokens + 1,) int32
    merge_rows: torch.Tensor  # (num_merge_rows,) int32


class Run(NamedTuple):
    """One run: slots of consecutive positions, and which tokens of the block see them."""

    mask: int  # unsigned, bit t: token t of the block
    page_begin: int
    first_slot: int
    num_slots: int
    first_position: int
    kind: int
    diag: int
    words_begin: int
    chunk: int


def header(buffer: torch.Tensor) -> PlanHeader:
    """Reads the header of a plan buffer.

    Args:
        buffer: (words,) int64, contiguous.

    Raises:
        TypeError: `buffer` is not int64.
        ValueError: not a plan, of another version, or cut short.
    """
    if buffer.dtype != torch.int64:
        raise TypeError(f"plan buffer: expected dtype int64, got {buffer.dtype}")
    if buffer.ndim != 1 or len(buffer) < HEADER_WORDS or not buffer.is_contiguous():
        got = f"shape {tuple(buffer.shape)}, strides {buffer.stride()}"
        expected = f"at least {HEADER_WORDS} contiguous words"
        raise ValueError(f"plan buffer: expected {expected}, got {got}")
    fields = buffer[:HEADER_WORDS].view(torch.int32).tolist()
    result = PlanHeader(*fields[: len(PlanHeader._fields)])
    if result.magic != PLAN_MAGIC or result.version != PLAN_VERSION:
        expected = f"magic {PLAN_MAGIC:#x}, version {PLAN_VERSION}"
        got = f"magic {result.magic:#x}, version {result.version}"
        raise ValueError(f"plan buffer: expected {expected}, got {got}")
    if len(buffer) < result.total_words:
        raise ValueError(f"plan buffer: expected {result.total_words} words, got {len(buffer)}")
    return result


def sections(buffer: torch.Tensor) -> PlanSections:
    """Views of all sections of a plan buffer. Raises as `header` does."""
    h = header(buffer)

    def ints(offset: int, count: int) -> torch.Tensor:
        return buffer[offset : offset + (count + 1) // 2].view(torch.int32)[:count]

    runs = buffer[h.off_runs : h.off_runs + 5 * h.num_runs].view(h.num_runs, 5)
    return PlanSections(
        blocks=ints(h.off_blocks, 2 * h.num_blocks).view(h.num_blocks, 2),
        tokens=ints(h.off_tokens, h.num_block_tokens),
        q_rows=ints(h.off_q_rows, h.num_block_tokens),
        rotations=ints(h.off_rotations, 2 * h.num_rotations).view(h.num_rotations, 2),
        positions=ints(h.off_positions, h.num_block_tokens),
        items=ints(h.off_items, 4 * h.num_items).view(h.num_items, 4),
        runs=runs.view(torch.int32),
        run_masks=runs[:, 0],
        pages=ints(h.off_pages, h.num_pages),
        words=buffer[h.off_words : h.off_words + h.num_words],
        gather=ints(h.off_gather, h.num_gather),
        spans=ints(h.off_spans, h.num_spans + 1),
        merge_indptr=ints(h.off_merge_indptr, h.num_tokens + 1),
        merge_rows=ints(h.off_merge_rows, h.num_merge_rows),
    )


def run_at(plan: PlanSections, index: int) -> Run:
    """Run `index` of the plan."""
    mask = int(plan.run_masks[index]) & (2**64 - 1)
    return Run(mask, *plan.runs[index, 2:].tolist())


def bits(words: torch.Tensor, count: int) -> torch.Tensor:
    """Bits 0..count-1 of int64 words as bools: (n,) -> (n, count)."""
    return (words[:, None] >> torch.arange(count, device=words.device)) & 1 != 0


def run_visibility(
    plan: PlanSections, run: Run, positions: torch.Tensor, window: int
) -> torch.Tensor:
    """Which tokens of a block see which slots of a run.

    Args:
        positions: (num_tokens,), of the block's tokens.

    Returns:
        (num_tokens, num_slots) bool.
    """
    num_tokens = len(positions)
    slots = torch.arange(run.num_slots)
    tokens = torch.arange(num_tokens)
    mask = torch.tensor([bool(run.mask >> t & 1) for t in range(num_tokens)])
    seen = mask[:, None].expand(num_tokens, run.num_slots).clone()
    if run.kind & DIAGONAL:
        seen &= slots < run.diag + tokens[:, None]
    if run.kind & WINDOW:
        seen &= positions[:, None].long() - (run.first_position + slots) < window
    if run.kind & (PER_SLOT | GATHER):
        seen &= bits(plan.words[run.words_begin : run.words_begin + run.num_slots], num_tokens).T
    return seen


def run_slots(plan: PlanSections, run: Run, page_size: int) -> torch.Tensor:
    """(num_slots,) int64: the slots of a run, counted as `page * page_size + offset`."""
    if run.kind & GATHER:
        return plan.gather[run.page_begin : run.page_begin + run.num_slots].long()
    at = torch.arange(run.first_slot, run.first_slot + run.num_slots)
    return plan.pages[run.page_begin + at // page_size].long() * page_size + at % page_size


def output_rows(buffer: torch.Tensor) -> torch.Tensor:
    """(num_tokens + num_rotations,) int64: the output row of each row of the query tensor."""
    h = header(buffer)
    return torch.cat([torch.arange(h.num_tokens), sections(buffer).rotations[:, 0].long()])


def expand_queries(buffer: torch.Tensor, pages: torch.Tensor | None = None) -> torch.Tensor:
    """Which row of the query tensor, rotated copies included, sees which slot.

    Args:
        buffer: (words,) int64 on the CPU.
        pages: (n,) int32, the page lists that runs index; None: the plan's own.

    Returns:
        (num_tokens + num_rotations, page_limit * page_size) bool; slots count as
            `page * page_size + offset`.

    Raises:
        ValueError: not a plan, or an output row would see the same slot twice.
        TypeError: `buffer` is not int64.
    """
    h = header(buffer)
    plan = sections(buffer)
    if pages is not None:
        plan = plan._replace(pages=pages)
    num_slots = h.page_limit * h.page_size
    mask = torch.zeros(h.num_tokens + h.num_rotations, num_slots, dtype=torch.bool)
    outputs = output_rows(buffer)
    seen_by = torch.zeros(h.num_tokens, num_slots, dtype=torch.int32)
    for block, run_begin, run_end, _ in plan.items.tolist():
        begin, count = plan.blocks[block].tolist()
        q_rows = plan.q_rows[begin : begin + count].long()
        positions = plan.positions[begin : begin + count]
        for index in range(run_begin, run_end):
            run = run_at(plan, index)
            slots = run_slots(plan, run, h.page_size)
            seen = run_visibility(plan, run, positions, h.window)
            # A query may stand in a block more than once, for different slots.
            t, j = seen.nonzero(as_tuple=True)
            mask[q_rows[t], slots[j]] = True
            where = (outputs[q_rows][:, None].expand_as(seen), slots.expand_as(seen))
            seen_by.index_put_(where, seen.int(), accumulate=True)
            if bool((seen_by[where] > 1).any()):
                raise ValueError(f"plan: run {index} shows a row a slot that it sees already")
    return mask


def expand_plan(buffer: torch.Tensor) -> torch.Tensor:
    """The dense mask that a plan stands for, by output rows.

    Returns:
        (num_tokens, page_limit * page_size) bool; see `expand_queries`, whose errors it raises.
    """
    mask, rows = expand_queries(buffer), output_rows(buffer)
    result = mask[: header(buffer).num_tokens].clone()
    for row, seen in zip(rows[len(result) :].tolist(), mask[len(result) :], strict=True):
        result[row] |= seen
    return result
