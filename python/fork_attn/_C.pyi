"""Host core and CPU kernels (csrc/bindings). Handles are branch ids shifted left by 32, plus a slot
number."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_Paged = tuple[int, int, int, int]  # pointer; strides of page, slot and head in elements
_Rows = tuple[int, int, int]  # pointer; strides of row and head in elements
_Where = tuple[int, int]  # device and stream; (-1, 0) for the CPU
_Shape = tuple[int, int, int, int, int]  # rows, heads, head_dim, head_dim_v, page_size
_Rope = tuple[int, int, int, int, int, bool]  # cos, sin, table rows; rotary_dim, start; interleaved
_Scales = tuple[int, int]  # of K and of V, or 0

class PlanData:
    """One plan; its buffer protocol gives the int64 words of csrc/core/plan.h."""

    @property
    def page_limit(self) -> int: ...
    @property
    def rotations(self) -> tuple[int, int]:
        """First word and number of the plan's rotations, one word each."""
    @property
    def cost_ns(self) -> float: ...
    @property
    def span_ns(self) -> list[float]: ...
    @property
    def counts(self) -> dict[str, int]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def target_costs(name: str, /) -> dict[str, float]: ...

class CacheCore:
    def __init__(self, num_pages: int, page_size: int, copy_tails: bool) -> None: ...
    def enter(self) -> None: ...
    def leave(self) -> None: ...
    def new_branch(self) -> int: ...
    def fork(self, branch: int, n: int, /) -> list[int]: ...
    def fork_at(self, branch: int, length: int, /) -> int: ...
    def join(
        self,
        branch: int,
        children: Sequence[int],
        mode: str,
        position: int,
        rebase: bool,
        copy: Callable[[list[tuple[int, int, int]]], None] | None,
        /,
    ) -> None: ...
    def watch(self, branch: int, other: int, lag: int, rebase: bool, /) -> None: ...
    def select(self, branch: int, child: int, /) -> list[int]: ...
    def reorder(self, branches: Sequence[int], indices: Sequence[int], /) -> None: ...
    def crop(self, branch: int, length: int, /) -> None: ...
    def take_back(self, branch: int, length: int, position: int, /) -> None: ...
    def excise(self, branch: int, start: int, end: int, rebase: bool, /) -> None: ...
    def set_position(self, branch: int, position: int, /) -> None: ...
    def free(self, branches: Sequence[int], /) -> None: ...
    def alive(self, branch: int, /) -> bool: ...
    def length(self, branch: int, /) -> int: ...
    def position(self, branch: int, /) -> int: ...
    def num_pages(self, branch: int, /) -> int: ...
    def parent_id(self, branch: int, /) -> int: ...
    def slots(self, branch: int, /) -> list[int]: ...
    def positions(self, branch: int, /) -> list[int]: ...
    def page_table(self, branch: int, /) -> list[int]: ...
    def context(self, branch: int, /) -> list[tuple[int, int, int, int]]: ...
    def view(self, branch: int, /) -> tuple[list[int], list[int]]: ...
    def watched(self, branch: int, /) -> list[int]: ...
    def stats(self) -> tuple[int, int, int, int, int, int, int]: ...
    def check(self) -> None: ...
    def digest(self) -> int: ...
    @property
    def step_open(self) -> bool: ...
    def open_step(
        self, tokens: Mapping[Any, Any], cache: Any, branch_type: type, draft_type: type, /
    ) -> tuple[int, int]: ...
    def fill_step(
        self,
        position_ids: int,
        slot_mapping: int,
        last_indices: int,
        cu_seqlens_q: int,
        seqlens_k: int,
        /,
    ) -> None: ...
    def step_copies(self) -> list[tuple[int, int]]: ...
    def step_moves(self) -> list[tuple[int, int]]: ...
    def draft_rows(self) -> list[int]: ...
    def accept(self, row: int, path: Sequence[int], /) -> None: ...
    def commit_step(self) -> None: ...
    def rollback_step(self) -> None: ...
    def build_plan(
        self, window: int, shape: tuple[int, int, int, int, int], target: str, workers: int, /
    ) -> PlanData: ...

def tree_attention_cpu(
    plan_ptr: int,
    q: _Rows,
    k_cache: _Paged,
    v_cache: _Paged,
    out: _Rows,
    lse_ptr: int,
    sinks_ptr: int,
    k_scale_ptr: int,
    v_scale_ptr: int,
    dtype: int,
    kv_dtype: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int,
    softmax_scale: float,
    softcap: float,
) -> None: ...
def store_kv(
    where: _Where,
    k: _Rows,
    v: _Rows,
    k_cache: _Paged,
    v_cache: _Paged,
    slots_ptr: int,
    scales: _Scales,
    rope: _Rope,
    shape: _Shape,
    dtypes: tuple[int, int],
    /,
) -> None: ...
def gather_kv(
    where: _Where,
    k_cache: _Paged,
    v_cache: _Paged,
    k: _Rows,
    v: _Rows,
    slots_ptr: int,
    scales: _Scales,
    shape: _Shape,
    dtypes: tuple[int, int],
    /,
) -> None: ...
def shift_rope(
    where: _Where,
    k_cache: _Paged,
    v_cache: _Paged,
    from_ptr: int,
    to_ptr: int,
    rope: _Rope,
    shape: _Shape,
    dtype: int,
    /,
) -> None: ...
def copy_pages(
    where: _Where,
    caches: Sequence[tuple[int, int, int]],
    from_ptr: int,
    to_ptr: int,
    count: int,
    /,
) -> None: ...
def move_slots(
    where: _Where,
    caches: Sequence[tuple[int, int, int, int, int, int]],
    page_size: int,
    from_ptr: int,
    to_ptr: int,
    count: int,
    /,
) -> None: ...
def merge_states_cuda(
    where: _Where,
    out_ptr: int,
    lse_ptr: int,
    dtype: int,
    num_states: int,
    rows: int,
    num_heads: int,
    dim: int,
    merged_out_ptr: int,
    merged_lse_ptr: int,
    /,
) -> None: ...
def merge_states_cpu(
    out_ptr: int,
    lse_ptr: int,
    num_states: int,
    rows: int,
    num_heads: int,
    dim: int,
    merged_out_ptr: int,
    merged_lse_ptr: int,
) -> None: ...
def build_info() -> dict[str, Any]: ...
def cuda_info() -> dict[str, Any]: ...
