"""The oracle of the cache: every branch is a plain list of tokens, and every verb copies lists.

No pages, no sharing, no references: only what the verbs mean. Branches are named by integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Union

import torch

from fork_attn.reference import attention, rerotate, step_mask
from fork_attn.rope import Rope

LayerKV = tuple[torch.Tensor, torch.Tensor]
"""One token's K (num_kv_heads, head_dim) and V (num_kv_heads, head_dim_v) of one layer."""


@dataclass(frozen=True, eq=False)
class Token:
    """One token. Its identity is the same in every branch that sees it, wherever it stands there."""

    identity: int
    position: int  # in the branch that holds it
    kv: Sequence[LayerKV] = ()
    written: int = 0  # the position that its keys are rotated to
    copied: bool = False  # its keys were turned to `written` after they had been written


@dataclass
class Watched:
    """What is seen of another branch: `seen`, and the other's tokens from `start` on."""

    other: int | None  # None: freed, all of it is in `seen`
    seen: list[Token]
    start: int
    lag: int
    rebase: bool


@dataclass(frozen=True, eq=False)
class Place:
    """Where a watch stands in a context, and the position there."""

    watch: Watched
    position: int


Item = Union[Token, Place]  # noqa: UP007 - a generic alias must exist at run time


@dataclass
class _Branch:
    items: list[Item] = field(default_factory=list)
    position: int = 0
    parent: int | None = None

    @property
    def tokens(self) -> list[Token]:
        return [item for item in self.items if isinstance(item, Token)]


def _cut(items: Sequence[Item], length: int) -> list[Item]:
    """The first `length` tokens, and the watches among and right behind them."""
    kept: list[Item] = []
    for item in items:
        if isinstance(item, Token):
            if length == 0:
                break
            length -= 1
        kept.append(item)
    return kept


def _moved(item: Item, shift: int) -> Item:
    return replace(item, position=item.position + shift)


@dataclass(frozen=True)
class Rows:
    """The tokens that a step adds to one branch: plain, or a draft tree of which `path` is kept."""

    tokens: Sequence[Token]  # positions are set by the cache
    parents: Sequence[int] | None = None
    path: Sequence[int] = ()


