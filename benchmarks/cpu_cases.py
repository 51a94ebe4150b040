"""Shared-prefix decode on a CPU: fork-attn's own inputs, and the rivals over copies of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fork_attn as fa

PAGE_SIZE = 16
SUFFIX = 64
COLD_BYTES = 128 << 20
"""Of K and V that a way reads before it comes back to the same: more than the caches hold."""


@dataclass(frozen=True)
class Case:
    """n branches with one query token each over a shared prefix and own suffixes of SUFFIX tokens,
    the query's own among them."""

    prefix: int
    branches: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Query rows of one KV head over the prefix."""
        return self.branches * self.group

    @property
    def reuse(self) -> float:
        """Tokens that the branches see together over tokens that exist."""
        slots = self.prefix + self.branches * SUFFIX
        return self.branches * (self.prefix + SUFFIX) / slots

    @property
    def unique_bytes(self) -> int:
        """K and V of every slot once."""
        slots = self.prefix + self.branches * SUFFIX
        return 2 * slots * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def copied_bytes(self) -> int:
        """K and V of every branch's context."""
        slots = self.branches * (self.prefix + SUFFIX)
        return 2 * slots * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def layers(self) -> int:
        """Layers that calls go through in turn, so that each finds its K and V in memory, as in a
        model, and its code in the caches."""
        return -(-COLD_BYTES // self.unique_bytes)

    @property
    def flops(self) -> int:
        """Of the two products."""
        return 4 * self.branches * (self.prefix + SUFFIX) * self.q_heads * self.head_dim


class Inputs:
    """Random q, K and V: `q` (n, q_heads, head_dim); `prefix` K and V (P, kv_heads, head_dim);
    `suffix` K and V (n, SUFFIX, kv_heads, head_dim)."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(case.dtype)

        heads = (case.kv_heads, case.head_dim)
        self.q = normal(case.branches, case.q_heads, case.head_dim)
        self.prefix = (normal(case.prefix, *heads), normal(case.prefix, *heads))
        own = (case.branches, SUFFIX, *heads)
        self.suffix = (normal(*own), normal(*own))

    def copied(self) -> tuple[Tensor, Tensor]:
        """K and V gathered per branch, (n, kv_heads, P + SUFFIX, head_dim): the prefix n times."""
        n = self.case.branches

        def gather(prefix: Tensor, suffix: Tensor) -> Tensor:
            out = prefix.new_empty(n, suffix.shape[2], len(prefix) + SUFFIX, prefix.shape[2])
            out[:, :, : len(prefix)] = prefix.transpose(0, 1)
            out[:, :, len(prefix) :] = suffix.transpose(1, 2)
            return out

        k, v = (gather(p, s) for p, s in zip(self.prefix, self.suffix, strict=True))
        return k, v

    def oracle(self) -> Tensor:
        """(n, q_heads, head_dim) in float64: softmax attention, one KV head at a time."""
        case = self.case
        out = torch.empty(case.branches, case.q_heads, case.head_dim, dtype=torch.float64)
        for head in range(case.kv_heads):
            mine = slice(head * case.group, (head + 1) * case.group)
            q = self.q[:, mine].double() * case.head_dim**-0.5
            pk, pv = (x[:, head].double() for x in self.prefix)
            sk, sv = (x[:, :, head].double() for x in self.suffix)
            scores = torch.cat([q @ pk.T, q @ sk.transpose(1, 2)], -1).softmax(-1)
            far, near = scores.split((case.prefix, SUFFIX), -1)
            out[:, mine] = far @ pv + near @ sv
        return out


class Forked:
    """fork-attn over the same inputs; pages lie scattered, as in a pool that is long in use."""

    def __init__(self, inputs: Inputs) -> None:
        case = inputs.case
        pages = case.prefix // PAGE_SIZE + case.branches * (SUFFIX // PAGE_SIZE) + 1
        self.inputs = inputs
        self.cache = fa.ForkedKVCache(
            num_layers=case.layers,
            num_pages=pages,
            num_q_heads=case.q_heads,
            num_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            page_size=PAGE_SIZE,
            dtype=case.dtype,
        )
        self._scatter(pages)
        root = self.cache.new_branch()
        self._store({root: case.prefix}, *inputs.prefix)
        branches = root.fork(case.branches)
        early = (x[:, :-1].flatten(0, 1) for x in inputs.suffix)
        self._store(dict.fromkeys(branches, SUFFIX - 1), *early)
        self.tokens: dict[fa.Branch, int | fa.Draft] = dict.fromkeys(branches, 1)
        self.new_kv = tuple(x[:, -1] for x in inputs.suffix)
        step = self.cache.step(self.tokens)
        self.plan = step.plan
        k, v = self.new_kv
        for layer in range(case.layers):
            self.cache.attend(layer, inputs.q, k, v, step)
        step.rollback()  # the slots keep what was written
        self._turn = itertools.cycle(range(case.layers))

    def _scatter(self, pages: int) -> None:
        fillers = [self.cache.new_branch() for _ in range(pages)]
        self.cache.step(dict.fromkeys(fillers, PAGE_SIZE)).commit()
        random.Random(0).shuffle(fillers)
        self.cache.free(fillers)

    def _store(self, tokens: dict[fa.Branch, int | fa.Draft], k: Tensor, v: Tensor) -> None:
        with self.cache.step(tokens) as step:
            for layer in range(self.cache.num_layers):
                caches = self.cache.layer(layer)
                torch.ops.fork_attn.store_kv(k, v, *caches, step.slot_mapping)

    def attend(self) -> Tensor:
        """The attention alone, with a plan that lies ready."""
        return fa.tree_attention(self.inputs.q, *self.cache.layer(next(self._turn)), self.plan)[0]

    def whole_step(self) -> Tensor:
        """Step, plan, store of the new K and V, attention: what a model of one layer would pay."""
        step = self.cache.step(self.tokens)
        k, v = self.new_kv
        out = self.cache.attend(next(self._turn), self.inputs.q, k, v, step)
        step.rollback()
        return out


def rivals(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Torch's ways; what they copy or gather lies ready and is not in their time. A KV head's
    query heads stand as the rows of one matrix, which is torch's fastest form of GQA here."""
    case = inputs.case
    heads = (case.branches, case.kv_heads, case.group, case.head_dim)
    q = inputs.q.view(heads)
    turn = itertools.cycle([inputs.copied() for _ in range(case.layers)])

    def sdpa_per_branch() -> Tensor:
        copied_k, copied_v = next(turn)
        out = torch.empty_like(q)
        for i in range(case.branches):
            one = slice(i, i + 1)
            out[one] = scaled_dot_product_attention(q[one], copied_k[one], copied_v[one])
        return out.view(inputs.q.shape)

    def sdpa_batched() -> Tensor:
        return scaled_dot_product_attention(q, *next(turn)).view(inputs.q.shape)

    return {
        "sdpa_per_branch": sdpa_per_branch,
        "sdpa_batched": sdpa_batched,
        "grouped_matmul": GroupedMatmul(inputs),
    }


class GroupedMatmul:
    """The shared prefix once for all rows of a KV head, the suffixes batched, merged by LSE: plain
    torch over gathered K and V, the prefix as (kv_heads, P, head_dim)."""

    def __init__(self, inputs: Inputs) -> None:
        self.case = inputs.case
        self.q = inputs.q
        self._turn = itertools.cycle([self._gather(inputs) for _ in range(self.case.layers)])

    @staticmethod
    def _gather(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        far = [
            x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in inputs.prefix
        ]
        near = [
            x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in inputs.suffix
        ]
        return far, near

    def __call__(self) -> Tensor:
        c = self.case
        q = self.q.view(c.branches, c.kv_heads, c.group, c.head_dim)
        by_head = q.transpose(0, 1).reshape(c.kv_heads, c.rows, c.head_dim)
        far_kv, near_kv = next(self._turn)
        far, far_lse = _attend(by_head, *far_kv)
        near, near_lse = _attend(q, *near_kv)
        far = far.view(c.kv_heads, c.branches, c.group, c.head_dim).transpose(0, 1)
        far_lse = far_lse.view(c.kv_heads, c.branches, c.group, 1).transpose(0, 1)
        weight = torch.sigmoid(far_lse - near_lse)
        return torch.lerp(near.float(), far.float(), weight).to(c.dtype).view(self.q.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q, k.transpose(-1, -2)).float().mul_(q.shape[-1] ** -0.5)
    lse = scores.logsumexp(-1, keepdim=True)
    return torch.matmul(scores.sub_(lse).exp_().to(v.dtype), v), lse
