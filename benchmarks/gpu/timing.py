"""Times of device work: cold L2, calls in turn, median and spread."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fork_attn.bench.timing import Call, Timer, Times


def measure(calls: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, Times]:
    """Runs all calls in turn, `rounds` times, with a cold L2."""
    return Timer(device, 0.0, min_rounds=rounds, max_rounds=rounds).measure(calls, cold=True)
