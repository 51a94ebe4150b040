"""The same tiny model twice: one decodes by DecodeGraph, one by an ordinary pass."""

from __future__ import annotations

import torch
from hf_models import build, random_tokens

from fork_attn import hf


class Twins:
    """Branches of both models live the same life; logits are held against each other.

    Args:
        capture: the graph is captured; what it is held against is then the same pass over the same
            kind of buffers without a graph, else `hf.forward`.
    """

    def __init__(
        self,
        name: str,
        tail: str = "seal",
        max_width: int = 12,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        capture: bool = False,
        page_size: int = 3,
        batch_invariant: bool = False,
    ) -> None:
        options = {"num_pages": 200, "page_size": page_size, "tail": tail}
        options["batch_invariant"] = batch_invariant
        self.models = [build(name).to(device, dtype) for _ in range(2)]
        self.caches = [hf.attach(model, **options) for model in self.models]
        self.graph = hf.DecodeGraph(self.models[0], max_width=max_width, capture=capture)
        self.plain = None
        if capture:
            self.plain = hf.DecodeGraph(self.models[1], max_width=max_width, capture=False)
        self.branches = [[cache.new_branch()] for cache in self.caches]
        self.tokens = [1]
        self.total = 0
        self.limit = 1e-5 if dtype == torch.float32 else 3e-2

    def live(self) -> None:
        """Forks, joins, frees, wider and narrower steps, an ordinary pass in between."""
        self.prefill(random_tokens(7, seed=1))
        self.decode()
        self.fork(0, 4)
        for _ in range(4):
            self.decode()
        self.decode([1, 3])
        self.fork(2, 5)
        self.decode()
        self.join(0, [1, 2])
        self.decode()
        self.free([1, 3])
        self.decode()
        self.decode([2])
        self.prefill(random_tokens(5, seed=2))
        for _ in range(4):
            self.decode()
        assert self.total > 50
        for cache in self.caches:
            cache.check()

    def prefill(self, ids: list[int]) -> None:
        for model, (root, *_) in zip(self.models, self.branches, strict=True):
            hf.forward(model, {root: ids})

    def decode(self, which: list[int] | None = None) -> None:
        """One greedy token for some of the branches."""
        which = list(range(len(self.tokens))) if which is None else which
        got = self.graph({self.branches[0][i]: self.tokens[i] for i in which})
        plain = {self.branches[1][i]: self.tokens[i] for i in which}
        if self.plain is not None:
            want = self.plain(plain)
        else:
            want = hf.forward(self.models[1], {b: [x] for b, x in plain.items()})
        assert got.shape == want.shape and bool(got.isfinite().all())
        scale = float(want.abs().max()) if want.dtype != torch.float32 else 1.0
        torch.testing.assert_close(got, want, atol=self.limit * scale, rtol=self.limit)
        if want.dtype == torch.float32:
            assert got.argmax(-1).tolist() == want.argmax(-1).tolist()
        for i, token in zip(which, want.argmax(-1).tolist(), strict=True):
            self.tokens[i] = token
        self.total += len(which)

    def fork(self, i: int, n: int) -> None:
        for branches in self.branches:
            branches += branches[i].fork(n)
        self.tokens += [(self.tokens[i] + 1 + k) % 30 for k in range(n)]

    def join(self, i: int, children: list[int], rebase: bool = False) -> None:
        for branches in self.branches:
            branches[i].join([branches[c] for c in children], rebase=rebase)
        self._drop(children)

    def watch_each_other(self, which: list[int], lag: int) -> None:
        for branches in self.branches:
            for i in which:
                for j in which:
                    if i != j:
                        branches[i].watch(branches[j], lag=lag)

    def free(self, which: list[int]) -> None:
        for cache, branches in zip(self.caches, self.branches, strict=True):
            cache.free([branches[i] for i in which])
        self._drop(which)

    def _drop(self, which: list[int]) -> None:
        for branches in self.branches:
            branches[:] = [b for i, b in enumerate(branches) if i not in which]
        self.tokens = [t for i, t in enumerate(self.tokens) if i not in which]
