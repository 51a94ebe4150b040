"""A transformers Cache whose rows are branches of a forked KV cache."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from fork_attn.branch import Branch
from fork_attn.cache import ForkedKVCache
from fork_attn.errors import DuplicateBranch, ForeignBranch, StaleBranch, Unsupported
from fork_attn.hf._link import Link
from fork_attn.hf._pass import ForwardPass
from fork_attn.hf._rows import Row, check_positions, flatten, leaders, new_columns


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a model call that concern its cache.

    Attributes:
        batch, seq: the shape of the new tokens.
        device: theirs.
        attention_mask: (batch, cached columns + seq) or None.
        position_ids: (batch or 1, seq) or None.
        comparable_ids: (batch, seq) token ids, if equal tokens mean equal keys and values.
    """

    batch: int
    seq: int
    device: torch.device
    attention_mask: Any
    position_ids: Tensor | None
    comparable_ids: Tensor | None


class ForkCache(Cache):
    """Lets an attached model's `generate` and `forward` run over branches, one a row of the batch.

    A row has a column for every token that the model was given, padding included, so that stock
    attention masks fit; padding is not stored. Rows of the first batch with the same tokens store
    them once: beams and `num_return_sequences` keep one copy of their prompt (of its first chunk,
    if it is fed in chunks). Positions are the branches' own. A mask can pad, it cannot hide tokens
    that are stored. Images and other media are refused.

    Args:
        cache: the cache that `fork_attn.hf.attach` returned.
        branches: one branch a row, all different. They stay usable on their own. None makes a new,
            empty branch for every row of the first batch.

    Raises:
        DuplicateBranch, ForeignBranch, StaleBranch: by what is wrong with branches.
    """

    def __init__(self, cache: ForkedKVCache, branches: Sequence[Branch] | None = None) -> None:
        if not isinstance(cache, ForkedKVCache):
            raise TypeError(f"cache: expected a ForkedKVCache, got {type(cache).__name__}")
        super().__init__(layers=[])
        self.cache = cache
        self._freed = False
        self._pass: weakref.ref[ForwardPass] | None = None
        self._columns = 0
        self._rows: list[Row] | None = None
        if branches is not None:
            _check_branches(cache, branches)
            self._rows = [Row(branch) for branch in branches]
            self._fit_rows()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branch of each row; empty before the first batch and after `free`."""
        return tuple(row.branch for row in self._rows or ())

    def free(self) -> None:
        """Frees the branches of all rows. The ForkCache cannot be used again."""
        self.cache.free(self.branches)
        self._rows, self._columns, self._freed = [], 0, True

    # What the model calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Passes a layer's new keys and values on to its attention call, which stores them.

        Raises:
            Unsupported: the model is not attached, so that nothing would store them.
        """
        if self._pass is None or self._pass() is None:
            raise Unsupported(
                "past_key_values: a ForkCache was given to a model that is not attached to its "
                "cache; call fork_attn.hf.attach(model) first"
            )
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns: cached tokens and padding of every row."""
        self._fit_rows()
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    # What generation calls.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from row `beam_idx[i]`."""
        indices: list[int] = beam_idx.tolist()
        rows = self._rows or []
        self.cache.reorder([row.branch for row in rows], indices)
        padding = [list(rows[i].padding) for i in indices]
        for row, ranges in zip(rows, padding, strict=True):
            row.padding = ranges

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last `-tokens_to_remove` columns of every row.

        Raises:
            ValueError: a positive number, or more columns than there are.
        """
        columns = self.get_seq_length()
        if not -columns <= tokens_to_remove <= 0:
            raise ValueError(
                f"tokens_to_remove: expected between {-columns} and 0, got {tokens_to_remove}"
            )
        if tokens_to_remove == 0:
            return
        for row in self._rows or ():
            row.check_alive()
        for row in self._rows or ():
            row.crop(columns, columns + tokens_to_remove)
        self._columns = columns + tokens_to_remove

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Forks every row into `repeats` rows, next to each other; shares all their pages."""
        if repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {repeats}")
        for row in self._rows or ():
            row.check_alive()
        self._rows = self._rows and [
            copy for row in self._rows for copy in (row, *row.fork(repeats - 1))
        ]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at `indices`, in that order; frees the others, forks the repeated."""
        rows = self._rows or []
        wanted: list[int] = torch.arange(len(rows))[indices.cpu()].tolist()
        for row in rows:
            row.check_alive()
        kept: set[int] = set()
        selected: list[Row] = []
        for i in wanted:
            selected += [rows[i]] if i not in kept else rows[i].fork(1)
            kept.add(i)
        self.cache.free([row.branch for i, row in enumerate(rows) if i not in kept])
        self._rows = selected

    def reset(self) -> None:
        """Frees the rows; the next batch starts new ones."""
        self.cache.free(self.branches)
        self._rows, self._columns = None, 0

    def activate_past_recording(self) -> None:
        """Nothing to do: a forked cache keeps all it has seen."""

    @property
    def batch_size(self) -> int:
        return len(self._rows) if self._rows else -1

    @property
    def is_initialized(self) -> bool:
        return bool(self._rows)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"ForkCache({len(self.branches)} rows, {self.get_seq_length()} columns)"

    # What the hooks call.

    def _begin(self, link: Link, call: Call) -> tuple[ForwardPass, Tensor]:
        """Opens the step of one model call.

        Returns:
            The pass, and position_ids (batch, seq) int64; padding has position 0.
        """
        if self._freed:
            raise StaleBranch("past_key_values: this ForkCache was freed")
        self._fit_rows()
        flags = new_columns(call.attention_mask, self._rows, self._columns, call.batch, call.seq)
        lead = leaders(flags, call.comparable_ids if self._rows is None else None)
        fresh = {i: Row(self.cache.new_branch()) for i in set(lead)} if self._rows is None else {}
        try:
            forward_pass, position_ids = self._open(link, call, flags, lead, fresh)
        except BaseException:
            self._discard(fresh)
            raise
        self._activate(forward_pass)
        return forward_pass, position_ids

    def _open(
        self, link: Link, call: Call, flags: Tensor, lead: list[int], fresh: dict[int, Row]
    ) -> tuple[ForwardPass, Tensor]:
        """Opens the step; `fresh` holds the rows of the first batch that lead."""
        rows = fresh or dict(enumerate(self._rows or ()))
        counts: list[int] = flags.sum(1).tolist()
        tokens = {rows[i].branch: counts[i] for i in sorted(rows) if counts[i] > 0}
        step = self.cache.step(tokens) if tokens else None
        try:
            positions = torch.zeros(0, dtype=torch.int64) if step is None else step.position_ids
            positions = positions.to(call.device)
            index = flatten(flags, lead)
            if index is not None:
                index = (index[0].to(call.device), index[1].to(call.device))
                positions = torch.cat([positions, positions.new_zeros(1)])[index[1]]
            positions = positions.view(call.batch, call.seq)
            held = [rows[i].num_stored(self._columns) for i in lead]
            check_positions(call.position_ids, positions, flags, held)
        except BaseException:
            if step is not None:
                step.rollback()
            raise
        stored, source = index or (None, None)
        forward_pass = ForwardPass(link, step, stored, source)
        forward_pass.on_commit = lambda: self._commit_rows(rows, flags, lead)
        forward_pass.on_abort = lambda: self._discard(fresh)
        return forward_pass, positions

    def _activate(self, forward_pass: ForwardPass) -> None:
        # Weak, so that a pass whose call was interrupted dies with it and rolls back.
        self._pass = weakref.ref(forward_pass)

    def _commit_rows(self, rows: dict[int, Row], flags: Tensor, lead: list[int]) -> None:
        """Takes in the new columns; a row that follows another forks from it only now."""
        self._pass = None
        for i, row in rows.items():
            row.append(self._columns, flags[i])
        self._columns += flags.shape[1]
        if self._rows is None:
            copies = {i: iter(row.fork(lead.count(i) - 1)) for i, row in rows.items()}
            self._rows = [rows[k] if k == i else next(copies[k]) for i, k in enumerate(lead)]

    def _discard(self, fresh: dict[int, Row]) -> None:
        self._pass = None
        if fresh:
            self.cache.free([row.branch for row in fresh.values()])

    def _fit_rows(self) -> None:
        """Takes in what happened to the branches outside: a shorter row is padded on the left."""
        rows = [row for row in self._rows or () if row.branch.alive]
        if any(row.branch.length != row.num_stored(self._columns) for row in rows):
            self._columns = max(row.branch.length for row in rows)
            for row in rows:
                short = self._columns - row.branch.length
                row.padding = [(0, short)] if short else []


def _check_branches(cache: ForkedKVCache, branches: Sequence[Branch]) -> None:
    if not branches:
        raise ValueError("branches: expected at least one branch, got none")
    for i, branch in enumerate(branches):
        if not isinstance(branch, Branch):
            raise TypeError(f"branches[{i}]: expected a Branch, got {type(branch).__name__}")
        if branch.cache is not cache:
            raise ForeignBranch(f"branches[{i}]: belongs to another cache than the one given")
        if not branch.alive:
            raise StaleBranch(f"branches[{i}]: was freed, or consumed by a join or select")
    if len(set(branches)) != len(branches):
        raise DuplicateBranch("branches: the same branch is given twice; fork it instead")
