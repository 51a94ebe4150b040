"""Branch: a handle on one thread of reasoning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from fork_attn.checks import integer
from fork_attn.errors import ForeignBranch

if TYPE_CHECKING:
    from types import TracebackType

    from fork_attn.cache import ForkedKVCache


class Branch:
    """One thread: a context that it shares with other branches, and the position of its next token.

    Branches come from `ForkedKVCache.new_branch`, `Branch.fork` and `Branch.fork_at`. They hash by
    identity. A branch that is freed, or consumed by a join or select, raises `StaleBranch` from
    then on; one that is dropped is freed at the cache's next verb; `with branch:` frees it on
    leaving.

    Every verb validates first and then cannot fail: after an error nothing has changed. While a
    step is open every verb raises `StepOpen`.
    """

    __slots__ = ("__weakref__", "_handle", "cache")

    cache: ForkedKVCache
    _handle: int

    def __init__(self) -> None:
        raise TypeError(
            "Branch: made by ForkedKVCache.new_branch(), fork() and fork_at(), not directly"
        )

    def __enter__(self) -> Branch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.alive:
            self.free()

    def __del__(self) -> None:
        cache = getattr(self, "cache", None)
        if cache is not None:
            cache._books.drop(self._handle)

    def __repr__(self) -> str:
        if not self.alive:
            return f"Branch(id={self.id}, freed)"
        return f"Branch(id={self.id}, length={self.length}, position={self.position})"

    @property
    def id(self) -> int:
        """A number that no other branch of the cache ever has."""
        return self._handle >> 32

    @property
    def alive(self) -> bool:
        """Whether the branch can still be used."""
        return self.cache._core.alive(self._handle)

    @property
    def length(self) -> int:
        """Number of tokens that the branch sees."""
        return self.cache._core.length(self._handle)

    @property
    def num_pages(self) -> int:
        """Number of pages that hold the tokens the branch sees, shared ones included."""
        return self.cache._core.num_pages(self._handle)

    @property
    def position(self) -> int:
        """Position of the next token.

        Settable to any value >= 0; the next token then starts a new run of pages.
        """
        return self.cache._core.position(self._handle)

    @position.setter
    def position(self, value: int) -> None:
        self.cache._books.verb().set_position(self._handle, integer("position", value, low=0))

    @property
    def positions(self) -> torch.Tensor:
        """(length,) int64: position of every visible token, in context order."""
        return torch.tensor(self.cache._core.positions(self._handle), dtype=torch.int64)

    def fork(self, n: int = 1) -> list[Branch]:
        """`n` branches with the same context; this one may go on too. Costs O(n), whatever the
        length; copies nothing.

        Raises:
            ValueError: `n` < 1.
        """
        cache = self.cache
        return [
            make_branch(cache, handle)
            for handle in cache._books.verb().fork(self._handle, integer("n", n, low=1))
        ]

    def fork_at(self, length: int) -> Branch:
        """A branch that sees the first `length` tokens of this one's context; its position follows
        the last of them.

        Raises:
            ValueError: `length` is not within 0 to this branch's length.
        """
        cache = self.cache
        return make_branch(
            cache, cache._books.verb().fork_at(self._handle, integer("length", length, low=0))
        )

    def join(
        self,
        children: Sequence[Branch],
        *,
        position: Literal["max", "sum"] | int = "max",
        rebase: bool | Literal["copy"] = False,
    ) -> None:
        """The context becomes the union of this branch's and the children's; the children are
        freed. Copies nothing unless `rebase="copy"`.

        The order is: what this branch sees, then what each child sees and the context does not hold
        yet, child by child. The children keep the positions they were written at, as in Multiverse
        (arXiv 2506.09991), or are laid end to end with `rebase`.

        Args:
            children: other live branches of the same cache.
            position: where this branch goes on. "max": at the largest position of parent and
                children (Multiverse, NPR, ParaThinker). "sum": at its own position plus the number
                of tokens that the join adds (ASPD).
                An int: there.
            rebase: what each child adds is moved as a whole, so that its first position follows
                the last of what came before; "max" is then the end of the last child. True: no
                byte is moved, from then on queries that see these tokens are turned instead.
                "copy": they are copied to fresh pages, with their keys turned.

        Raises:
            ValueError: no children, this branch among them, a bad `position` or `rebase`, a token
                that stands at two positions, or a branch that another one watches; with "copy", a
                current stream that is neither the cache's own nor announced.
            OutOfPages: with `rebase="copy"`, the pool cannot hold the copies.
            Unsupported: with `rebase`, the cache's RoPE is not known or forbids it.
            DuplicateBranch, ForeignBranch, StaleBranch: what their names say of a child.
        """
        cache = self.cache
        handles = handles_of(cache, "children", children)
        if rebase not in (False, True, "copy"):
            raise ValueError(f"rebase: expected False, True or 'copy', got {rebase!r}")
        if isinstance(position, str) and position not in ("max", "sum"):
            raise ValueError(f"position: expected 'max', 'sum' or an int, got {position!r}")
        given = 0 if isinstance(position, str) else integer("position", position, low=0)
        if rebase:
            cache._require_ropes("join(rebase=...)")
        copy = cache._storage.copy_shifted if rebase == "copy" else None
        mode = position if isinstance(position, str) else "given"
        core = cache._books.verb()
        if rebase == "copy" and not core.step_open:
            cache._streams.require_current("join")  # it writes pages
            cache._books.reclaim()
        core.join(self._handle, handles, mode, given, bool(rebase), copy)
        cache._books.forget(handles)
        cache._books.freed()

    def watch(self, other: Branch, *, lag: int = 0, rebase: bool = True) -> None:
        """From now on this branch also sees what `other` sees and it does not, and what `other`
        goes on to write, while it writes it (Hogwild! Inference, arXiv 2504.06261; Group Think,
        arXiv 2505.11107). Copies nothing.

        Row i of a step sees all that `other` wrote in earlier steps, and of its new rows in the
        same step those with j <= i - lag. The watch stands where it is made: behind the tokens that
        this branch sees now and before those that it writes later, which move on in its view as
        `other` grows. `length`, `positions` and `position`, and the steps' `position_ids`, leave
        watched tokens out; keys stay where they were written, and queries are turned instead. Forks
        inherit watches. When `other` is freed, what it had written stays visible.

        Args:
            other: another live branch of the same cache; two may watch each other. While it is
                watched it can only grow, fork, watch and be freed.
            lag: how many rows of the same step stay hidden; more than a step's rows: all of them.
            rebase: True lays the watched tokens end to end with what stands before them (Hogwild!).
                False leaves them at the positions at which `other` wrote them (Group Think, where
                each branch has a range of positions of its own), and nothing moves.

        Raises:
            ValueError: `other` is this branch, or watched by it already, or a bad `lag`.
            StaleBranch, ForeignBranch, StepOpen: what their names say.
            Unsupported: with `rebase`, the cache's RoPE is not known or forbids it.
        """
        cache = self.cache
        (handle,) = handles_of(cache, "other", [other])
        low = integer("lag", lag, low=0)
        if not isinstance(rebase, bool):
            raise TypeError(f"rebase: expected a bool, got {type(rebase).__name__}")
        if rebase:
            cache._require_ropes("watch")
        cache._books.verb().watch(self._handle, handle, low, rebase)

    def select(self, child: Branch) -> None:
        """The branch takes the context of `child`, and every branch forked from it, `child`
        included, is freed.

        For best-of-N, tree search and first-to-finish: the losers' pages return at once.

        Raises:
            ValueError: `child` was not forked from this branch or from its descendants.
        """
        cache = self.cache
        (handle,) = handles_of(cache, "child", [child])
        cache._books.forget(cache._books.verb().select(self._handle, handle))
        cache._books.freed()

    def crop(self, length: int) -> None:
        """Keeps the first `length` tokens of the context, across forks and joins; position follows
        the last of them.

        Raises:
            ValueError: `length` is not within 0 to the branch's length.
        """
        self.cache._books.verb().crop(self._handle, integer("length", length, low=0))
        self.cache._books.freed()

    def _take_back(self, length: int, position: int) -> None:
        """Undoes steps that made the branch longer, even if another one watches it."""
        self.cache._books.verb().take_back(self._handle, length, position)

    def excise(self, start: int, end: int, *, rebase: bool = False) -> None:
        """Drops the tokens [start, end) of the context (TIM, arXiv 2507.16784).

        Args:
            start, end: in context order.
            rebase: all that follows, and `position`, move back as a whole, so that the first token
                that follows takes the place of token `start`. False: all keep their positions.

        Raises:
            ValueError: not 0 <= start <= end <= length, or a branch that another one watches.
            Unsupported: with `rebase`, the cache's RoPE is not known or forbids it.
        """
        low, high = integer("start", start, low=0), integer("end", end, low=0)
        if not isinstance(rebase, bool):
            raise TypeError(f"rebase: expected a bool, got {type(rebase).__name__}")
        if rebase:
            self.cache._require_ropes("excise(rebase=True)")
        self.cache._books.verb().excise(self._handle, low, high, rebase)
        self.cache._books.freed()

    def page_table(self) -> torch.Tensor:
        """(num_pages,) int32: the pages of the context in order, token t in slot t % page_size of
        entry t // page_size.

        What flash-attn's and FlashInfer's paged calls take. Under `tail="copy"` every branch has
        one unless its context was joined or excised, watches another branch, or its position was
        set in mid-page.

        Raises:
            NotDense: the context skips slots, or sees some at shifted positions.
        """
        return torch.tensor(self.cache._core.page_table(self._handle), dtype=torch.int32)

    def free(self) -> None:
        """Releases the branch; pages that no other branch sees return to the pool."""
        self.cache.free([self])


def make_branch(cache: ForkedKVCache, handle: int) -> Branch:
    """A Branch object for a handle of the core."""
    branch = Branch.__new__(Branch)
    branch.cache = cache
    branch._handle = handle
    cache._books.add(handle, branch)
    return branch


def handles_of(cache: ForkedKVCache, name: str, branches: Iterable[Branch]) -> list[int]:
    """The core's handles of the branches that an argument holds.

    Raises:
        TypeError: one is no branch.
        ForeignBranch: one belongs to another cache.
    """
    handles = []
    for branch in branches:
        if not isinstance(branch, Branch):
            raise TypeError(f"{name}: expected Branch, got {type(branch).__name__}")
        if branch.cache is not cache:
            raise ForeignBranch(f"{name}: branch {branch.id} belongs to another cache")
        handles.append(branch._handle)
    return handles
