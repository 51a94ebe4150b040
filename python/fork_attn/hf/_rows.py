"""The rows of a ForkCache: which columns of a padded batch are stored, and where they go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fork_attn.branch import Branch
from fork_attn.errors import StaleBranch, Unsupported


@dataclass(eq=False, slots=True)
class Row:
    """A branch, and its padding: ranges [start, end) of the batch's columns not stored."""

    branch: Branch
    padding: list[tuple[int, int]] = field(default_factory=list)

    def num_stored(self, columns: int) -> int:
        """How many of the first `columns` columns are tokens of the branch."""
        return columns - sum(min(end, columns) - min(start, columns) for start, end in self.padding)

    def check_alive(self) -> None:
        if not self.branch.alive:
            raise StaleBranch("past_key_values: a row's branch was freed outside the ForkCache")

    def fork(self, n: int) -> list[Row]:
        if n == 0:
            return []
        return [Row(branch, list(self.padding)) for branch in self.branch.fork(n)]

    def append(self, columns: int, flags: Tensor) -> None:
        """Adds columns after the first `columns`; flags (seq,) bool says which are stored."""
        for i in (~flags).nonzero().flatten().tolist():
            start = columns + i
            if self.padding and self.padding[-1][1] == start:
                start = self.padding.pop()[0]
            self.padding.append((start, columns + i + 1))

    def crop(self, columns: int, kept: int) -> None:
        """Keeps the first `kept` of `columns` columns."""
        dropped = self.num_stored(columns) - self.num_stored(kept)
        if dropped:
            self.branch.crop(self.branch.length - dropped)
        self.padding = [(start, min(end, kept)) for start, end in self.padding if start < kept]


def new_columns(
    attention_mask: Any, rows: list[Row] | None, cached: int, batch: int, seq: int
) -> Tensor:
    """Which of the new tokens are stored: (batch, seq) bool on the host.

    Args:
        attention_mask: (batch, cached columns + seq), nonzero for tokens, or None for all.
        rows: the rows, or None before the first batch.
        cached: number of cached columns.
        batch, seq: the shape of the new tokens.

    Raises:
        ValueError: the batch is not the rows', or the mask does not fit, or hides a cached token.
        Unsupported: the mask is not a 2-D one.
    """
    if rows is not None and batch != len(rows):
        raise ValueError(
            f"input_ids: expected {len(rows)} rows, one a branch, got {batch}; "
            "ForkCache.batch_repeat_interleave(n) forks every row into n"
        )
    if batch < 1 or seq < 1:
        raise ValueError(f"input_ids: expected at least one token, got shape ({batch}, {seq})")
    if attention_mask is None:
        return torch.ones(batch, seq, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        got = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise Unsupported(
            f"attention_mask: a ForkCache takes a 2-D mask of padding or None, got {got}; "
            "branches decide who sees what"
        )
    if tuple(attention_mask.shape) != (batch, cached + seq):
        raise ValueError(
            f"attention_mask: expected shape ({batch}, {cached + seq}) for {cached} cached and "
            f"{seq} new columns, got {tuple(attention_mask.shape)}"
        )
    ones = attention_mask != 0
    # One transfer from the device for both.
    host = torch.cat([ones[:, cached:], ones[:, :cached].sum(1, keepdim=True)], 1).cpu()
    for i, row in enumerate(rows or ()):
        stored = row.num_stored(cached)
        if host[i, seq] != stored:
            raise ValueError(
                f"attention_mask: row {i} shows {int(host[i, seq])} of the cached columns, but its "
                f"branch holds {stored} tokens; crop or fork_at hide tokens, a mask cannot"
            )
    return host[:, :seq] != 0


def leaders(flags: Tensor, comparable_ids: Tensor | None) -> list[int]:
    """For each row the first row with the same tokens: they are stored once and then forked.

    Args:
        flags: (batch, seq), which tokens are stored.
        comparable_ids: (batch, seq) token ids, or None to let every row lead.
    """
    batch = flags.shape[0]
    if comparable_ids is None or batch == 1:
        return list(range(batch))
    ids = comparable_ids.cpu()
    first: dict[tuple[bytes, bytes], int] = {}
    return [
        first.setdefault((bytes(row_flags.tolist()), row_ids[row_flags].numpy().tobytes()), i)
        for i, (row_flags, row_ids) in enumerate(zip(flags, ids, strict=True))
    ]


def flatten(flags: Tensor, lead: list[int]) -> tuple[Tensor, Tensor] | None:
    """Index tensors between the padded batch and the step's rows, as in `ForwardPass`.

    Returns:
        stored (num_tokens,) and source (batch * seq,), int64; None if the step's rows are the
        batch's, in order.
    """
    batch, seq = flags.shape
    leader = torch.tensor(lead)
    leads = leader == torch.arange(batch)
    if bool(flags.all()) and bool(leads.all()):
        return None
    stored = (flags & leads[:, None]).flatten().nonzero().squeeze(1)
    source = torch.full((batch * seq,), stored.numel())
    source[stored] = torch.arange(stored.numel())
    return stored, source.view(batch, seq)[leader].flatten()


def check_positions(
    given: Tensor | None, positions: Tensor, flags: Tensor, stored: list[int]
) -> None:
    """Raises ValueError unless the position_ids of a call mean what the branches say.

    Accepted are the branches' own positions, and the count of tokens that `generate` makes from the
    mask: the branches know better where a join or a crop left their position.

    Args:
        given: (batch or 1, seq) or None.
        positions: (batch, seq), the branches' own.
        flags: (batch, seq), which tokens are stored.
        stored: for each row the number of tokens that it holds already.
    """
    if given is None:
        return
    if given.ndim != 2 or given.shape[-1] != positions.shape[1]:
        raise Unsupported(
            f"position_ids: expected shape {tuple(positions.shape)}, got {tuple(given.shape)}"
        )
    host = given.expand(positions.shape).cpu()
    counted = torch.tensor(stored)[:, None] + flags.cumsum(1) - 1
    own = positions.cpu()
    for i in range(len(stored)):
        mine, keep = host[i], flags[i]
        if not (torch.equal(mine[keep], own[i][keep]) or torch.equal(mine[keep], counted[i][keep])):
            raise ValueError(
                f"position_ids: row {i} got {mine[keep].tolist()}, expected its branch's positions "
                f"{own[i][keep].tolist()}; set branch.position to move it"
            )
