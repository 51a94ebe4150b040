"""Attention kernels and a paged, copy-on-write KV cache for models that think in parallel threads.

The cache hands out branches. A branch forks without copying anything, several branches run in one
step, attention reads a shared prefix once for all of them, and a join continues over the children's
KV without prefilling it again.

`fork_attn.hf` attaches the cache to Hugging Face models. Nothing here imports Triton or
transformers.
"""

from fork_attn.branch import Branch
from fork_attn.cache import CacheStats, ForkedKVCache
from fork_attn.errors import (
    ConcurrentUse,
    DeviceError,
    DuplicateBranch,
    ForeignBranch,
    ForkAttnError,
    InvariantError,
    NotDense,
    OutOfPages,
    PlanCapacityExceeded,
    StaleBranch,
    StalePlan,
    StepOpen,
    Unsupported,
)
from fork_attn.ops import merge_states, tree_attention
from fork_attn.plan import Plan
from fork_attn.rope import Rope
from fork_attn.step import Draft, Step

__version__ = "0.1.0"

__all__ = [
    "Branch",
    "CacheStats",
    "ConcurrentUse",
    "DeviceError",
    "Draft",
    "DuplicateBranch",
    "ForeignBranch",
    "ForkAttnError",
    "ForkedKVCache",
    "InvariantError",
    "NotDense",
    "OutOfPages",
    "Plan",
    "PlanCapacityExceeded",
    "Rope",
    "StaleBranch",
    "StalePlan",
    "Step",
    "StepOpen",
    "Unsupported",
    "__version__",
    "merge_states",
    "tree_attention",
]