class DeepCopyCache:
    """What a `ForkedKVCache` means. Arguments are taken to be valid; errors are the cache's own.

    Args:
        ropes: of each layer; needed where tokens are seen at other positions than written.
    """

    def __init__(self, ropes: Sequence[Rope] = ()) -> None:
        self.branches: dict[int, _Branch] = {}
        self.ropes = tuple(ropes)
        self._next = 0

    def _add(self, branch: _Branch) -> int:
        self.branches[self._next] = branch
        self._next += 1
        return self._next - 1

    def tokens(self, branch: int) -> list[Token]:
        """A branch's own context, in order: without what it watches."""
        return self.branches[branch].tokens

    def places(self, branch: int) -> list[Place]:
        """Where a branch watches others."""
        return [item for item in self.branches[branch].items if isinstance(item, Place)]

    def position(self, branch: int) -> int:
        """Position of a branch's next token."""
        return self.branches[branch].position

    def is_watched(self, branch: int) -> bool:
        """Whether a live branch watches this one."""
        return any(p.watch.other == branch for b in self.branches for p in self.places(b))

    def new_branch(self) -> int:
        """An empty context."""
        return self._add(_Branch())

    def fork(self, branch: int, n: int = 1) -> list[int]:
        """`n` copies of a branch, its children."""
        b = self.branches[branch]
        return [self._add(_Branch(list(b.items), b.position, branch)) for _ in range(n)]

    def fork_at(self, branch: int, length: int) -> int:
        """A child that sees the first `length` tokens."""
        (child,) = self.fork(branch)
        self.crop(child, length)
        return child

    def shown(self, watch: Watched) -> list[Token]:
        """What a watch shows between steps, at the positions of the branch that wrote it."""
        live = [] if watch.other is None else self.tokens(watch.other)[watch.start :]
        return [*watch.seen, *live]

    def view(
        self, branch: int, rows: Mapping[int, Rows] | None = None, row: int = 0
    ) -> tuple[list[Token], int]:
        """What a branch sees, each token at its position in the view.

        Args:
            branch: the branch.
            rows: of a step; its new tokens are seen by those that watch their branches.
            row: which of the branch's own rows looks.

        Returns:
            The tokens, without those that the branch itself adds; and by how much the watched
            tokens move what the branch adds.
        """
        blocks = {}
        for place in self.places(branch):
            block, other = self.shown(place.watch), place.watch.other
            if rows and other is not None and other in rows:
                block += self.place(other, rows[other])[: max(0, row - place.watch.lag + 1)]
            blocks[place] = block
        spans = {p: _span(block) if p.watch.rebase else (0, 0) for p, block in blocks.items()}
        total = sum(end - first for first, end in spans.values())
        seen: list[Token] = []
        moved = 0
        for item in self.branches[branch].items:
            if isinstance(item, Token):
                seen.append(replace(item, position=item.position + moved))
                continue
            first, end = spans[item]
            by = item.position + moved - first if item.watch.rebase else total
            seen += [replace(t, position=t.position + by) for t in blocks[item]]
            moved += end - first
        return seen, total

    def place(self, branch: int, rows: Rows) -> list[Token]:
        """The tokens of a step's rows, at the positions that they get: one after the other, or by
        depth in a draft tree."""
        first = self.position(branch)
        placed: list[Token] = []
        for i, token in enumerate(rows.tokens):
            position = first + i
            if rows.parents is not None:
                parent = rows.parents[i]
                position = first if parent < 0 else placed[parent].position + 1
            placed.append(replace(token, position=position, written=position))
        return placed

    def step(self, rows: Mapping[int, Rows]) -> None:
        """Appends tokens to branches; of drafts the accepted path."""
        for branch, new in rows.items():
            placed = self.place(branch, new)
            kept = placed if new.parents is None else [placed[i] for i in new.path]
            b = self.branches[branch]
            b.items = [*b.items, *kept]
            b.position += len(kept)

    def attend(
        self,
        rows: Mapping[int, Rows],
        layer: int,
        q: torch.Tensor,
        *,
        window: int | None = None,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of a step's rows before it is committed, branch by branch.

        Args:
            rows: as in `step`.
            layer: whose K and V of each token.
            q: (T, num_q_heads, head_dim), rows in the order of `rows`.
            window, softmax_scale, softcap, sinks, dtype: see `step_mask` and `attention`.

        Returns:
            (out, lse) of `attention`, (T, ...).
        """
        results = []
        options = {"softmax_scale": softmax_scale, "softcap": softcap, "sinks": sinks}
        begin = 0
        for branch, new in rows.items():
            placed = self.place(branch, new)
            end = begin + len(placed)
            if self.places(branch) or any(t.position != t.written for t in self.tokens(branch)):
                for row in range(len(placed)):
                    one = self._attend_row(
                        branch, rows, row, layer, q[begin + row], window, options, dtype
                    )
                    results.append(one)
            else:
                past = self.tokens(branch)
                mask = step_mask(
                    [t.position for t in past],
                    [t.position for t in placed],
                    parents=new.parents,
                    window=window,
                )
                k, v = (torch.stack([t.kv[layer][i] for t in [*past, *placed]]) for i in (0, 1))
                results.append(attention(q[begin:end], k, v, mask, dtype=dtype, **options))
            begin = end
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def _attend_row(
        self,
        branch: int,
        rows: Mapping[int, Rows],
        row: int,
        layer: int,
        q: torch.Tensor,
        window: int | None,
        options: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One query over its whole view, every key turned to its place there."""
        new, rope = rows[branch], self.ropes[layer]
        placed = self.place(branch, new)
        seen, total = self.view(branch, rows, row)
        own = step_mask([], [t.position for t in placed], parents=new.parents)[row].tolist()
        seen += [
            replace(t, position=t.position + total)
            for t, visible in zip(placed, own, strict=True)
            if visible
        ]
        at = placed[row].position + total
        seen = [t for t in seen if window is None or at - t.position < window]
        k = [rerotate(t.kv[layer][0], t.position - t.written, rope, dtype) for t in seen]
        v = torch.stack([t.kv[layer][1] for t in seen])
        query = rerotate(q, total, rope, dtype)[None]
        mask = torch.ones(1, len(seen), dtype=torch.bool)
        return attention(query, torch.stack(k), v, mask, dtype=dtype, **options)

    def added(self, branch: int, children: Sequence[int]) -> list[list[Token]]:
        """What a join would add, child by child: what each sees and the branch does not yet."""
        held = {t.identity for t in self.view(branch)[0]}
        new: list[list[Token]] = []
        for child in children:
            own = [t for t in self.tokens(child) if t.identity not in held]
            held.update(t.identity for t in own)
            new.append(own)
        return new

    def conflict(self, branch: int, children: Sequence[int]) -> bool:
        """Whether a token stands at two positions in what a join would bring together."""
        watched = {t.identity for p in self.places(branch) for t in self.shown(p.watch)}
        held = {t.identity: t.position for t in self.tokens(branch)}
        for child in children:
            for t in self.tokens(child):
                if (
                    t.identity not in watched
                    and held.setdefault(t.identity, t.position) != t.position
                ):
                    return True
        return False

    def join(
        self,
        branch: int,
        children: Sequence[int],
        position: Literal["max", "sum"] | int = "max",
        rebase: bool | Literal["copy"] = False,
    ) -> None:
        """The union; the children are freed."""
        groups = self.added(branch, children)
        b = self.branches[branch]
        end = b.position
        if rebase:
            for i, own in enumerate(groups):
                first, past = _span(own)
                groups[i] = [replace(t, position=t.position + end - first) for t in own]
                end += past - first
        if rebase == "copy":
            groups = [[self._turned(t) for t in own] for own in groups]
        new = [t for own in groups for t in own]
        if isinstance(position, int):
            after = position
        elif position == "max":
            after = end if rebase else max(self.position(c) for c in [branch, *children])
        else:
            after = b.position + len(new)
        b.items = [*b.items, *new]
        b.position = after
        self.free(children)

    def _turned(self, token: Token) -> Token:
        """The token with its keys turned to where it stands."""
        shift = token.position - token.written
        if not shift:
            return token
        kv = [
            (rerotate(k, shift, rope, k.dtype), v)
            for (k, v), rope in zip(token.kv, self.ropes, strict=True)
        ]
        return replace(token, kv=kv, written=token.position, copied=True)

    def watch(self, branch: int, other: int, *, lag: int = 0, rebase: bool = True) -> None:
        """From now on the branch sees what the other one writes."""
        held = {t.identity for t in self.view(branch)[0]}
        seen = [t for t in self.tokens(other) if t.identity not in held]
        watch = Watched(other, seen, len(self.tokens(other)), lag, rebase)
        b = self.branches[branch]
        b.items = [*b.items, Place(watch, b.position)]

    def descendants(self, branch: int) -> list[int]:
        """Every live branch that was forked from this one, or from one of these."""
        below = []
        for other in self.branches:
            up = self.branches[other].parent
            while up is not None and up != branch:
                up = self.branches[up].parent
            if up == branch:
                below.append(other)
        return below

    def select(self, branch: int, child: int) -> None:
        """The branch takes the child's context; all its descendants are freed."""
        b, chosen = self.branches[branch], self.branches[child]
        b.items, b.position = list(chosen.items), chosen.position
        self.free(self.descendants(branch))

    def reorder(self, branches: Sequence[int], indices: Sequence[int]) -> None:
        """branches[i] continues branches[indices[i]]."""
        sources = [
            (list(self.branches[branches[i]].items), self.position(branches[i])) for i in indices
        ]
        for branch, (items, position) in zip(branches, sources, strict=True):
            self.branches[branch].items = items
            self.branches[branch].position = position

    def crop(self, branch: int, length: int) -> None:
        """Keeps the first `length` tokens; the next position follows the last of them."""
        b = self.branches[branch]
        b.items = _cut(b.items, length)
        b.position = b.tokens[-1].position + 1 if b.tokens else 0

    def excise(self, branch: int, start: int, end: int, rebase: bool = False) -> None:
        """Drops the tokens [start, end), and watches strictly between; with `rebase` what follows
        moves to the place of token `start`."""
        b = self.branches[branch]
        if start == end:
            return
        before = b.tokens
        after = before[end].position if end < len(before) else b.position
        shift = before[start].position - after if rebase else 0
        kept = _cut(b.items, start)
        count = 0
        for item in b.items:
            count += isinstance(item, Token)
            if count > end or (isinstance(item, Place) and count >= end):
                kept.append(_moved(item, shift))
        b.items = kept
        b.position += shift

    def set_position(self, branch: int, position: int) -> None:
        """The next token's position."""
        self.branches[branch].position = position

    def free(self, branches: Sequence[int]) -> None:
        """Forgets branches; descendants of a freed one stay descendants of its ancestors."""
        for branch in list(branches):
            for other in self.branches:
                for place in self.places(other):
                    if place.watch.other == branch:
                        place.watch.seen = self.shown(place.watch)
                        place.watch.other = None
            gone = self.branches.pop(branch)
            for other in self.branches.values():
                if other.parent == branch:
                    other.parent = gone.parent


def _span(tokens: Sequence[Token]) -> tuple[int, int]:
    """First position and the one past the last; (0, 0) of nothing."""
    positions = [t.position for t in tokens]
    return (min(positions), max(positions) + 1) if positions else (0, 0)
