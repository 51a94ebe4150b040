"""Step: one model forward for any set of branches, reserved at once, committed or rolled back as a
whole."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from fork_attn import ops_cache, ops_flash, ops_triton
from fork_attn.checks import integer
from fork_attn.device_step import STEP_TENSORS, upload_step
from fork_attn.errors import StalePlan
from fork_attn.plan import Plan, PlanShape, build_plan

if TYPE_CHECKING:
    from types import TracebackType

    from fork_attn.branch import Branch
    from fork_attn.cache import ForkedKVCache


@dataclass(frozen=True)
class Draft:
    """A tree of draft tokens behind a branch, verified in one step (SpecInfer, arXiv 2305.09781).

    Attributes:
        parents: parents[i] < i is the token that draft token i follows; -1 means the branch's end.
    """

    parents: Sequence[int]

    def __post_init__(self) -> None:
        try:
            parents = tuple(operator.index(p) for p in self.parents)
        except TypeError:
            raise TypeError(f"parents: expected a sequence of ints, got {self.parents!r}") from None
        for i, parent in enumerate(parents):
            if not -1 <= parent < i:
                raise ValueError(
                    f"parents: expected -1 <= parents[i] < i, got parents[{i}] = {parent}"
                )
        object.__setattr__(self, "parents", parents)


class Step:
    """Slots for new tokens of some branches, and the plan that every layer's attention follows.

    Made by `ForkedKVCache.step`. As a context manager it commits on leaving and rolls back on an
    exception. T is the number of its tokens (rows), n of its branches; rows stand in the order of
    the mapping it was made from.

    Attributes:
        branches: the n branches, in row order.
        num_tokens: T.
        state: "open", "committed" or "rolled_back".
        position_ids: (T,) int64, position of each row.
        slot_mapping: (T,) int64, where each row's K and V go: page * page_size + slot.
        cu_seqlens_q: (n+1,) int32, each branch's first row, and T.
        seqlens_k: (n,) int32, tokens of each branch's context once the step commits (all of a
            draft's counted, none that it watches).
        last_indices: (n,) int64, each branch's last row.

    The tensors lie on the cache's device. On a GPU they are sent there with the plans, in one
    upload, when one of them is first asked for.
    """

    branches: tuple[Branch, ...]
    num_tokens: int
    state: Literal["open", "committed", "rolled_back"]

    def __init__(
        self, cache: ForkedKVCache, tokens: Mapping[Branch, int | Draft], num_tokens: int
    ) -> None:
        self._cache = cache
        self._num_moved = 0  # accepted draft tokens that lie where commit wants them
        self._tables: ops_flash.Tables | None = None
        self._plans: dict[tuple[int | None, PlanShape], Plan] = {}
        self._tokens = tokens
        self.branches = tuple(tokens)
        self.num_tokens = num_tokens
        self.state = "open"
        if not cache._resident:
            self._fill()

    def _fill(self) -> None:
        """Writes the step's tensors: at once on the CPU; with the plans, in one upload, when one is
        first asked for on a device where page lists stay."""
        self._require_open("step")
        cache, n, num_tokens = self._cache, len(self.branches), self.num_tokens
        if cache._resident:
            tensors, self._plans = upload_step(cache, num_tokens, n)
            self.__dict__.update(tensors)
            self._record_streams()
            return
        wide = torch.empty(2 * num_tokens + n, dtype=torch.int64)
        narrow = torch.empty(2 * n + 1, dtype=torch.int32)
        at, narrow_at = wide.data_ptr(), narrow.data_ptr()
        cache._core.fill_step(
            at, at + 8 * num_tokens, at + 16 * num_tokens, narrow_at, narrow_at + 4 * (n + 1)
        )
        self._host_rows = wide
        if cache.device.type == "cuda":
            wide, narrow = cache._storage.sent(wide), cache._storage.sent(narrow)
        self.position_ids, self.slot_mapping, self.last_indices = wide.split(
            (num_tokens, num_tokens, n)
        )
        self.cu_seqlens_q, self.seqlens_k = narrow.split((n + 1, n))
        self._record_streams()

    def _counts(self) -> list[int]:
        """Rows of each branch, which a GPU need not be asked for."""
        new = self._tokens.values()
        return [len(n.parents) if isinstance(n, Draft) else int(n) for n in new]

    def _record_streams(self) -> None:
        """What the step has on the device outlives what is queued on the cache's streams."""
        streams = self._cache._streams
        if not streams:
            return
        streams.record(*(self.__dict__[name] for name in STEP_TENSORS if name in self.__dict__))
        for plan in self._plans.values():
            streams.record(*ops_triton.memory(plan))

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in STEP_TENSORS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._fill()
        tensor: torch.Tensor = self.__dict__[name]
        return tensor

    def __repr__(self) -> str:
        return f"Step({self.num_tokens} tokens of {len(self.branches)} branches, {self.state})"

    def __enter__(self) -> Step:
        self._require_open("step")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.state != "open":
            return
        if kind is None:
            self.commit()
        else:
            self.rollback()

    def __del__(self) -> None:
        if getattr(self, "state", None) == "open":
            self.rollback()

    @property
    def plan(self) -> Plan:
        """The plan of layer 0."""
        return self.plan_for(0)

    def plan_for(self, layer_idx: int) -> Plan:
        """The plan of a layer: one for each distinct sliding window and GQA group, built on first
        use.

        Raises:
            ValueError: no such layer.
            StalePlan: the step is closed.
        """
        cache = self._cache
        layer = cache._layer(layer_idx)
        shape = layer.plan_shape(cache.dtype)
        key = (layer.window, shape)
        if key not in self._plans:
            self._require_open("plan_for")
            if cache._resident:
                self._fill()  # again, where a first write showed other heads than were announced
            else:
                self._plans[key] = build_plan(
                    cache._core,
                    layer.window,
                    shape,
                    cache.page_size,
                    cache._target,
                    cache.num_workers,
                    cache.batch_invariant,
                )
        return self._plans[key]

    def _flash_tables(self) -> ops_flash.Tables:
        """Dense page tables of the step's branches, made once.

        Raises:
            NotDense, Unsupported: see `ops_flash.step_tables`.
        """
        if self._tables is None:
            self._require_open("attend")
            cache, n = self._cache, self.num_tokens
            self._tables = ops_flash.step_tables(
                cache._core,
                [branch._handle for branch in self.branches],
                self._counts(),
                self._host_rows[n : 2 * n].tolist(),
                cache.page_size,
            ).to(cache.device)
        return self._tables

    def accept(self, path: Sequence[int], branch: Branch | None = None) -> None:
        """Keeps the draft tokens `path` of a branch when the step commits; all others are dropped.

        At most the part of the path that does not lie in place yet is moved, once, in every layer.
        A draft that nobody accepts is dropped whole.

        Args:
            path: draft tokens from the branch's end on, each the parent of the next; may be empty.
            branch: whose draft; not needed where the step has one draft only.

        Raises:
            ValueError: no chain of the draft, or accepted before; or `branch` does not draft in
                this step.
            StalePlan: the step is closed.
        """
        self._require_open("accept")
        core = self._cache._core
        if branch is None:
            drafts = core.draft_rows()
            if len(drafts) != 1:
                raise ValueError(f"branch: expected one, as the step has {len(drafts)} drafts")
            row = drafts[0]
        elif branch in self.branches:
            row = self.branches.index(branch)
        else:
            raise ValueError(f"branch: expected one of this step's, got {branch!r}")
        core.accept(row, [integer("path", token, low=-(2**31)) for token in path])

    def commit(self) -> None:
        """Makes the new tokens part of their branches' contexts.

        Raises:
            StalePlan: the step is closed.
        """
        self._require_open("commit")
        core = self._cache._core
        if self._num_moved < len(core.step_moves()):
            core.enter()  # not while another thread attends
            try:
                self._move(core.step_moves())
            finally:
                core.leave()
        core.commit_step()
        self.state = "committed"
        self._cache._books.freed()

    def _move(self, moves: list[tuple[int, int]]) -> None:
        """Moves accepted draft tokens, as many at once as a GPU can; a second try goes on where the
        first one failed. No token moves to where a later one of its path is still to be read."""
        while self._num_moved < len(moves):
            some = moves[self._num_moved : self._num_moved + ops_cache.MAX_MOVES]
            self._cache._storage.move_slots(some)
            self._num_moved += len(some)

    def rollback(self) -> None:
        """Gives the reserved slots back; every branch is as it was before the step.

        Raises:
            StalePlan: the step is closed.
        """
        self._require_open("rollback")
        self._cache._core.rollback_step()
        self.state = "rolled_back"
        self._cache._books.freed()

    def _require_open(self, verb: str) -> None:
        if self.state != "open":
            raise StalePlan(f"{verb}: expected an open step, got one that is {self.state}")
