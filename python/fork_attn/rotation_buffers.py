"""Rotated copies of query rows, made from tensors at addresses that never change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fork_attn.rope import Rope, turn_of, turned

Kind = TypeVar("Kind")


class RotationBuffers(Generic[Kind]):
    """What a captured call needs to give plans with rotations the queries that they read.

    Plans of one step share the number of rows; each kind of layer has its rotations.

    Args:
        max_rotations: copies in a plan, at most. There are always as many; those that a plan does
            not have are copies of row 0 that nothing reads.
        device: where the queries lie.
    """

    def __init__(self, max_rotations: int, device: torch.device) -> None:
        self._order = torch.arange(max_rotations, device=device)
        self._where = self._order.clone()  # rows of the query tensor that the copies become
        self._rows: dict[Kind, Tensor] = {}  # (max_rotations,) int64, rows that are copied
        self._turns: dict[tuple[Kind, Rope], tuple[Tensor, Tensor]] = {}  # (max_rotations, pairs)

    def write(
        self, kind: Kind, rotations: Tensor, num_tokens: int, ropes: Iterable[Rope | None]
    ) -> None:
        """Takes the rotations of a plan.

        Args:
            kind: of the layers that follow the plan.
            rotations: (n, 2) int32 on the device: row, and by how many positions it moves back.
            num_tokens: rows of the step; the plan reads the copies right behind them.
            ropes: of those layers; known where n > 0.
        """
        n = len(rotations)
        torch.add(self._order, num_tokens, out=self._where)
        rows = self._rows.setdefault(kind, torch.zeros_like(self._order))
        rows.zero_()
        rows[:n].copy_(rotations[:, 0])
        for rope in set(ropes):
            if rope is None:
                continue
            if (kind, rope) not in self._turns:
                shape = (len(rows), len(rope.inv_freq))
                cos, sin = (torch.zeros(shape, device=rows.device) for _ in range(2))
                self._turns[kind, rope] = cos, sin
            for table, new in zip(
                self._turns[kind, rope], turn_of(rope, -rotations[:, 1]), strict=True
            ):
                table[:n].copy_(new)

    def memory(self) -> Iterator[Tensor]:
        """The tensors that `queries` reads."""
        yield self._where
        yield from self._rows.values()
        for tables in self._turns.values():
            yield from tables

    def queries(self, kind: Kind, rope: Rope, q: Tensor) -> Tensor:
        """The query tensor that the plan written last reads.

        Args:
            kind: of the layer.
            rope: of the layer.
            q: (rows, num_q_heads, head_dim), at least the step's rows.

        Returns:
            (rows + max_rotations, num_q_heads, head_dim): the step's rows, then the copies.
        """
        copies = turned(q.index_select(0, self._rows[kind]), rope, self._turns[kind, rope])
        room = q.new_empty((len(copies), *q.shape[1:]))
        return torch.cat([q, room]).index_copy_(0, self._where, copies)
