"""One calibration: cases timed in turn, costs fitted, and trees held against the fitted model."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fork_attn import _C, costs, ops
from fork_attn.bench.machine import load_average, machine
from fork_attn.bench.timing import Call, Timer, graphed
from fork_attn.calibrate import design, fit
from fork_attn.calibrate.design import Case

Tick = Callable[[str, int, int], None]
"""(what is going on, steps done, steps in all)."""

_BATCH = 8  # cases timed in turn


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    call_ns: float  # of a case without memory traffic, about
    stream_bytes: int
    rounds: int


class Misfit(ValueError):
    """The measured times contradict the model.

    Attributes:
        rows: what was measured, beside what the datasheet's costs predict.
    """

    def __init__(self, message: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rows = rows


def effort(device: torch.device, quick: bool) -> Effort:
    """Seconds on a CPU, many times its caches; on a GPU calls of a fraction of a millisecond."""
    if device.type == "cuda":
        return Effort(1e5, 1 << 29, 20) if quick else Effort(3e5, 1 << 31, 60)
    return Effort(1e6, 1 << 27, 5) if quick else Effort(4e6, 1 << 29, 25)


def capacity(much: Effort) -> int:
    """Pages for what is streamed, and for the new tokens beside it."""
    return much.stream_bytes // (design.HEADS * design.PAGE * 2 * 128 * 2) + 1024


def calibrate(target: str, device: torch.device, quick: bool, tick: Tick) -> dict[str, Any]:
    """Measures a target's costs on a device that has it.

    The planner is left with the costs that it had.

    Returns:
        What a file of costs holds (`fork_attn.costs.read`), and what was measured.

    Raises:
        Misfit: the times contradict the model, as they do on a machine that is too busy.
    """
    costs.load()
    before = _C.target_costs(target)
    try:
        return _calibrate(target, device, effort(device, quick), tick)
    finally:
        _C.set_target_costs(target, {name: before[name] for name in costs.FIELDS})


def _calibrate(target: str, device: torch.device, much: Effort, tick: Tick) -> dict[str, Any]:
    _C.reset_target_costs(target)  # the same plans, whatever costs were loaded
    workers = _workers(device)
    num_pages = capacity(much)
    tick("memory", 0, 1)
    tensors = design.Tensors(device, num_pages)
    timer = Timer(device, 0.0, min_rounds=much.rounds, max_rounds=much.rounds)

    streamed = list(design.streamed_cases(target, workers, much.stream_bytes))
    times = _time(streamed, tensors, timer, "bandwidth", tick)
    resident = list(design.resident_cases(target, workers, much.call_ns))
    resident_ns = _time(resident, tensors, timer, "arithmetic, items, partial rows", tick)
    try:
        bytes_per_ns = fit.bandwidth(streamed, times)
        found = fit.fit(resident, resident_ns, bytes_per_ns, load_rows=target == "cpu")
        found["bytes_per_ns"] = fit.bandwidth(streamed, times, found)
    except ValueError as error:
        measured = _rows([*streamed, *resident], [*times, *resident_ns], _datasheet(target))
        raise Misfit(str(error), measured) from error
    _C.set_target_costs(target, found)
    trees = list(design.tree_cases(target, workers, num_pages))
    tree_ns = _time(trees, tensors, timer, "trees", tick)
    rows = [
        *_rows(streamed, times, found),
        *_rows(resident, resident_ns, found),
    ]
    return {
        "what": costs.WHAT,
        "version": costs.VERSION,
        "target": target,
        "machine": costs.machine_name(target),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "workers": workers,
        "costs": {name: found[name] for name in costs.FIELDS},
        "datasheet": _datasheet(target),
        "fit": _summary([abs(row["error"]) for row in rows[len(streamed) :]]),
        "trees": _summary([abs(row["error"]) for row in _rows(trees, tree_ns, found)]),
        "measured": rows,
        "held_out": _rows(trees, tree_ns, found),
        "system": machine(device),
        "load": load_average(),
    }


def _workers(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()


def _time(
    cases: Sequence[Case], tensors: design.Tensors, timer: Timer, what: str, tick: Tick
) -> list[float]:
    """Nanoseconds of a call of each case: the 20th percentile, as other programs only add."""
    found: list[float] = []
    for begin in range(0, len(cases), _BATCH):
        tick(what, begin, len(cases))
        calls = {
            str(index): _call(case, tensors, timer.device)
            for index, case in enumerate(cases[begin : begin + _BATCH])
        }
        found += [times.p20 * 1e9 for times in timer.measure(calls).values()]
    tick(what, len(cases), len(cases))
    return found


def _call(case: Case, tensors: design.Tensors, device: torch.device) -> Call:
    q, k_cache, v_cache, plan = tensors.arguments(case.plan, case.streamed)
    run: Call = lambda: ops.tree_attention(q, k_cache, v_cache, plan)  # noqa: E731
    if device.type != "cuda":
        return run
    return graphed(run)


def _rows(
    cases: Iterable[Case], times: Iterable[float], table: dict[str, float]
) -> list[dict[str, Any]]:
    rows = []
    for case, ns in zip(cases, times, strict=True):
        predicted = design.predicted_ns(case, table)
        rows.append(
            {
                "case": case.name,
                "rows": case.rows,
                "head_dim": case.shape.head_dim,
                "from_memory": case.streamed,
                "slots": sum(case.work.slots.values()),
                "items": case.work.items,
                "partial_rows": case.work.partial_rows,
                "ns": ns,
                "predicted_ns": predicted,
                "error": predicted / ns - 1,
            }
        )
    return rows


def _summary(sizes: Sequence[float]) -> dict[str, float]:
    return {"median_error": statistics.median(sizes), "largest_error": max(sizes)}


def _datasheet(target: str) -> dict[str, float]:
    now = _C.target_costs(target)
    _C.reset_target_costs(target)
    found = _C.target_costs(target)
    _C.set_target_costs(target, {name: now[name] for name in costs.FIELDS})
    return {name: found[name] for name in costs.FIELDS}
