"""Shapes of published parallel-reasoning traces, for replay with forced tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Serial:
    """Tokens that one thread decodes alone."""

    tokens: int


@dataclass(frozen=True)
class Fork:
    """Threads of unequal lengths.

    Attributes:
        lengths: tokens that each decodes.
        joins: the parent goes on over what the children wrote; else it reads only `returns` tokens
            of theirs.
        returns: tokens of messages that the parent reads after children that it does not join.
    """

    lengths: tuple[int, ...]
    joins: bool = True
    returns: int = 0


@dataclass(frozen=True)
class Trace:
    """One request: a prompt, then phases."""

    name: str
    source: str
    prefix: int
    phases: tuple[Serial | Fork, ...]

    @property
    def tokens(self) -> int:
        """Decoded."""
        return sum(p.tokens if isinstance(p, Serial) else sum(p.lengths) for p in self.phases)

    @property
    def critical_path(self) -> int:
        """Decoding steps when threads run at once."""
        return sum(p.tokens if isinstance(p, Serial) else max(p.lengths) for p in self.phases)

    @property
    def joined_tokens(self) -> int:
        """What an engine that cannot join prefills again."""
        forks = (p for p in self.phases if isinstance(p, Fork) and p.joins)
        return sum(sum(p.lengths) for p in forks)

    def scaled(self, factor: float) -> Trace:
        """The same shape with all lengths times a factor, at least one token each."""

        def times(n: int) -> int:
            return max(1, round(n * factor)) if n else 0

        phases: list[Serial | Fork] = [
            Serial(times(p.tokens))
            if isinstance(p, Serial)
            else Fork(tuple(map(times, p.lengths)), p.joins, times(p.returns))
            for p in self.phases
        ]
        return Trace(self.name, self.source, times(self.prefix), tuple(phases))


def _threadweaver() -> Trace:
    """One level of forks, wide in the middle of a long chain of thought: about 14k tokens in all,
    average width 1.2, child lengths unequal."""
    return Trace(
        "threadweaver",
        "ThreadWeaver (arXiv 2512.07843): depth 1, 7.7k-27.3k tokens, average width 1.14-1.25",
        1024,
        (
            Serial(2400),
            Fork((900, 420, 640)),
            Serial(3200),
            Fork((700, 1100)),
            Serial(2600),
            Fork((380, 520, 300, 760)),
            Serial(1200),
        ),
    )


def _multiverse() -> Trace:
    """Several groups of two to five, joined each time, parallel degree about 1.2."""
    return Trace(
        "multiverse",
        "Multiverse (arXiv 2506.09991): about 7 parallel groups, parallel degree 1.15-1.18",
        1024,
        (
            Serial(1500),
            Fork((420, 260)),
            Serial(1300),
            Fork((300, 180, 240)),
            Serial(1400),
            Fork((520, 160)),
            Serial(1200),
            Fork((240, 200, 140, 120, 180)),
            Serial(1300),
        ),
    )


def _apr() -> Trace:
    """Children search apart and return a line: the parent never reads their tokens."""
    return Trace(
        "apr",
        "APR (arXiv 2504.15466): 6-8 children a trace, 1.5k-1.8k tokens a sequence, 4k context",
        512,
        (
            Serial(300),
            Fork((900, 640, 1100), joins=False, returns=60),
            Serial(350),
            Fork((700, 1200, 520, 860), joins=False, returns=80),
            Serial(250),
        ),
    )


TRACES: dict[str, Callable[[], Trace]] = {
    "threadweaver": _threadweaver,
    "multiverse": _multiverse,
    "apr": _apr,
}
