"""Scripts: what drives threads, and what they wait for."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fork_attn.reason.thread import Thread


@dataclass(frozen=True)
class Ended:
    """Why a thread stopped writing.

    Attributes:
        reason: "stop" at a stop token or text, "eos" at an end token, "limit".
        stop: the tag or text that it stopped at.
        token: the token that ended it; it is pending: the next feed begins with it.
        note: which limit.
    """

    reason: Literal["stop", "eos", "limit"]
    stop: str = ""
    token: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Together:
    """What a script yields to run several scripts at once; see `together`."""

    scripts: tuple[Script, ...]
    first: bool = False


Script = Generator["Thread | Together", Any, Any]
"""What drives threads: a generator whose steps are `yield from thread.write(...)` and the like."""


def together(scripts: Iterable[Script], *, first: bool = False) -> Script:
    """Runs scripts at once, their threads in the same forwards.

    Args:
        scripts: one or more.
        first: return as soon as one script has; the others are closed where they stand.

    Returns:
        What each script returned, in order; with `first` (index, what it returned).
    """
    return (yield Together(tuple(scripts), first))
