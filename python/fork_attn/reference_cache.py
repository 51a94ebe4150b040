"""The oracle of the cache: every branch is a plain list of tokens, and every verb copies lists.

No pages, no sharing, no references: only what the verbs mean. Branches are named by integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from fork_attn.reference import attention, step_mask

LayerKV = tuple[torch.Tensor, torch.Tensor]
"""One token's K (num_kv_heads, head_dim) and V (num_kv_heads, head_dim_v) of one layer."""


@dataclass(frozen=True, eq=False)
class Token:
    """One token, the same object in every branch that sees it."""

    identity: int
    position: int
    kv: Sequence[LayerKV] = ()


@dataclass
class _Branch:
    tokens: list[Token] = field(default_factory=list)
    position: int = 0
    parent: int | None = None


@dataclass(frozen=True)
class Rows:
    """The tokens that a step adds to one branch: plain, or a draft tree of which `path` is kept."""

    tokens: Sequence[Token]  # positions are set by the cache
    parents: Sequence[int] | None = None
    path: Sequence[int] = ()


class DeepCopyCache:
    """What a `ForkedKVCache` means. Arguments are taken to be valid; errors are the cache's own."""

    def __init__(self) -> None:
        self.branches: dict[int, _Branch] = {}
        self._next = 0

    def _add(self, branch: _Branch) -> int:
        self.branches[self._next] = branch
        self._next += 1
        return self._next - 1

    def tokens(self, branch: int) -> list[Token]:
        """What a branch sees, in context order."""
        return self.branches[branch].tokens

    def position(self, branch: int) -> int:
        """Position of a branch's next token."""
        return self.branches[branch].position

    def new_branch(self) -> int:
        """An empty context."""
        return self._add(_Branch())

    def fork(self, branch: int, n: int = 1) -> list[int]:
        """`n` copies of a branch, its children."""
        b = self.branches[branch]
        return [self._add(_Branch(list(b.tokens), b.position, branch)) for _ in range(n)]

    def fork_at(self, branch: int, length: int) -> int:
        """A child that sees the first `length` tokens."""
        (child,) = self.fork(branch)
        self.crop(child, length)
        return child

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
            placed.append(replace(token, position=position))
        return placed

    def step(self, rows: Mapping[int, Rows]) -> None:
        """Appends tokens to branches; of drafts the accepted path."""
        for branch, new in rows.items():
            placed = self.place(branch, new)
            kept = placed if new.parents is None else [placed[i] for i in new.path]
            b = self.branches[branch]
            b.tokens = [*b.tokens, *kept]
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
        begin = 0
        for branch, new in rows.items():
            past, placed = self.tokens(branch), self.place(branch, new)
            mask = step_mask(
                [t.position for t in past],
                [t.position for t in placed],
                parents=new.parents,
                window=window,
            )
            k, v = (torch.stack([t.kv[layer][i] for t in [*past, *placed]]) for i in (0, 1))
            end = begin + len(placed)
            options = {"softmax_scale": softmax_scale, "softcap": softcap}
            part = attention(q[begin:end], k, v, mask, sinks=sinks, dtype=dtype, **options)
            results.append(part)
            begin = end
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def added(self, branch: int, children: Sequence[int]) -> list[Token]:
        """What a join would add: what each child sees and the context does not hold yet."""
        held = {t.identity for t in self.tokens(branch)}
        new: list[Token] = []
        for child in children:
            for token in self.tokens(child):
                if token.identity not in held:
                    held.add(token.identity)
                    new.append(token)
        return new

    def join(
        self,
        branch: int,
        children: Sequence[int],
        position: Literal["max", "sum"] | int = "max",
    ) -> None:
        """The union; the children are freed."""
        new = self.added(branch, children)
        b = self.branches[branch]
        if isinstance(position, int):
            after = position
        elif position == "max":
            after = max(self.position(c) for c in [branch, *children])
        else:
            after = b.position + len(new)
        b.tokens = [*b.tokens, *new]
        b.position = after
        self.free(children)

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
        b.tokens, b.position = list(chosen.tokens), chosen.position
        self.free(self.descendants(branch))

    def reorder(self, branches: Sequence[int], indices: Sequence[int]) -> None:
        """branches[i] continues branches[indices[i]]."""
        sources = [(list(self.tokens(branches[i])), self.position(branches[i])) for i in indices]
        for branch, (tokens, position) in zip(branches, sources, strict=True):
            self.branches[branch].tokens = tokens
            self.branches[branch].position = position

    def crop(self, branch: int, length: int) -> None:
        """Keeps the first `length` tokens; the next position follows the last of them."""
        b = self.branches[branch]
        b.tokens = b.tokens[:length]
        b.position = b.tokens[-1].position + 1 if b.tokens else 0

    def excise(self, branch: int, start: int, end: int) -> None:
        """Drops the tokens [start, end); positions stay as they are."""
        b = self.branches[branch]
        b.tokens = b.tokens[:start] + b.tokens[end:]

    def set_position(self, branch: int, position: int) -> None:
        """The next token's position."""
        self.branches[branch].position = position

    def free(self, branches: Sequence[int]) -> None:
        """Forgets branches; descendants of a freed one stay descendants of its ancestors."""
        for branch in list(branches):
            gone = self.branches.pop(branch)
            for other in self.branches.values():
                if other.parent == branch:
                    other.parent = gone.parent
