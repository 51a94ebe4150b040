"""FlexAttention with a tree mask over K and V that stand once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fork_attn.bench.inputs import Inputs
from fork_attn.bench.way import Absent, Way, need, register, told

MOST_MASK_BYTES = 1 << 30


@register
class Flex(Way):
    """torch.compile'd flex_attention: every token once, who sees what in a mask of rows by pieces;
    block masks skip what no row of a block sees. Making the block mask is its plan, compiled on a
    GPU."""

    name = "flex_attention"
    shares = True
    has_plan = True
    slow_build = True

    @classmethod
    def available(cls, inputs: Inputs) -> None:
        forest = inputs.forest
        rows, pieces = forest.num_rows, len(forest.pieces)
        if rows * (pieces + rows) > MOST_MASK_BYTES:
            raise Absent(f"a mask of {rows} rows by {pieces + rows} pieces is too large")
        need(inputs.unique_bytes, inputs, "a copy in its layout")

    def build(self, layers: int) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        inputs = self.inputs
        need(layers * inputs.unique_bytes, inputs, f"{layers} layers of a copy in its layout")
        self.q = inputs.q.transpose(0, 1)[None].contiguous()

        def laid(x: Tensor) -> Tensor:
            return x.transpose(0, 1)[None].clone(memory_format=torch.contiguous_format)

        self.kv = [(laid(inputs.k), laid(inputs.v)) for _ in range(layers)]
        piece_of, sees = _visibility(inputs)

        def seen(b: Tensor, h: Tensor, row: Tensor, slot: Tensor) -> Tensor:
            return sees[row, piece_of[slot]]

        self.seen = seen
        torch._dynamo.reset()  # it stops compiling after a few shapes
        self.attend: Any = torch.compile(flex_attention, dynamic=False)
        self.create_block_mask: Any = create_block_mask
        if inputs.device.type == "cuda":
            self.create_block_mask = torch.compile(create_block_mask)
        try:
            self.plan()
            self.run(0)
        except Exception as error:  # a compiler fails with anything at all; the reason is recorded
            raise Absent(told(error)) from error

    def plan(self) -> None:
        self.mask = self.create_block_mask(
            self.seen,
            None,
            None,
            self.inputs.forest.num_rows,
            len(self.inputs.k),
            device=self.inputs.device,
        )

    def run(self, layer: int) -> Tensor:
        out: Tensor = self.attend(self.q, *self.kv[layer], block_mask=self.mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    def held_bytes(self) -> int:
        return self.inputs.unique_bytes


def _visibility(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(N,) the piece of each slot, new tokens each a piece of their own; (T, pieces) bool, which
    rows see it."""
    forest = inputs.forest
    pieces = len(forest.pieces)
    piece_of = torch.zeros(len(inputs.k), dtype=torch.long)
    sees = torch.zeros(forest.num_rows, pieces + forest.num_rows, dtype=torch.bool)
    begins = forest.row_begin
    for index, piece in enumerate(forest.pieces):
        piece_of[inputs.piece_slots(index).cpu()] = index
        sees[begins[piece.begin] : begins[piece.end], index] = True
    piece_of[inputs.node_begin[-1] :] = pieces + torch.arange(forest.num_rows)
    for query in range(len(forest.queries)):
        rows = inputs.rows(query)
        own = slice(pieces + rows.start, pieces + rows.stop)
        sees[rows, own] = inputs.own_mask(query).cpu()
    return piece_of.to(inputs.device), sees.to(inputs.device)
