"""Adaptive parallel reasoning: models that fork their thinking into threads and join it again."""

from __future__ import annotations

from fork_attn.reason.trace import (
    Event,
    Injection,
    Span,
    StepRecord,
    ThreadRecord,
    Trace,
    Watching,
)

__all__ = ["Event", "Injection", "Span", "StepRecord", "ThreadRecord", "Trace", "Watching"]
