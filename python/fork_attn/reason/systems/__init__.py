"""The published systems as protocols. Importing this registers them all."""

from __future__ import annotations

from fork_attn.reason.systems.detached import Detached, SkeletonOfThought
from fork_attn.reason.systems.messages import Calls, LeaP
from fork_attn.reason.systems.parathinker import ParaThinker
from fork_attn.reason.systems.promises import Promises
from fork_attn.reason.systems.published import multiverse, npr, threadweaver
from fork_attn.reason.systems.selection import BestOfN, FirstFinish, SelfConsistency
from fork_attn.reason.systems.tags import TagProtocol
from fork_attn.reason.systems.tree import BestFirst, TreeOfThoughts
from fork_attn.reason.systems.watching import GroupThink, Hogwild

__all__ = [
    "BestFirst",
    "BestOfN",
    "Calls",
    "Detached",
    "FirstFinish",
    "GroupThink",
    "Hogwild",
    "LeaP",
    "ParaThinker",
    "Promises",
    "SelfConsistency",
    "SkeletonOfThought",
    "TagProtocol",
    "TreeOfThoughts",
    "multiverse",
    "npr",
    "threadweaver",
]
