"""Interrupts (Ctrl-C) that wait for a safe point."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Deferred:
    """A context within which a first SIGINT waits; it is handled on leaving. A second one is not
    held back.

    An interrupt may otherwise strike between any two instructions, in the middle of a cache's
    bookkeeping too. Outside the main thread, and where SIGINT has no Python handler, nothing is
    changed.
    """

    def __enter__(self) -> Deferred:
        self._caught: tuple[int, FrameType | None] | None = None
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                self._before = before
                signal.signal(signal.SIGINT, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            return
        signal.signal(signal.SIGINT, self._before)
        if self._caught is not None:
            self._before(*self._caught)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._caught is not None:
            self._before(number, frame)
        self._caught = (number, frame)
