"""Costs from measured times, by least squares of relative errors."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch

from fork_attn.calibrate.design import Case, predicted_ns, rate_field

_RATES = tuple(f"flops_per_ns_{rows}" for rows in (16, 32, 64, 128))
_LINEAR = ("launch_ns", "item_ns", "ns_per_exp", "partial_bytes_per_ns")
_LOAD_ROWS = tuple(0.5 * i for i in range(33))
_LEAST_ITEM_NS = 1.0
_MOST_ERROR = 0.25
_LEAST_MEMORY = 0.05


def bandwidth(
    cases: Sequence[Case], ns: Sequence[float], table: dict[str, float] | None = None
) -> float:
    """Bytes per nanosecond of a worker: what twice the contexts take longer.

    Args:
        cases: of `streamed_cases`.
        ns: measured, of each case.
        table: the other costs, once they are known. Where memory's time passes after arithmetic's,
            what these say of arithmetic is taken off first, though never all: the rest is at least
            a twentieth.

    Raises:
        ValueError: twice the contexts took no longer.
    """
    sizes = [
        sum(case.work.slots.values()) * (case.shape.head_dim + case.shape.head_dim_v) * 2
        for case in cases
    ]
    if ns[0] <= ns[1]:
        raise ValueError(
            f"calibrate: twice the memory took no longer ({ns[0]:.0f} and {ns[1]:.0f} ns): the "
            "machine is too busy to measure"
        )
    longer = ns[0] - ns[1]
    if table is not None and not cases[0].overlaps:
        arithmetic = [predicted_ns(replace(case, streamed=False), table) for case in cases]
        longer = max(longer - (arithmetic[0] - arithmetic[1]), longer * _LEAST_MEMORY)
    return (sizes[0] - sizes[1]) / longer


def fit(
    cases: Sequence[Case], ns: Sequence[float], bytes_per_ns: float, load_rows: bool
) -> dict[str, float]:
    """The costs with which the model comes nearest to measured times.

    Args:
        cases: without memory traffic.
        ns: measured, of each case.
        bytes_per_ns: of a worker, from `bandwidth` without a table.
        load_rows: whether reading a slot costs arithmetic apart from its rows' (CPUs).

    Raises:
        ValueError: the times fit no model with positive rates, or the best one badly.
    """
    best: tuple[float, dict[str, float]] | None = None
    for rows in _LOAD_ROWS if load_rows else (0.0,):
        table = _fit_linear(cases, ns, bytes_per_ns, rows)
        if table is None:
            continue
        error = sum(e * e for e in errors(cases, ns, table))
        if best is None or error < best[0]:
            best = (error, table)
    if best is None:
        raise ValueError("calibrate: the measured times fit no model with positive rates")
    typical = statistics.median(map(abs, errors(cases, ns, best[1])))
    if typical > _MOST_ERROR:
        raise ValueError(
            f"calibrate: expected times that the cost model fits within {_MOST_ERROR:.0%} (median "
            f"error), got {typical:.0%}: the machine is too busy to measure"
        )
    return best[1]


def errors(cases: Sequence[Case], ns: Sequence[float], table: dict[str, float]) -> list[float]:
    """Predicted over measured, less 1."""
    return [predicted_ns(case, table) / t - 1 for case, t in zip(cases, ns, strict=True)]


def _fit_linear(
    cases: Sequence[Case], ns: Sequence[float], bytes_per_ns: float, load_rows: float
) -> dict[str, float] | None:
    """With `load_rows` given the model is linear in times per FLOP. Terms that come out negative
    are 0; None if a rate does."""
    names = [*_LINEAR, *_RATES]
    table = torch.zeros(len(cases), len(names), dtype=torch.float64)
    for i, case in enumerate(cases):
        work, dims = case.work, case.shape.head_dim + case.shape.head_dim_v
        row_bytes = 2 * (case.shape.head_dim_v + 1) * 4
        table[i, 0], table[i, 1], table[i, 3] = 1.0, work.items, work.partial_rows * row_bytes
        for rows, slots in work.slots.items():
            table[i, 2] += slots * rows
            table[i, names.index(rate_field(rows))] += slots * (rows + load_rows) * 2 * dims
    weight = 1 / torch.tensor(ns, dtype=torch.float64)
    used = [j for j in range(len(names)) if bool(table[:, j].any())]
    while True:
        columns = table[:, used] * weight[:, None]
        scale = columns.norm(dim=0)
        ones = torch.ones(len(cases), dtype=torch.float64)
        found = torch.linalg.lstsq(columns / scale, ones, driver="gelsd").solution / scale
        least = int(found.argmin())
        if found[least] > 0:
            break
        if names[used[least]] in _RATES:
            return None
        del used[least]
    inverse = dict.fromkeys(names, 0.0)
    inverse |= {names[j]: float(x) for j, x in zip(used, found, strict=True)}
    rates = {name: 1 / inverse[name] for name in _RATES if inverse[name] > 0}
    for name in _RATES:  # a size that was not measured has the rate of the next one
        rates.setdefault(name, next(rates[other] for other in _RATES if other in rates))
    partial = inverse["partial_bytes_per_ns"]
    return {
        "bytes_per_ns": bytes_per_ns,
        **rates,
        "load_rows": load_rows,
        "ns_per_exp": inverse["ns_per_exp"],
        "item_ns": max(inverse["item_ns"], _LEAST_ITEM_NS),
        # Where they cost nothing that shows: no more than memory's price.
        "partial_bytes_per_ns": 1 / partial if partial > 0 else bytes_per_ns,
        "launch_ns": inverse["launch_ns"],
    }
