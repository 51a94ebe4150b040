"""Times of calls in turn: warm-up, cold and warm caches, CUDA graphs; median, p20 and p95."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

FLUSH_BYTES = 512 << 20
"""Writing it evicts a GPU's L2."""
PAUSE_CYCLES = 2_000_000
"""About a millisecond in which a GPU waits, so that the host has launched what is measured, dozens
of kernels too, before the first of them begins."""

FAR = 2.0
"""Times the fastest call's time, beyond which one is far from it."""

Call = Callable[[], object]
T = TypeVar("T")


def count(text: str) -> int:
    """An argument of a command line that counts rounds or the like.

    Raises:
        argparse.ArgumentTypeError: not a whole number above 0.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


class CallFailed(RuntimeError):
    """A call that is measured raised.

    Attributes:
        name: which one; the cause is what it raised.
    """

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name}: {type(error).__name__}: {error}")
        self.name = name


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    median: float
    p20: float
    p95: float
    rounds: int

    @staticmethod
    def of(seconds: list[float]) -> Times:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return Times(
            statistics.median(ordered),
            ordered[last * 20 // 100],
            ordered[-(-last * 95 // 100)],
            len(ordered),
        )


@dataclass(frozen=True)
class Timer:
    """Measures calls on a device.

    Attributes:
        device: "cpu" or "cuda".
        seconds: to spend on all calls together; rounds end when they are spent.
        min_rounds, max_rounds: whatever the seconds say.
        far_rounds: after these, once the seconds are spent, calls that take more than `FAR` times
            as long as the fastest are left out; None: no call is.
        warm_up: whether a first round only warms up; False for calls that have just been made.
    """

    device: torch.device
    seconds: float
    min_rounds: int = 5
    max_rounds: int = 200
    far_rounds: int | None = None
    warm_up: bool = True

    def measure(
        self, calls: Mapping[str, Call], cold: bool = False, warm: bool = False
    ) -> dict[str, Times]:
        """Runs all calls in turn, round after round, so that a drift of clocks or another program's
        load meets all of them alike. On a GPU `cold` evicts L2
        before each call and `warm` runs each, untimed, right before it is timed: others that ran
        in between have filled L2. On a CPU calls go through layers themselves.

        Raises:
            CallFailed: a call raised.
        """
        for name, call in calls.items() if self.warm_up else ():
            self._one(name, call, lambda call: call())
        taken: dict[str, list[float]] = {name: [] for name in calls}
        time_one = self._gpu_clock(cold, warm) if self.device.type == "cuda" else _on_cpu
        end = time.perf_counter() + self.seconds
        names = list(calls)
        for done in range(self.max_rounds):
            spent = time.perf_counter() > end
            if done >= self.min_rounds and spent:
                break
            if self.far_rounds is not None and done >= self.far_rounds and spent:
                names = _near(names, taken)
            # Another call goes first each round: what the one before leaves behind meets all.
            first = done % max(len(names), 1)
            for name in names[first:] + names[:first]:
                taken[name].append(self._one(name, calls[name], time_one))
        return {name: Times.of(seconds) for name, seconds in taken.items()}

    @staticmethod
    def _one(name: str, call: Call, what: Callable[[Call], T]) -> T:
        try:
            return what(call)
        except Exception as error:
            raise CallFailed(name, error) from error

    def _gpu_clock(self, cold: bool, warm: bool) -> Callable[[Call], float]:
        """Times a call by events on the device."""
        flush = torch.empty(FLUSH_BYTES if cold else 0, dtype=torch.uint8, device=self.device)

        def clock(call: Call) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if cold:
                flush.zero_()
            if cold or warm:
                torch.cuda._sleep(PAUSE_CYCLES)
            if warm:
                call()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return clock

    def host(self, calls: Mapping[str, Call]) -> dict[str, Times]:
        """Like `measure`, of what runs on the host; device work that it queues is waited for.

        Raises:
            CallFailed: a call raised.
        """

        def waited(call: Call) -> Call:
            def run() -> None:
                call()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()

            return run

        host = replace(self, device=torch.device("cpu"))
        return host.measure({name: waited(call) for name, call in calls.items()})


def _near(names: list[str], taken: Mapping[str, list[float]]) -> list[str]:
    """Those of the names that are not far from the fastest."""
    medians = {name: statistics.median(taken[name]) for name in names}
    fastest = min(medians.values(), default=0.0)
    return [name for name in names if medians[name] <= FAR * fastest]


def _on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(run: Callable[[int], object], layers: int) -> Call:
    """A call that goes on to the next layer each time."""
    turn = itertools.cycle(range(layers))
    return lambda: run(next(turn))


def graphed(call: Call) -> Call:
    """The call captured as a CUDA graph; replays it, and keeps what the call holds: a graph reads
    its tensors' memory without owning it.

    Raises:
        RuntimeError: it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(kept: Call = call) -> None:
        graph.replay()

    return replay
