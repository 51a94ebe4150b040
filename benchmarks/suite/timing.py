"""Times of calls in turn: warm-up, cold and warm caches, CUDA graphs; median, p20 and p95."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Writing it evicts a GPU's L2, and takes long enough to hide the host's launch of what is measured.
FLUSH_BYTES = 512 << 20

Call = Callable[[], object]


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
    """

    device: torch.device
    seconds: float
    min_rounds: int = 5
    max_rounds: int = 200

    def measure(self, calls: Mapping[str, Call], cold: bool = False) -> dict[str, Times]:
        """Runs all calls in turn, round after round, so that a drift of clocks or another program's
        load meets all of them alike; the first round only warms up. `cold` evicts a GPU's L2 before
        each call; on a CPU calls go through layers themselves."""
        for call in calls.values():
            call()
        taken: dict[str, list[float]] = {name: [] for name in calls}
        one = self._on_gpu if self.device.type == "cuda" else _on_cpu
        flush = None
        if cold and self.device.type == "cuda":
            flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        end = time.perf_counter() + self.seconds
        for done in range(self.max_rounds):
            if done >= self.min_rounds and time.perf_counter() > end:
                break
            # Another call goes first each round: what the one before leaves behind meets all.
            names = list(calls)
            first = done % max(len(names), 1)
            for name in names[first:] + names[:first]:
                if flush is not None:
                    flush.zero_()
                taken[name].append(one(calls[name]))
        return {name: Times.of(seconds) for name, seconds in taken.items()}

    def _on_gpu(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def host(self, calls: Mapping[str, Call]) -> dict[str, Times]:
        """Like `measure`, of what runs on the host; device work that it queues is waited for."""

        def waited(call: Call) -> Call:
            def run() -> None:
                call()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()

            return run

        host = Timer(torch.device("cpu"), self.seconds, self.min_rounds, self.max_rounds)
        return host.measure({name: waited(call) for name, call in calls.items()})


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
