"""Which body of the tree attention kernel runs, who merges, and what they are compiled with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# A launch that merges alone: rows and warps of a program, partial rows of a row loaded at once.
APART_ROWS, APART_WARPS, APART_AT_ONCE = 4, 4, 16
# Partial results that a program merges by itself, at most: beyond, a launch of its own is expected
# to take less time (docs/kernels/tree_attention.md).
MOST_MERGED_BYTES = 192 * 1024
# Loads of page lists, loads of the K and V that they name, products: K and V are one tile ahead.
STAGES = 3
_SHARED_REST = 1024  # bytes for page lists, words of masks and barriers
Merge = Literal["inside", "apart", "none"]


@dataclass(frozen=True)
class Body:
    """How one compiled kernel tiles its work."""

    rows: int  # query rows (tokens x group) of a tile
    slots: int  # KV slots of a tile
    warps: int
    stages: int  # of loads and products: of page lists, K and V, products


def choose_body(
    rows: int,
    head_dim: int,
    head_dim_v: int,
    itemsize: int,
    kv_itemsize: int,
    sm: int,
    shared: int | None = None,
) -> Body:
    """The body for row blocks of up to `rows` rows (tokens x group).

    The least of 16, 32, 64 and 128 rows that holds a block, so that K and V are read once. Where
    registers do not allow that, the block takes several passes: fp32 (no tensor cores at full
    precision) above 16 rows, heads above 128 at 128 rows. Tiles of 128 rows take 8 warps; so do
    64 rows of heads above 128 and, for its registers, on sm_100. Tiles have 64 slots, 32 for fp32,
    for heads above 128 on sm_80 to sm_89, and where shared memory does not hold 64.

    Args:
        itemsize: bytes of an element of q.
        kv_itemsize: bytes of an element of K and V.
        sm: compute capability, 80, 90, ...
        shared: bytes of shared memory that a program may have; None: `shared_memory(sm)`.
    """
    widest = max(head_dim, head_dim_v)
    most = 128
    if itemsize == 4:
        most = 16
    elif widest > 128:
        most = 64
    tile = next(size for size in (16, 32, 64, 128) if size >= min(rows, most))
    warps = 8 if tile == 128 or (tile == 64 and (widest > 128 or sm >= 100)) else 4
    slots = 32 if itemsize == 4 or (widest > 128 and sm < 90) else 64
    body = Body(tile, slots, warps, STAGES)
    most_shared = shared_memory(sm) if shared is None else shared
    if shared_needed(body, head_dim, head_dim_v, itemsize, kv_itemsize, sm) > most_shared:
        body = Body(tile, 32, warps, STAGES)
    return body


def shared_memory(sm: int) -> int:
    """Bytes of shared memory that a program may have on cards of a compute capability (CUDA
    programming guide, technical specifications)."""
    if 90 <= sm < 120:
        return 227 * 1024
    return (163 if sm in (80, 87) else 99) * 1024


def shared_needed(
    body: Body, head_dim: int, head_dim_v: int, itemsize: int, kv_itemsize: int, sm: int
) -> int:
    """Bytes of shared memory that a body takes, at most, with the arguments of `choose_body`.

    Queries, probabilities, and with STAGES K and V of the tile that is on its way; where products
    read shared memory (sm_90 and sm_100), those of the tile before as well.
    """
    queries = body.rows * padded(head_dim) * itemsize
    probabilities = body.rows * body.slots * itemsize
    tile = body.slots * (padded(head_dim) + padded(head_dim_v)) * kv_itemsize
    tiles = 2 if 90 <= sm < 120 else 1
    return queries + probabilities + tiles * tile + _SHARED_REST


def invariant_rows(sm: int) -> int:
    """Rows of the one body of batch-invariant launches: what a block of the planner's may hold; on
    sm_100, where that body spills in its loops, half of it, in two passes."""
    return 128 if sm < 100 else 64


def invariant_tokens(group: int, max_block_tokens: int) -> int:
    """Tokens of a block that batch-invariant launches are compiled for: what the planner puts into
    one at most, whatever this plan does.

    Raises:
        ValueError: the plan is not one of the planner's for a GPU.
    """
    most = max(1, min(64, 128 // group))
    if max_block_tokens > most:
        raise ValueError(f"max_block_tokens: expected at most {most}, got {max_block_tokens}")
    return most


def choose_merge(
    max_merge_rows: int, group: int, head_dim_v: int, batch_invariant: bool = False
) -> Merge:
    """Who merges: nobody where there are no partial rows, the last program to arrive unless that is
    too much for one, else a launch of its own.

    Args:
        max_merge_rows: partial rows that one program would merge for one KV head, at most.
        batch_invariant: merged in one place, whatever else is in the batch.
    """
    if max_merge_rows == 0:
        return "none"
    size = max_merge_rows * group * (head_dim_v + 1) * 4
    return "apart" if batch_invariant or size > MOST_MERGED_BYTES else "inside"


def padded(dim: int) -> int:
    """The tile width of a head dimension: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def constants(
    body: Body,
    *,
    num_kv_heads: int,
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    group: int,
    page_size: int,
    head_dim: int,
    head_dim_v: int,
    max_block_tokens: int,
    window: bool,
    softcap: bool,
    sinks: bool,
    k_scale: bool,
    v_scale: bool,
    tma: bool,
    fp32: bool,
    sm: int,
    merge: Merge,
    batch_invariant: bool,
    far_heads: bool,
) -> dict[str, Any]:
    """The kernel's compile-time arguments; strides are those of page, slot and head. `far_heads`:
    a row of q reaches 2**31 elements from its first head, as where heads come before tokens."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "K_STRIDES": tuple(k_strides),
        "V_STRIDES": tuple(v_strides),
        "GROUP": group,
        "PAGE_SIZE": page_size,
        "D": head_dim,
        "DV": head_dim_v,
        "BLOCK_D": padded(head_dim),
        "BLOCK_DV": padded(head_dim_v),
        "BLOCK_M": body.rows,
        "BLOCK_N": body.slots,
        "BLOCK_T": 32 if max_block_tokens <= 32 else 64,
        "WIDE": max_block_tokens > 32,
        "HAS_WINDOW": window,
        "HAS_SOFTCAP": softcap,
        "HAS_SINKS": sinks,
        "HAS_K_SCALE": k_scale,
        "HAS_V_SCALE": v_scale,
        "TMA": tma,
        "STAGES": body.stages,
        "PRECISION": "ieee" if fp32 else "tf32",
        # A function with products of warpgroups makes the caller wait for each of its own (ptxas,
        # C7510), and one that uses tensor memory cannot be called (Triton 3.6).
        "CALLS": not (batch_invariant and sm >= 90 and body.rows >= 64),
        "INVARIANT": batch_invariant,
        "MERGE": merge == "inside",
        "MERGE_ROWS": min(body.rows, 4 * body.warps),
        "FAR_HEADS": far_heads,
    }


def merge_constants(
    num_q_heads: int, head_dim_v: int, sinks: bool, batch_invariant: bool
) -> dict[str, Any]:
    """The merging kernel's compile-time arguments."""
    return {
        "NUM_Q_HEADS": num_q_heads,
        "DV": head_dim_v,
        "BLOCK_DV": padded(head_dim_v),
        "ROWS": APART_ROWS,
        "AT_ONCE": APART_AT_ONCE,
        "HAS_SINKS": sinks,
        "INVARIANT": batch_invariant,
    }
