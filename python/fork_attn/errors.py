"""Typed errors. Each message names the argument, what was expected and what was got."""

from __future__ import annotations


class ForkAttnError(Exception):
    """Base class of every error that is specific to fork-attn.

    Wrong shapes, dtypes, devices and ranges raise plain `ValueError` or `TypeError` instead.
    """


class StaleBranch(ForkAttnError):
    """The branch was freed, or consumed by a join or select."""


class OutOfPages(ForkAttnError):
    """The pool has fewer free pages than the call needs; nothing was changed.

    Attributes:
        needed: pages that the call needs.
        free: pages that are free now.
        pending: pages freed but still in use by queued device work.
    """

    def __init__(self, message: str, needed: int = 0, free: int = 0, pending: int = 0) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free
        self.pending = pending


class DuplicateBranch(ForkAttnError):
    """The same branch was given twice in one call."""


class ForeignBranch(ForkAttnError):
    """The branch belongs to another cache."""


class StepOpen(ForkAttnError):
    """A mutating call was made while a step is open."""


class NotDense(ForkAttnError):
    """The branch's context cannot be written as one dense page table."""


class StalePlan(ForkAttnError):
    """The plan's step is closed, or the plan belongs to another cache."""


class PlanCapacityExceeded(ForkAttnError):
    """A plan does not fit into the fixed-capacity buffers it was to be copied into."""


class ConcurrentUse(ForkAttnError):
    """Two threads entered one cache at once."""


class Unsupported(ForkAttnError):
    """What was asked for cannot be done by the model, backend or device named in the message."""


class DeviceError(ForkAttnError):
    """A CUDA call failed; the message has the kernel's name and the driver's reason."""


class InvariantError(ForkAttnError):
    """The cache's bookkeeping contradicts itself: a bug in fork-attn, or memory corruption."""
