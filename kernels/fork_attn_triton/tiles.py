"""Device functions that tree attention is made of: scores, the online softmax, ends of rows."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh of fp32: an odd polynomial near 0, where 1 - 2 / (1 + exp(2x)) would cancel."""
    square = x * x
    near = x + x * square * (
        -0.33333333 + square * (0.13333333 + square * (-0.05396825 + square * 0.02186949))
    )
    far = 1.0 - 2.0 / (1.0 + tl.exp2(tl.abs(x) * (2.0 * LOG2E)))
    return tl.where(square < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def scores(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of a tile in base 2, (rows, slots) fp32: q . k * scale, then the softcap."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_SOFTCAP:
        return tanh(s * (scale / softcap)) * (softcap * LOG2E)
    return s * (scale * LOG2E)


@triton.jit
def add_tile(s, v, top, total, acc, PRECISION: tl.constexpr):
    """One step of the online softmax (FlashAttention-2, arXiv 2307.08691), in base 2.

    s (rows, slots) with -inf where a row does not see a slot; v (slots, dim); top (rows,) the
    largest score so far, total (rows,) the sum of 2 ** (score - top), acc (rows, dim) the values.
    Returns the new (top, total, acc) and the tile's probabilities.
    """
    new_top = tl.maximum(top, tl.max(s, 1))
    origin = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing seen so far
    decay = tl.exp2(top - origin)
    p = tl.exp2(s - origin[:, None])
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new_top, total, acc, p


@triton.jit
def add_state(state_out, state_top, top, total, acc):
    """Adds normalised states (rows, dim) with base-2 log-sum-exps (rows,): -inf marks none."""
    new_top = tl.maximum(top, state_top)
    origin = tl.where(new_top == -float("inf"), 0.0, new_top)
    decay = tl.exp2(top - origin)
    weight = tl.exp2(state_top - origin)
    return new_top, total * decay + weight, acc * decay[:, None] + state_out * weight[:, None]


@triton.jit
def fold_state(out, lse, next_out, next_lse):
    """Adds a normalised state to another: out (rows, dim) with natural-log lse (rows,).

    An empty one (lse -inf) changes nothing, not even the sign of a zero. Batch-invariant plans fold
    chunks by this alone, whether they meet in an item or in merging, so that both round alike.
    """
    top = tl.maximum(lse, next_lse)
    origin = tl.where(top == -float("inf"), 0.0, top)
    kept = tl.exp2((lse - origin) * LOG2E)
    added = tl.exp2((next_lse - origin) * LOG2E)
    total = kept + added
    first = lse == -float("inf")
    alone = first | (next_lse == -float("inf"))
    total = tl.where(alone, 1.0, total)
    folded = out * (kept / total)[:, None] + next_out * (added / total)[:, None]
    either = tl.where(first[:, None], next_out, out)
    folded = tl.where(alone[:, None], either, folded)
    return folded, tl.where(alone, top, top + tl.log2(total) * LN2)


@triton.jit
def end_state(lse, sink, HAS_SINKS: tl.constexpr):
    """As `end_rows`, of rows that are normalised already."""
    factor = tl.full(lse.shape, 1.0, tl.float32)
    if HAS_SINKS:
        high = tl.maximum(lse, sink)
        keep = tl.exp2((lse - high) * LOG2E)
        total = keep + tl.exp2((sink - high) * LOG2E)
        factor = keep / total
        lse = high + tl.log2(total) * LN2
    return factor, lse


@triton.jit
def end_rows(top, total, sink, HAS_SINKS: tl.constexpr):
    """What to multiply the sums by, and the natural-log LSE. A sink joins the sum alone.

    A row that saw nothing has factor 0 and lse -inf, or the sink.
    """
    if HAS_SINKS:
        high = tl.maximum(top, sink * LOG2E)
        keep = tl.exp2(top - high)
        total = total * keep + tl.exp2(sink * LOG2E - high)
    else:
        high = top
        keep = tl.full(top.shape, 1.0, tl.float32)
    empty = total == 0.0
    factor = tl.where(empty, 0.0, keep / tl.where(empty, 1.0, total))
    lse = tl.where(empty, -float("inf"), (high + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    return factor, lse
