"""Times of device work: cold L2, rivals in turn, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Writing it evicts L2 and takes long enough (0.1 ms) to hide the host's launch of what is measured.
FLUSH_BYTES = 512 << 20


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    median: float
    p20: float
    p80: float
    rounds: int

    @staticmethod
    def of(seconds: list[float]) -> Times:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return Times(
            statistics.median(ordered),
            ordered[last * 2 // 10],
            ordered[last * 8 // 10],
            len(ordered),
        )


def measure(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, warmup: int = 3
) -> dict[str, Times]:
    """Runs all calls in turn, `rounds` times, so that a drift of clocks meets all of them alike."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    timed = _timed_on_gpu if device.type == "cuda" else _timed_on_cpu
    return {name: Times.of(seconds) for name, seconds in timed(calls, rounds).items()}


def _timed_on_gpu(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


def _timed_on_cpu(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds
