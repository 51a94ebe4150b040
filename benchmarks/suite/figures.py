"""The figures of the ways of one case: each tried first, then all timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from fork_attn.bench.timing import CallFailed, Timer, Times, graphed, in_turn
from fork_attn.bench.way import FAILED, Way, told

STEP_LAYERS = {"cpu": 4, "cuda": 36}
LONGEST_STEP = 0.3
"""Seconds beyond which a rival's step is not run on a GPU, but added up."""

Figures = dict[str, dict[str, Any]]


def measured(
    ways: dict[str, Way], timer: Timer, layers: int, absent: dict[str, str]
) -> tuple[dict[str, Figures], dict[str, str]]:
    """The figures of each way that came through, by name, and why calls were not captured.

    A way that raises is closed, taken out of `ways` and named in `absent`; all others are measured
    again, so that their figures are of the same rounds.
    """
    while True:
        try:
            return _figures(ways, timer, layers)
        except CallFailed as failure:
            assert isinstance(failure.__cause__, Exception)
            absent[failure.name] = FAILED + told(failure.__cause__)
            close(ways.pop(failure.name))


def close(way: Way) -> None:
    """Gives up what is open, of a way that may have failed in the middle of it."""
    try:
        way.close()
    except Exception as error:  # what failed may fail again; its first reason is recorded
        print(f"{way.name}: close: {told(error)}")


def _figures(
    ways: dict[str, Way], timer: Timer, layers: int
) -> tuple[dict[str, Figures], dict[str, str]]:
    gpu = timer.device.type == "cuda"
    seconds = {name: _tried(name, way, layers, gpu) for name, way in ways.items()}
    calls = {name: in_turn(way.run, layers) for name, way in ways.items()}
    warm = {name: (lambda way=way: way.run(0)) for name, way in ways.items()}
    times = {"cold": timer.measure(calls, cold=True), "warm": timer.measure(warm, warm=True)}
    plans = {name: way.plan for name, way in ways.items() if way.has_plan}
    times["plan"] = timer.host(plans) if plans else {}
    not_captured: dict[str, str] = {}
    if gpu:
        graphs = {}
        for name, call in warm.items():
            try:
                graphs[name] = graphed(call)
            except Exception as error:  # not all can be captured; the rest is replayed
                not_captured[name] = told(error)
        times["graph"] = timer.measure(graphs, cold=True) if graphs else {}
    count = STEP_LAYERS[timer.device.type]
    long = {
        name
        for name, way in ways.items()
        if gpu and not way.ours and seconds[name] * count > LONGEST_STEP
    }
    whole = {name: way for name, way in ways.items() if name not in long}
    times["step"] = steps(whole, timer, layers, count)
    found: dict[str, Figures] = {
        name: {what: asdict(some[name]) for what, some in times.items() if name in some}
        for name in ways
    }
    for name in long:
        added = added_up(times["cold"][name], times["plan"].get(name), count)
        found[name]["step"] = {**asdict(added), "added_up": True}
    return found, not_captured


def _tried(name: str, way: Way, layers: int, gpu: bool) -> float:
    """Seconds of a run, launches included, after every call that is measured was made once."""

    def waited(call: Callable[[], object]) -> float:
        begun = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    try:
        waited(lambda: way.step(1, layers))
        waited(way.plan)
        waited(lambda: way.run(0))
        return waited(lambda: way.run(0))
    except Exception as error:
        raise CallFailed(name, error) from error


def steps(ways: dict[str, Way], timer: Timer, layers: int, count: int) -> dict[str, Times]:
    """Of whole steps of `count` layers, plans included; plans and layers have been run before, so
    that no round is spent on warming up."""
    calls = {name: (lambda way=way: way.step(count, layers)) for name, way in ways.items()}
    return replace(timer, warm_up=False).host(calls) if calls else {}


def added_up(cold: Times, plan: Times | None, count: int) -> Times:
    """A step that is not run: the plan, and `count` times the cold run."""
    once = plan or Times(0.0, 0.0, 0.0, cold.rounds)
    return Times(
        once.median + count * cold.median,
        once.p20 + count * cold.p20,
        once.p95 + count * cold.p95,
        min(once.rounds, cold.rounds),
    )
