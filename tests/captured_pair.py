"""A CachePair whose attention is one fixed call over PlanBuffers: a CUDA graph, or what would be in
it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from cache_pair import CachePair

from fork_attn import Branch, Draft
from fork_attn.plan_buffers import PlanBuffers

WIDTH = 24


class Captured:
    """What a CUDA graph holds: `attend` of every layer on tensors at fixed addresses.

    Args:
        capture: captures it on the cache's device, at the first step; else it is called.
        padding: what stands in the rows of q, k and v beyond a step's.
    """

    def __init__(
        self,
        pair: CachePair,
        width: int = WIDTH,
        *,
        capture: bool = False,
        padding: float = torch.nan,
    ) -> None:
        m = pair.model
        self.pair, self.capture, self.padding = pair, capture, padding
        self.buffers = PlanBuffers(pair.cache, max_tokens=width)
        shapes = (
            (width, m.num_q_heads, m.head_dim),
            (width, m.num_kv_heads, m.head_dim),
            (width, m.num_kv_heads, m.head_dim_v or m.head_dim),
        )
        same = {"dtype": m.dtype, "device": pair.cache.device}
        self.inputs = [[torch.full(s, padding, **same) for s in shapes] for _ in m.windows]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: list[torch.Tensor] = []

    def attend(self) -> list[torch.Tensor]:
        return [self.buffers.attend(i, *qkv) for i, qkv in enumerate(self.inputs)]

    def replay(self) -> list[torch.Tensor]:
        if not self.capture:
            return self.attend()
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels compile; the same K and V are stored again
                self.attend()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.attend()
        self.graph.replay()
        return self.outputs

    def tables(self) -> dict[object, list[torch.Tensor]]:
        """What `attend` reads of rotations."""
        rotations = self.buffers._rotations
        turns = {key: list(tables) for key, tables in rotations._turns.items()}
        rows = {kind: [rows] for kind, rows in rotations._rows.items()}
        return {"where": [rotations._where], **rows, **turns}

    def step(
        self,
        counts: Mapping[Branch, int | Draft],
        accept: Mapping[Branch, list[int]] | None = None,
    ) -> None:
        """One step by replay, against the oracle; commits."""
        pair = self.pair
        step = pair.open(counts)
        rows = pair.rows(counts, accept)
        with step:
            self.buffers.update(step)
            n = step.num_tokens
            identities = [t.identity for new in rows.values() for t in new.tokens]
            for layer, (q, k, v) in enumerate(self.inputs):
                for x in (q, k, v):
                    x.fill_(self.padding)
                q[:n] = torch.randn(n, *q.shape[1:], device=q.device)
                for x, new in zip((k, v), pair.table.kv(layer, identities), strict=True):
                    x[:n] = new.to(x.device)
            limit = 1e-5 if pair.model.dtype == torch.float32 else 5e-2
            for layer, out in enumerate(self.replay()):
                window = pair.model.windows[layer]
                q = self.inputs[layer][0][:n].cpu()
                want, _ = pair.oracle.attend(rows, layer, q, window=window)
                torch.testing.assert_close(out[:n].cpu().double(), want, atol=limit, rtol=limit)
                assert (out[n:] == 0).all()
            for branch, path in (accept or {}).items():
                step.accept(path, branch)
        pair.oracle.step(rows)
        pair.check()
