"""Times of calls on a CPU: rivals in turn, warm, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    median: float
    p20: float
    p80: float
    best: float
    rounds: int

    @staticmethod
    def of(seconds: list[float]) -> Times:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return Times(
            statistics.median(ordered),
            ordered[last * 2 // 10],
            ordered[last * 8 // 10],
            ordered[0],
            len(ordered),
        )


@dataclass(frozen=True)
class Timer:
    """How long to measure.

    Attributes:
        seconds: for all calls together; rounds end when they are spent.
        min_rounds, max_rounds: whatever the seconds say.
    """

    seconds: float
    min_rounds: int = 5
    max_rounds: int = 500

    def measure(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Times]:
        """Runs all calls in turn, round after round, so that a drift of clocks or another
        program's load meets all of them alike; the first round only warms up."""
        for call in calls.values():
            call()
        taken: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + self.seconds
        for done in range(self.max_rounds):
            if done >= self.min_rounds and time.perf_counter() > end:
                break
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - start)
        return {name: Times.of(seconds) for name, seconds in taken.items()}
