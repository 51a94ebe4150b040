"""The published systems as protocols. Importing this registers them all."""

from __future__ import annotations

from fork_attn.reason.systems import published, selection
from fork_attn.reason.systems.published import multiverse, threadweaver
from fork_attn.reason.systems.selection import BestOfN
from fork_attn.reason.systems.tags import TagProtocol

__all__ = ["BestOfN", "TagProtocol", "multiverse", "published", "selection", "threadweaver"]
