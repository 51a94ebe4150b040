"""Limits of a generation, and what happens at each."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """How far a prompt may go. At every limit the trace says so, and all pages come back.

    Attributes:
        max_new_tokens: sampled tokens of one prompt, all threads together; then it finishes with
            what there is.
        max_thread_tokens: sampled tokens of one thread between a fork, join or rollback and the
            next; then the thread ends, and its protocol goes on as if it had ended by itself. None
            takes the sampling config's `max_new_tokens`, if it has one.
        max_fanout: children of one fork; a larger fork is refused, and the thread goes on alone.
        max_depth: forks inside forks; a deeper fork is refused.
        max_width: threads that write at once; a fork that would pass it is refused.
        max_pages: pages of one prompt, counted thread by thread and rounded up; forks beyond it are
            refused, and a thread that needs another page ends.
        max_seconds: from the start of `generate`; then every prompt finishes with what there is.

    Raises:
        TypeError, ValueError: not a number, or not above zero.
    """

    max_new_tokens: int = 4096
    max_thread_tokens: int | None = None
    max_fanout: int = 16
    max_depth: int = 8
    max_width: int = 64
    max_pages: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            seconds = field.name == "max_seconds"
            if isinstance(value, bool) or not isinstance(value, (int, float) if seconds else int):
                kind = "a number of seconds" if seconds else "an int"
                raise TypeError(f"{field.name}: expected {kind}, got {type(value).__name__}")
            if not value > 0:
                raise ValueError(f"{field.name}: expected more than 0, got {value}")
