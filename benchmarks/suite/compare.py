"""Holds a result against a committed one of the same kind of machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fork_attn.bench.machine import kind
from fork_attn.bench.results import geomean, ours

SLACK = 1.10
"""A ratio may fall by this factor before it counts, beside the spread of the two measurements."""
OVERALL = 1.05
"""The geometric mean over all cases may fall by this factor, beside its noise."""


@dataclass(frozen=True)
class Change:
    """How a case's ratio to a rival moved: `now` and `then` are rival's time over ours."""

    id: str
    rival: str
    then: float
    now: float
    allowed: float  # the factor by which it may fall

    @property
    def factor(self) -> float:
        """Below 1: slower than it was."""
        return self.now / self.then

    @property
    def regressed(self) -> bool:
        return self.factor < 1 / self.allowed


@dataclass(frozen=True)
class Comparison:
    """All cases that both results have, what could not be compared, and the verdict."""

    changes: list[Change]
    missing: list[str]

    @property
    def overall(self) -> float:
        return geomean(change.factor for change in self.changes)

    @property
    def allowed(self) -> float:
        """The factor by which the geometric mean may fall: the cases' noises are independent."""
        noises = [math.log(change.allowed / SLACK) for change in self.changes]
        return OVERALL * math.exp(math.hypot(*noises) / len(noises))

    @property
    def regressed(self) -> bool:
        slower = any(change.regressed for change in self.changes)
        return slower or self.overall < 1 / self.allowed


def compare(now: dict[str, Any], then: dict[str, Any]) -> Comparison:
    """Compares times of our kernel (cold), each as a ratio to a rival timed in the same run: a
    faster or busier machine moves both.

    Raises:
        ValueError: another kind of machine or another format of results, or no case in common.
    """
    if now["schema"] != then["schema"]:
        raise ValueError(f"against: expected schema {now['schema']}, got {then['schema']}")
    here, there = kind(now["machine"]), kind(then["machine"])
    if here != there:
        raise ValueError(f"against: expected results of {here}, got those of {there}")
    before = {row["id"]: row for row in then["cases"]}
    changes, missing = [], []
    for row in now["cases"]:
        change = _change(row, before[row["id"]]) if row["id"] in before else None
        if change is None:
            missing.append(row["id"])
        else:
            changes.append(change)
    if not changes:
        raise ValueError("against: no case in common with a rival that ran both times")
    return Comparison(changes, missing)


def _change(now: dict[str, Any], then: dict[str, Any]) -> Change | None:
    """Against the rival whose own times spread least of those that ran both times."""
    mine, theirs = ours(now, "cold"), ours(then, "cold")
    rivals = [name for name, way in now["ways"].items() if not way["ours"] and name in then["ways"]]
    if mine is None or theirs is None or not rivals:
        return None
    rival = min(rivals, key=lambda name: _spread(now, name) * _spread(then, name))
    # The spreads of four times, as independent: the noise of the quotient of their ratios.
    pairs = ((now, mine), (now, rival), (then, theirs), (then, rival))
    noise = math.sqrt(sum(math.log(_spread(row, name)) ** 2 for row, name in pairs))
    return Change(
        now["id"],
        rival,
        _ratio(then, rival, theirs),
        _ratio(now, rival, mine),
        SLACK * math.exp(noise),
    )


def _ratio(row: dict[str, Any], rival: str, mine: str) -> float:
    ways = row["ways"]
    return float(ways[rival]["cold"]["median"] / ways[mine]["cold"]["median"])


def _spread(row: dict[str, Any], name: str) -> float:
    """Median over the 20th percentile: what noise added to half of the rounds."""
    times = row["ways"][name]["cold"]
    return float(times["median"] / times["p20"])


def show(found: Comparison) -> list[str]:
    """The comparison, line by line; regressions are marked."""
    lines = [f"{'case':30}{'rival':22}{'then':>7}{'now':>7}{'factor':>8}{'allowed':>9}"]
    for change in sorted(found.changes, key=lambda c: c.factor):
        mark = "  REGRESSED" if change.regressed else ""
        lines.append(
            f"{change.id:30}{change.rival:22}{change.then:7.2f}{change.now:7.2f}"
            f"{change.factor:8.2f}{1 / change.allowed:9.2f}{mark}"
        )
    verdict = "regressed" if found.regressed else "no regression"
    mean = f"{found.overall:.3f}, allowed {1 / found.allowed:.3f}"
    lines.append(f"geometric mean of the factors {mean}: {verdict}")
    if found.missing:
        lines.append(f"not compared: {', '.join(found.missing)}")
    return lines
